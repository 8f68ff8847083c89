"""Metrics of several splits side by side, as a Markdown table that reads as plain text too."""

from __future__ import annotations

from collections.abc import Mapping

from cllip_fast.errors import InputError

COUNTS = ("images", "skipped", "regions", "regions_skipped", "shards_skipped")
_LABELS = {
    "images": "images",
    "skipped": "– skipped",
    "regions": "regions",
    "regions_skipped": "– skipped",
    "shards_skipped": "shards that cannot be read",
    **{f"i2t_r{k}": f"image → text R@{k}" for k in (1, 5, 10)},
    **{f"t2i_r{k}": f"text → image R@{k}" for k in (1, 5, 10)},
    "recognition_top1": "region recognition, top-1",
    "recognition_mean_class": "region recognition, class mean",
    **{f"r2t_r{k}": f"region → text R@{k}" for k in (1, 10)},
    **{f"t2r_r{k}": f"text → region R@{k}" for k in (1, 10)},
    "grounding_acc50": "grounding, IoU ≥ 0.5",
    "grounding_iou": "grounding, mean IoU",
    "referring_acc50": "referring, IoU ≥ 0.5",
    "referring_iou": "referring, mean IoU",
    "pointing": "pointing",
    "top1": "zero-shot top-1",
    "top5": "zero-shot top-5",
    "mean_class": "zero-shot, class mean",
    "miou": "segmentation, mean IoU",
    "pixel_accuracy": "segmentation, pixels right",
}


def label(metric: str) -> str:
    """A metric's name for people."""
    if metric in _LABELS:
        return _LABELS[metric]
    return "– " + metric.removeprefix("recognition_") if metric.startswith("recognition_") else metric


def table(splits: Mapping[str, Mapping[str, float | None]], *, title: str = "metric") -> str:
    """A table with one column a split and one row a metric, in %; counts as they are, `–` for None or absent.

    Rows keep the order in which the metrics come (that of `evaluate`).

    Args:
        splits: split name -> metrics.
        title: heads the column of names.

    Raises:
        InputError: no splits.
    """
    if not splits:
        raise InputError("splits is empty, expected at least one")
    metrics = list(dict.fromkeys(name for values in splits.values() for name in values))
    rows = [[label(name)] + [_cell(name, values.get(name)) for values in splits.values()] for name in metrics]
    header = [f"{title}, %", *splits]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join(
        "| "
        + " | ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
        + " |"
        for row in [header, rule, *rows]
    )


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if metric in COUNTS else f"{100 * value:.1f}"
