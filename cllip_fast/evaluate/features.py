"""One pass over a split: every image is encoded once, and what the metrics need of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cllip_fast.data.batch import Batch
from cllip_fast.errors import InputError
from cllip_fast.evaluate.grounding import best_iou
from cllip_fast.evaluate.pointing import hits, peak_points
from cllip_fast.evaluate.texts import TextBook
from cllip_fast.losses.boxes import box_iou
from cllip_fast.models.cllip import CllipModel

TILE = (16, 8)  # images, and prompts of each, that a model is asked at a time


@dataclass
class SplitFeatures:
    """N images, R regions, Q phrases asked of images; all on the CPU, features fp32 and of unit length.

    Attributes:
        image_features: [N, E].
        caption_image, caption_text: [K] int64, one pair for each caption of each image; numbers of `captions`.
        region_features: [R, E], from ground-truth boxes.
        region_phrase: [R] int64, numbers of `phrases`.
        iou: [Q], of the box predicted for a phrase with the best of its boxes; None for a model that cannot ground.
        own_iou: [R], of the box predicted for a region's phrase with the region's own box; None likewise.
        hit: [Q] bool, whether the phrase's text-patch map peaks on its object.
    """

    image_features: Tensor
    caption_image: Tensor
    caption_text: Tensor
    region_features: Tensor
    region_phrase: Tensor
    iou: Tensor | None
    own_iou: Tensor | None
    hit: Tensor


def phrase_queries(region_phrase: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct phrases of each image: what grounding and pointing ask for.

    Args:
        region_phrase: [R] int64, the phrase number of each real region, image by image.
        region_mask: [B, M] bool, R of them True.

    Returns:
        query_image [Q], query_phrase [Q], and for each region its query [R]; all int64, queries ordered by image.
    """
    region_image = region_mask.nonzero()[:, 0]
    pairs, query_of_region = torch.stack([region_image, region_phrase], 1).unique(dim=0, return_inverse=True)
    return pairs[:, 0], pairs[:, 1], query_of_region


def place_in_image(image: Tensor, images: int) -> tuple[Tensor, int]:
    """Queries [Q], each with the number of its image (ascending), as rows of a [images, K] table.

    Returns:
        the column [Q] of each query, counted from 0 within its image, and K, the most queries that an image has.
    """
    counts = torch.bincount(image, minlength=images)
    first = counts.cumsum(0) - counts
    return torch.arange(len(image), device=image.device) - first[image], int(counts.max())


@torch.no_grad()
def collect(
    model: CllipModel,
    batches: Iterable[Batch],
    captions: TextBook,
    phrases: TextBook,
    *,
    device: torch.device,
    progress: bool = True,
) -> SplitFeatures:
    """Encode a split. `captions` and `phrases` number its texts, and may hold texts (class names) already.

    Raises:
        InputError: a batch whose phrases and region mask disagree.
    """
    can_ground, grid = model.prompter is not None, model.config.patch_grid
    image_features, caption_image, caption_text = [], [], []
    region_features, region_phrase, iou, own_iou, hit = [], [], [], [], []
    seen = 0
    for batch in tqdm(batches, desc="evaluate", unit="batch", leave=False, disable=None if progress else True):
        batch = batch.to(device, non_blocking=True)
        tokens = model.image_tokens(batch.images)
        image_features.append(unit(model.pool_image(tokens)).cpu())
        for texts in batch.captions:
            caption_text.append(captions.number(texts))
            caption_image.append(torch.full((len(texts),), seen))
            seen += 1
        numbers = phrases.number(phrase for texts in batch.phrases for phrase in texts)
        mask = batch.region_mask
        if len(numbers) != int(mask.sum()):
            raise InputError(f"batch.phrases holds {len(numbers)} texts, expected {int(mask.sum())}, as in region_mask")
        if len(numbers) == 0:
            continue
        region_phrase.append(numbers)
        region_features.append(unit(prompted(model.encode_regions, tokens, batch.boxes, mask)).cpu())

        boxes = batch.boxes[mask].float()
        image, phrase, query = phrase_queries(numbers.to(device), mask)
        column, columns = place_in_image(image, len(batch))
        texts = phrases.features()
        asked = texts.new_zeros(len(batch), columns, texts.shape[1])
        asked[image, column] = texts[phrase]
        is_asked = torch.zeros(asked.shape[:2], dtype=torch.bool, device=device)
        is_asked[image, column] = True
        patches = unit(model.encode_patches(tokens))
        with torch.autocast(device.type, enabled=False):
            maps = asked @ patches.mT  # [B, columns, P]
        hit.append(hits(peak_points(maps[image, column], grid), boxes, query).cpu())
        if can_ground:
            predicted = prompted(model.ground, tokens, asked, is_asked)
            iou.append(best_iou(predicted, boxes, query).cpu())
            own_iou.append(box_iou(predicted[query], boxes).nan_to_num(0.0).cpu())

    return SplitFeatures(
        image_features=_joined(image_features, torch.empty(0, 0)),
        caption_image=_joined(caption_image, torch.empty(0, dtype=torch.int64)),
        caption_text=_joined(caption_text, torch.empty(0, dtype=torch.int64)),
        region_features=_joined(region_features, torch.empty(0, 0)),
        region_phrase=_joined(region_phrase, torch.empty(0, dtype=torch.int64)),
        iou=_joined(iou, torch.empty(0)) if can_ground else None,
        own_iou=_joined(own_iou, torch.empty(0)) if can_ground else None,
        hit=_joined(hit, torch.empty(0, dtype=torch.bool)),
    )


def prompted(encode: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, prompts: Tensor, mask: Tensor) -> Tensor:
    """A model's answers to the prompts of images: `encode(tokens, prompts)` of those in the mask, tile by tile.

    To the paper's Prompter each prompt is a sequence as long as the image, 5 MiB at ViT-B/16: all of a batch at once,
    for each image as many as the fullest has, would take 20 GiB for 64 images of COCO, most of it for padding.

    Args:
        encode: the model's `encode_regions` or `ground`.
        tokens: [B, T, W], of the images.
        prompts: [B, M, ·], boxes or text features.
        mask: [B, M] bool, which of them are real.

    Returns:
        [R, ·] fp32, image by image; [0, 0] without prompts.
    """
    answers = tokens.new_zeros(*mask.shape, 0, dtype=torch.float32)
    for first in range(0, mask.shape[1], TILE[1]):
        part = slice(first, first + TILE[1])
        for rows in mask[:, part].any(1).nonzero()[:, 0].split(TILE[0]):
            found = encode(tokens[rows], prompts[rows, part])
            if not answers.shape[2]:
                answers = answers.new_zeros(*mask.shape, found.shape[2])
            answers[rows, part] = found.float()
    return answers[mask]


def unit(features: Tensor) -> Tensor:
    """Features as fp32 rows of unit length."""
    return F.normalize(features.float(), dim=-1)


def _joined(parts: list[Tensor], nothing: Tensor) -> Tensor:
    return torch.cat(parts) if parts else nothing
