"""Region recognition and region-text retrieval, both with ground-truth boxes (CLOC, arXiv 2410.02746, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cllip_fast.errors import InputError, check_tensor
from cllip_fast.evaluate.ranking import TILE_ELEMENTS, match_ranks, recall_at

DEPTHS = (1, 10)
Attributes = Mapping[str, Mapping[str, str]]


def classify(region_features: Tensor, class_features: Tensor, *, tile_elements: int = TILE_ELEMENTS) -> Tensor:
    """Class of largest cosine for each region: [R, E] and [C, E] to [R] int64.

    Of equal cosines the first class wins. A region whose cosines are not all finite gets -1, which equals no label.
    """
    check_tensor("region_features", region_features, ("R", "E"), floating=True)
    check_tensor("class_features", class_features, ("C", region_features.shape[1]), floating=True)
    if len(class_features) == 0:
        raise InputError("class_features has no rows, expected at least one class")
    predicted = torch.empty(len(region_features), dtype=torch.int64, device=region_features.device)
    rows = max(1, tile_elements // len(class_features))
    for start in range(0, len(region_features), rows):
        scores = region_features[start : start + rows] @ class_features.T
        predicted[start : start + rows] = scores.argmax(1).masked_fill(~scores.isfinite().all(1), -1)
    return predicted


def recognition(
    predicted: Tensor, labels: Tensor, classes: Sequence[str], attributes: Attributes | None = None
) -> dict[str, float | None]:
    """Accuracy of predicted classes.

    Args:
        predicted: [R] int64, from `classify`.
        labels: [R] int64, the true class; -1 where the region's phrase is not among the classes: left out.
        classes: C phrases.
        attributes: phrase -> attribute -> value. The predicted phrase's value is compared with the true phrase's,
            over the regions whose true phrase has the attribute.

    Returns:
        recognition_top1 (over regions), recognition_mean_class (mean over the classes present), and
        recognition_<attribute> for each attribute of `attributes`; shares in [0, 1], None where there is nothing to
        count.
    """
    known = labels >= 0
    predicted, labels = predicted[known], labels[known]
    right = (predicted == labels).double()
    present = torch.bincount(labels, minlength=len(classes))
    right_of_class = torch.bincount(labels, weights=right, minlength=len(classes))
    metrics = {
        "recognition_top1": mean(right),
        "recognition_mean_class": mean(right_of_class[present > 0] / present[present > 0]),
    }
    for name in attribute_names(attributes):
        values = [(attributes or {}).get(phrase, {}).get(name) for phrase in classes]
        codes = {value: code for code, value in enumerate(dict.fromkeys(values)) if value is not None}
        # The last place answers for the prediction -1: no value, so never the true one.
        code_of_class = torch.tensor([codes.get(value, -1) for value in values] + [-1], device=labels.device)
        true, guess = code_of_class[labels], code_of_class[predicted]
        metrics[f"recognition_{name}"] = mean((true == guess)[true >= 0].double())
    return metrics


def region_text_retrieval(
    region_features: Tensor, phrase_features: Tensor, phrase_index: Tensor
) -> dict[str, float | None]:
    """Recall at 1 and 10 both ways over all regions of the split and their texts.

    The gallery of a region is the texts of all regions, equal texts as often as they occur; each region's text is a
    query for its region. Regions with identical phrases are right answers for one another, in both ways. Ties count
    against the query (`ranking`).

    Args:
        region_features: [R, E].
        phrase_features: [U, E], one row for each distinct phrase; rows that no region has are neither asked nor found.
        phrase_index: [R] int64, the phrase of each region.

    Returns:
        r2t_r1, r2t_r10, t2r_r1, t2r_r10 as shares in [0, 1]; None without regions.
    """
    names = [f"{way}_r{k}" for way in ("r2t", "t2r") for k in DEPTHS]
    if len(region_features) == 0:
        return dict.fromkeys(names)
    regions = torch.arange(len(region_features), device=phrase_index.device)
    counts = torch.bincount(phrase_index, minlength=len(phrase_features))
    r2t = match_ranks(region_features, phrase_features, regions, phrase_index, counts)
    t2r = match_ranks(phrase_features, region_features, phrase_index, regions)
    return {f"r2t_r{k}": recall_at(r2t, k) for k in DEPTHS} | {f"t2r_r{k}": recall_at(t2r, k, counts) for k in DEPTHS}


def attribute_names(attributes: Attributes | None) -> list[str]:
    """Names of all attributes, in order of first appearance."""
    return list(dict.fromkeys(name for values in (attributes or {}).values() for name in values))


def mean(values: Tensor) -> float | None:
    """Mean as a float; None of nothing."""
    return float(values.mean()) if len(values) else None
