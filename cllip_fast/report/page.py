"""The page: one HTML file without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from cllip_fast.errors import InputError
from cllip_fast.report.chart import curves
from cllip_fast.report.html import Html, image, join, note, scroll, tag
from cllip_fast.report.look import Findings, look_again
from cllip_fast.report.pictures import attention_row, box_card, image_card, legend, picture_row, region_card
from cllip_fast.report.run import Run, read_run
from cllip_fast.report.style import STYLE
from cllip_fast.report.tables import environment_table, faults_table, metrics_table, options_tables

MAX_SAMPLES = 2000  # their pictures and all scores between them are held in memory
FAILURES = 9  # cards of a kind


def write_report(run: str | Path, out: str | Path, *, samples: int = 200, device: str | None = None) -> list[str]:
    """Write a run's page.

    Args:
        run: its folder.
        out: the HTML file; missing folders are made.
        samples: how many of each split, from its first, are looked at again for failures.
        device: where to compute; default: a GPU where there is one.

    Returns:
        one line for each part that is missing, and why; the page says the same.

    Raises:
        InputError: the folder is no run's, something in it cannot be used, or the page cannot be written.
    """
    if not 1 <= samples <= MAX_SAMPLES:
        raise InputError(f"samples is {samples}, expected 1 to {MAX_SAMPLES}")
    out, found = Path(out), read_run(Path(run))
    findings = look_again(found, samples=samples, device=device)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_page(found, findings), encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"page {out} cannot be written: {error.strerror}") from error
    return findings.notes


def _page(run: Run, findings: Findings) -> str:
    sections = [
        ("curves", "Curves", _curves(run)),
        ("metrics", "Metrics", metrics_table(run)),
        ("pictures", "Pictures", _pictures(run, findings)),
        ("failures", "Failures", _failures(run, findings)),
        ("attention", "Attention of the Prompter", _attention(findings)),
        ("faults", "Warnings and faults", faults_table(run, findings)),
        ("options", "Options", options_tables(run)),
        ("environment", "Environment", environment_table(run, findings)),
    ]
    title = f"{run.config.name}: a run of CLLIP-Fast"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    links = tag("ul", *(tag("li", tag("a", name, href=f"#{anchor}")) for anchor, name, _ in sections))
    header = tag(
        "header",
        tag("h1", title),
        _summary(run),
        *map(note, findings.notes),
        tag("nav", links, aria_label="Parts of the page"),
    )
    main = tag("main", *(tag("section", tag("h2", name), body, id=anchor) for anchor, name, body in sections))
    footer = tag("footer", tag("p", f"Written on {datetime.date.today()} by cllip-fast report.", class_="faint"))
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', header, main, footer), lang='en')}\n"


def _summary(run: Run) -> Html:
    config, figures = run.config, {}
    last = max((steps[-1] for steps, _ in run.training.values()), default=0)
    figures["Steps"] = f"{last:,} of {config.steps:,}"
    if run.seconds is not None:
        figures["Time"] = str(datetime.timedelta(seconds=round(run.seconds)))
    figures["Model"] = config.model
    figures["Regions by"] = {"prompter": "Prompter", "roi_align": "RoIAlign"}[config.region]
    figures["Losses"] = ", ".join(config.parts)
    batch = f"{config.batch_size}" + (f" × {config.accum_freq}" if config.accum_freq > 1 else "")
    figures["Batch of a rank"] = f"{batch} images"
    figures["Seed"] = config.seed
    return _facts(figures)


def _curves(run: Run) -> Html:
    figures = curves(run.training, run.splits)
    return tag("div", *figures, class_="charts") if figures else note("The run has no log to draw.")


def _pictures(run: Run, findings: Findings) -> Html:
    if findings.splits:
        maps = "cosine of the phrase with each patch"
        return join(
            legend(predicted=findings.grounds, maps=maps),
            *(
                _split(
                    k,
                    f"{split.name}: the first {_of(len(split.shown), 'image')}",
                    *(picture_row(shown.picture, shown.caption, shown.answers) for shown in split.shown),
                )
                for k, split in enumerate(findings.splits)
            ),
        )
    sheets = sorted(run.folder.glob("sheet_*.png"))
    if not sheets:
        return note("There is nothing to draw from.")
    figures = []
    for path in sheets:
        name = path.stem.removeprefix("sheet_")
        try:
            with Image.open(path) as sheet:
                drawn = image(sheet, f"Picture sheet of {name}: images, boxes and maps")
        except OSError as error:
            raise InputError(f"picture {path} cannot be read: {error}") from error
        figures += [tag("h3", name), scroll(drawn, label=f"Picture sheet of {name}")]
    return join(tag("p", "As the trainer drew them at the end of the run."), *figures)


def _failures(run: Run, findings: Findings) -> Html:
    if not findings.splits:
        return note("Not looked for: see above.")
    splits = []
    for number, split in enumerate(findings.splits):
        sample, parts = split.sample, []
        few = f"the first {len(sample.keys):,} of {split.total:,}" if len(sample.keys) < split.total else "all"
        kinds: list[tuple[list, Callable, str, str]] = [
            (split.images, image_card, "Images by contrastive loss",
             f"Cross-entropy of an image and its first caption among {_of(len(split.images), 'caption')}, mean of both "
             f"ways. Mean {_mean(split.images)}; {_share(split.images, lambda each: each.rank == 1)} put their own "
             "caption first."),
            (split.regions, region_card, "Regions by loss",
             f"Cross-entropy of a true box's phrase among {_of(len(sample.phrases), 'distinct phrase')} of the sample. "
             f"Mean {_mean(split.regions)}; "
             f"{_share(split.regions, lambda each: each.said is None or each.cosine > each.said_cosine)} "
             "put their own phrase first."),
            (split.boxes, box_card, "Phrases by box loss",
             f"The box predicted from a phrase against the nearest of its true boxes, {run.config.grounding}. "
             f"Mean {_mean(split.boxes)}; {_share(split.boxes, lambda each: each.iou >= 0.5)} reach an IoU of 0.5."),
        ]  # fmt: skip
        for found, card, name, text in kinds:
            if not found:
                continue
            cards = [card(each, sample.pictures[each.image], sample.keys[each.image]) for each in found[:FAILURES]]
            parts += [tag("h4", name), tag("p", text), tag("ol", *cards, class_="cards")]
        splits.append(_split(number, f"{split.name}: {few} samples", *parts))
    return join(*map(note, findings.untrained), legend(predicted=findings.grounds), *splits)


def _attention(findings: Findings) -> Html:
    if not findings.splits:
        return note("Not looked at: see above.")
    looked = [split for split in findings.splits if split.looks]
    if not looked:
        return join(*map(note, findings.untrained)) or note("No image of the sample has a region.")
    text = (
        "The share of attention that each patch gets, in the Prompter's layer, from a prompt's own tokens: a box's two "
        "corners (their mean) or a phrase. Below: how much of what the patches get lies in the true boxes (were it "
        "even, the boxes' share of the image), and how much of all attention stays in the prompt."
    )
    rows = [
        _split(
            number,
            split.name,
            tag(
                "div",
                *(attention_row(look.picture, look.answer, look.box, look.text) for look in split.looks),
                class_="looks",
            ),
        )
        for number, split in enumerate(looked)
    ]
    return join(tag("p", text), legend(predicted=findings.grounds, maps="attention"), *rows)


def _facts(figures: dict[str, object]) -> Html:
    return tag(
        "dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in figures.items()), class_="facts"
    )


def _split(number: int, title: str, *parts: Html) -> Html:
    """A split's share of a section; all but the first are folded."""
    return tag("details", tag("summary", tag("h3", title)), *parts, open=None if number else "")


def _of(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _mean(failures: list) -> str:
    return f"{math.fsum(each.loss for each in failures) / max(len(failures), 1):.2f}"


def _share(failures: list, right: Callable[[object], bool]) -> str:
    return f"{sum(map(right, failures)):,} of {len(failures):,}"
