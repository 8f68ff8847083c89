"""Pooling of patch–text scores and its backward, plain PyTorch: the specification. The maths is in `__init__.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from cllip_fast.kernels.patch_text.contrast import Pairs, finite, log_sums, pooled_gradient
from cllip_fast.kernels.patch_text.tiling import ScoreBuffer, tile_elements, tile_spans
from cllip_fast.kernels.products import accumulate, accumulation_dtype, operand

__all__ = ["forward_block", "pool_backward", "pool_scores", "pooled_gradient", "saved_dtype"]


def saved_dtype(pool: str, patches: Tensor) -> torch.dtype:
    """Type of what `pool_scores` keeps beside the pooled scores."""
    if pool == "softmax":
        return accumulation_dtype(patches.dtype)
    return torch.uint8 if patches.shape[1] < 2**8 else torch.int16 if patches.shape[1] < 2**15 else torch.int32


def forward_block(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    pool: str,
    temperature: float,
    scale: Tensor,
    pairs: Pairs,
    pooled: Tensor,
    saved: Tensor,
    positive: Tensor,
) -> tuple[Tensor, Tensor]:
    """`pool_scores`, then `contrast.log_sums`."""
    pool_scores(patches, texts, patch_mask, pool, temperature, pooled, saved)
    return log_sums(pooled, texts, patch_mask, scale, pairs, positive)


def pool_scores(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    pool: str,
    temperature: float,
    pooled: Tensor,
    saved: Tensor,
) -> None:
    """Fill `pooled` [B, t] with S_ij and `saved` [B, t] with what backward needs.

    Among equal best patches the first one wins, on every device.

    Args:
        patches: [B, P, D].
        texts: [t, D] in the products' type.
        patch_mask: [B, P] bool, False for padded patches (an image must have a real one to give a meaningful number).
        pool: "max": `saved` holds P − (best patch). "softmax": `saved` holds log Σ_p e^{s/τ}.
        temperature: τ, of "softmax".
        pooled: in the accumulation type.
        saved: of type `saved_dtype`.
    """
    count = patches.shape[1]
    buffer = ScoreBuffer(pooled.dtype)
    # The best patch as the largest of P − p: reductions with an index are ten times slower than those without.
    order = torch.arange(count, 0, -1, device=patches.device).to(saved.dtype)[:, None]
    for images, columns in tile_spans(*patches.shape[:2], texts.shape[0], patches.is_cuda):
        tile = buffer.scores(operand(patches[images]), texts[columns])
        if patch_mask is not None:
            padded = ~patch_mask[images, :, None]
            tile.masked_fill_(padded, float("-inf"))
        top = tile.amax(1)
        if pool == "max":
            best = tile == top[:, None]
            best = best.view(torch.uint8) if saved.dtype == torch.uint8 else best.to(saved.dtype)
            pooled[images, columns] = top
            saved[images, columns] = best.mul_(order).amax(1)
        else:
            weights = tile.sub(top[:, None]).div_(temperature).exp_()
            if patch_mask is not None:
                weights.masked_fill_(padded, 0)
                tile.masked_fill_(padded, 0)
            total = weights.sum(1)
            pooled[images, columns] = tile.mul_(weights).sum(1).div_(total)
            saved[images, columns] = total.log_().add_(top / temperature)


def pool_backward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    pool: str,
    temperature: float,
    pooled: Tensor,
    saved: Tensor,
    gradient: Tensor,
    d_patches: Tensor,
    d_texts: Tensor,
) -> None:
    """Add the gradients of Σ gradient · pooled to `d_patches` [B, P, D] and `d_texts` [t, D] (accumulation type).

    An accumulator with 0 elements is not wanted and skipped. `pooled` may be `NO_PAIR` where `gradient` is 0.
    """
    if pool == "max":
        _max_backward(patches, texts, saved, gradient, d_patches, d_texts)
    else:
        _softmax_backward(patches, texts, patch_mask, temperature, pooled, saved, gradient, d_patches, d_texts)


def _max_backward(
    patches: Tensor, texts: Tensor, saved: Tensor, gradient: Tensor, d_patches: Tensor, d_texts: Tensor
) -> None:
    """Each text's gradient goes to one patch of each image: sums of gathered rows, B·t of them instead of B·P·t."""
    count = patches.shape[1]
    texts = texts.to(gradient.dtype)
    best = count - saved.long()
    best.clamp_(max=count - 1)  # NaN scores equal no maximum; their gradient is NaN wherever it goes
    each_patch = torch.arange(count, device=best.device)
    height = max(1, tile_elements(patches.is_cuda) // (count * patches.shape[2]))
    for start in range(0, patches.shape[0], height):
        images = slice(start, min(start + height, patches.shape[0]))
        chosen, weights = best[images], gradient[images]
        number, columns = chosen.shape
        each_image = torch.arange(number, device=best.device)[:, None]
        if d_patches.numel():
            chosen_sorted, order = torch.sort(chosen, dim=1, stable=True)
            first = torch.searchsorted(chosen_sorted, each_patch.expand(number, count).contiguous())
            sums = _sum_rows(texts, order, first.add_(each_image * columns), weights.gather(1, order))
            d_patches[images] += sums.view(number, count, -1)
        if d_texts.numel():
            rows = (chosen + each_image * count).t()
            first = torch.arange(columns, device=best.device) * number
            d_texts += _sum_rows(patches[images].flatten(0, 1).to(gradient.dtype), rows, first, weights.t())


def _sum_rows(table: Tensor, rows: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of `table`, in order: sum k runs over entries first[k] … first[k + 1] of the flat lists."""
    return torch.embedding_bag(table, rows.flatten(), first.flatten(), mode=0, per_sample_weights=weights.flatten())[0]


def _softmax_backward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    temperature: float,
    pooled: Tensor,
    saved: Tensor,
    gradient: Tensor,
    d_patches: Tensor,
    d_texts: Tensor,
) -> None:
    buffer = ScoreBuffer(pooled.dtype)
    pooled = finite(pooled)
    for images, columns in tile_spans(*patches.shape[:2], texts.shape[0], patches.is_cuda):
        rows = operand(patches[images])
        tile = buffer.scores(rows, texts[columns])
        weights = torch.div(tile, temperature).sub_(saved[images, None, columns]).exp_()
        tile.sub_(pooled[images, None, columns]).div_(temperature).add_(1)
        tile.mul_(weights).mul_(gradient[images, None, columns])
        if patch_mask is not None:
            tile.masked_fill_(~patch_mask[images, :, None], 0)
        flat = tile.flatten(0, 1)
        if d_patches.numel():
            accumulate(d_patches[images].view(flat.shape[0], -1), flat, texts[columns])
        if d_texts.numel():
            accumulate(d_texts[columns], flat.t(), rows.flatten(0, 1))
