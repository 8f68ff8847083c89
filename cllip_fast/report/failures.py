"""What went worst in a sample of a split: images, regions and phrases sorted by loss, and what was said instead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.losses.boxes import box_iou
from cllip_fast.losses.grounding import GroundingLoss
from cllip_fast.report.sample import Sample


@dataclass(frozen=True)
class ImageFailure:
    """An image and its caption.

    Attributes:
        image: its number in the sample.
        loss: the mean of its row's and its column's cross-entropy among the sample.
        caption, cosine: its own.
        rank: of its own caption among the sample's; other captions that score the same stand before it.
        said, said_cosine: the other caption that scores highest with it; None where there is no other.
    """

    image: int
    loss: float
    caption: str
    cosine: float
    rank: int
    said: str | None
    said_cosine: float | None


@dataclass(frozen=True)
class RegionFailure:
    """A region and its phrase.

    Attributes:
        image: number in the sample.
        box: [4].
        loss: cross-entropy of the region's phrase among the distinct phrases of the sample.
        phrase, cosine: its own.
        said, said_cosine: the other phrase that scores highest; None where there is no other.
    """

    image: int
    box: Tensor
    loss: float
    phrase: str
    cosine: float
    said: str | None
    said_cosine: float | None


@dataclass(frozen=True)
class BoxFailure:
    """A phrase asked of an image.

    Attributes:
        image: number in the sample.
        phrase: what was asked.
        boxes: [n, 4], the true ones.
        predicted: [4].
        loss, iou: of the prediction with the true box that it fits best: lowest loss, highest IoU.
    """

    image: int
    phrase: str
    boxes: Tensor
    predicted: Tensor
    loss: float
    iou: float


def worst_images(sample: Sample, scale: float) -> list[ImageFailure]:
    """All images that have a caption, the highest loss first. The mean of the losses is `ClipLoss` of the sample.

    Args:
        scale: factor on cosines, `logit_scale` exponentiated.
    """
    if not sample.captions:
        return []
    cosines = sample.image_features[sample.caption_image] @ sample.caption_features.T  # [C, C]
    losses = contrastive_losses(scale * cosines)
    number = {caption: k for k, caption in enumerate(dict.fromkeys(sample.captions))}
    labels = torch.tensor([number[caption] for caption in sample.captions])
    failures = []
    for k in losses.argsort(descending=True, stable=True).tolist():
        own, others = float(cosines[k, k]), cosines[k].masked_fill(labels == labels[k], -torch.inf)
        said, said_cosine = _best(others, sample.captions)
        rank = 1 + int(torch.unique(labels[(labels != labels[k]) & ~(others < own)]).numel())
        failures.append(
            ImageFailure(
                int(sample.caption_image[k]), float(losses[k]), sample.captions[k], own, rank, said, said_cosine
            )
        )
    return failures


def contrastive_losses(logits: Tensor) -> Tensor:
    """Scores [N, N] to [N], the mean of row's and column's cross-entropy, the diagonal being right."""
    own = logits.diagonal()
    return (logits.logsumexp(1) + logits.logsumexp(0)) / 2 - own


def worst_regions(sample: Sample, scale: float) -> list[RegionFailure]:
    """All regions, the highest loss first; `scale` as for `worst_images`, of the local losses."""
    if not len(sample.region_phrase):
        return []
    cosines = sample.region_features @ sample.phrase_features.T  # [R, U]
    losses = F.cross_entropy(scale * cosines, sample.region_phrase, reduction="none")
    failures = []
    for k in losses.argsort(descending=True, stable=True).tolist():
        own = int(sample.region_phrase[k])
        others = cosines[k].clone()
        others[own] = -torch.inf
        said, said_cosine = _best(others, sample.phrases)
        failures.append(
            RegionFailure(
                int(sample.region_image[k]),
                sample.boxes[k],
                float(losses[k]),
                sample.phrases[own],
                float(cosines[k, own]),
                said,
                said_cosine,
            )
        )
    return failures


def worst_boxes(sample: Sample, kind: str) -> list[BoxFailure]:
    """All phrases asked, the highest loss first.

    Args:
        kind: of the box loss, as for `GroundingLoss`.
    """
    if sample.predicted is None:
        return []
    loss = GroundingLoss(kind=kind)
    failures = []
    for (image, phrase), predicted in zip(sample.asked.tolist(), sample.predicted, strict=True):
        boxes = sample.boxes_of(image, phrase)
        losses, ious = loss.elementwise(predicted.expand_as(boxes), boxes), box_iou(predicted, boxes)
        failures.append(
            BoxFailure(image, sample.phrases[phrase], boxes, predicted, float(losses.min()), float(ious.max()))
        )
    order = torch.tensor([failure.loss for failure in failures]).argsort(descending=True, stable=True)
    return [failures[k] for k in order.tolist()]


def _best(scores: Tensor, texts: list[str]) -> tuple[str | None, float | None]:
    """The text with the highest score and the score; None where all are -inf, so out of the question."""
    best = int(scores.argmax())
    return (None, None) if scores[best] == -torch.inf else (texts[best], float(scores[best]))
