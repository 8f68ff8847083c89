"""Dense references of the local losses: every score stored, loops over pairs where that is clearest. Plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

NONE = float("-inf")


def pooled_scores(
    patches: Tensor, texts: Tensor, pool: str, temperature: float, patch_mask: Tensor | None = None
) -> Tensor:
    """S [B, B, T]: image i against text t of image b."""
    scores = torch.einsum("ipd,btd->ipbt", patches, texts)
    if patch_mask is not None:
        scores = scores.masked_fill(~patch_mask[:, :, None, None], NONE)
    if pool == "max":
        return scores.amax(1)
    weights = torch.softmax(scores / temperature, dim=1)
    return (weights * scores.masked_fill(scores == NONE, 0)).sum(1)


def patch_text(
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    mask: Tensor,
    *,
    ids: Tensor | None = None,
    patch_mask: Tensor | None = None,
    pool: str = "max",
    temperature: float = 0.1,
    threshold: float | None = None,
) -> Tensor:
    """Written from the sentence that defines it: one log-softmax over a list of scores for each text and direction."""
    logits = scale * pooled_scores(patches, texts, pool, temperature, patch_mask)
    batch, number, _ = texts.shape
    unit = torch.nn.functional.normalize(texts.detach(), dim=-1)

    def alike(image: int, other: int, text: int) -> bool:
        """Whether image `image` has a text equal or similar to text `text` of image `other`."""
        for k in range(number):
            if not mask[image, k]:
                continue
            if ids is not None and ids[image, k] == ids[other, text]:
                return True
            if threshold is not None and unit[image, k] @ unit[other, text] > threshold:
                return True
        return False

    negative = torch.zeros(batch, batch, number, dtype=torch.bool)
    for i in range(batch):
        for b in range(batch):
            for t in range(number):
                negative[i, b, t] = i != b and bool(mask[b, t]) and not alike(i, b, t)
    losses = []
    for b in range(batch):
        for t in range(number):
            if mask[b, t]:
                positive = logits[b, b, t]
                images = torch.cat([positive[None], logits[:, b, t][negative[:, b, t]]])
                others = torch.cat([positive[None], logits[b][negative[b]]])
                losses.append((images.logsumexp(0) + others.logsumexp(0)) / 2 - positive)
    return torch.stack(losses).mean() if losses else 0.0 * (patches.sum() + texts.sum() + scale)


def in_box(box: Tensor, grid: tuple[int, int]) -> Tensor:
    """[P] bool, patch by patch."""
    rows, columns = grid
    x0, y0, x1, y1 = box.tolist()
    inside = [
        x0 <= (column + 0.5) / columns <= x1 and y0 <= (row + 0.5) / rows <= y1
        for row in range(rows)
        for column in range(columns)
    ]
    if not any(inside):
        column = min(columns - 1, int((x0 + x1) / 2 * columns))
        row = min(rows - 1, int((y0 + y1) / 2 * rows))
        inside[row * columns + column] = True
    return torch.tensor(inside)


def localization(
    patches: Tensor,
    texts: Tensor,
    boxes: Tensor,
    scale: Tensor,
    mask: Tensor,
    grid: tuple[int, int],
    *,
    other_images: bool = False,
    ids: Tensor | None = None,
    local: Tensor | None = None,
) -> Tensor:
    """`local` [B] says on which rank an image is: only images of the same rank give further wrong answers."""
    losses = []
    for b in range(texts.shape[0]):
        for t in range(texts.shape[1]):
            if not mask[b, t]:
                continue
            logits = scale * patches[b] @ texts[b, t]
            everything = [logits]
            for i in range(texts.shape[0]):
                same = ids is not None and bool((ids[i][mask[i]] == ids[b, t]).any())
                if other_images and i != b and not same and (local is None or local[i] == local[b]):
                    everything.append(scale * patches[i] @ texts[b, t])
            right = logits[in_box(boxes[b, t], grid)]
            losses.append(torch.cat(everything).logsumexp(0) - right.logsumexp(0))
    return torch.stack(losses).mean() if losses else 0.0 * (patches.sum() + texts.sum() + scale)


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Of two boxes [4] with corners in order."""
    width = torch.minimum(first[2], second[2]) - torch.maximum(first[0], second[0])
    height = torch.minimum(first[3], second[3]) - torch.maximum(first[1], second[1])
    intersection = width * height if width > 0 and height > 0 else torch.zeros_like(width)
    union = (first[2] - first[0]) * (first[3] - first[1]) + (second[2] - second[0]) * (second[3] - second[1])
    union = union - intersection
    hull = (torch.maximum(first[2], second[2]) - torch.minimum(first[0], second[0])) * (
        torch.maximum(first[3], second[3]) - torch.minimum(first[1], second[1])
    )
    return intersection / union - (hull - union) / hull
