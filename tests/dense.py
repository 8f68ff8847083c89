"""Dense references of the losses: the whole matrix, plain autograd, meant for fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def clip(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Mean of row and column cross-entropies; images, texts [N, D]."""
    logits = scale * images @ texts.t()
    labels = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum of pairwise sigmoid losses / N."""
    logits = scale * images @ texts.t()
    if bias is not None:
        logits = logits + bias
    signs = 2 * torch.eye(len(images), dtype=images.dtype, device=images.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


def region(
    regions: Tensor,
    texts: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Symmetric InfoNCE over the valid rows of [R, D] with excluded pairs; 0 if there is none."""
    keep = torch.ones(len(regions), dtype=torch.bool, device=regions.device) if mask is None else mask
    regions, texts = regions[keep], texts[keep]
    if not len(regions):
        return (regions.sum() + texts.sum() + scale.sum()) * 0
    excluded = torch.zeros(len(regions), len(regions), dtype=torch.bool, device=regions.device)
    if threshold is not None:
        unit = F.normalize(texts.detach(), dim=1)
        excluded |= unit @ unit.t() > threshold
    if ids is not None:
        excluded |= ids[keep][:, None] == ids[keep]
    excluded.fill_diagonal_(False)
    logits = (scale * regions @ texts.t()).masked_fill(excluded, float("-inf"))
    labels = torch.arange(len(regions), device=regions.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def distill(
    images: Tensor, texts: Tensor, scale: Tensor, dist_images: Tensor, dist_texts: Tensor, dist_scale: Tensor
) -> Tensor:
    """Cross-entropy of the student's rows and columns against the teacher's softmax."""
    logits, teacher = scale * images @ texts.t(), dist_scale * dist_images @ dist_texts.t()
    rows = -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    columns = -(teacher.softmax(0) * logits.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


def value_and_gradients(
    loss: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """loss(*inputs) and its gradients for every floating-point input, from fresh leaves."""
    leaves = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in inputs]
    value = loss(*leaves)
    grads = torch.autograd.grad(value * upstream, [each for each in leaves if each.requires_grad])
    return value.detach(), list(grads)


def features(rows: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two unit-norm random [rows, width], made in fp64 so that every type sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, rows, width, dtype=torch.float64, generator=generator)
    first, second = F.normalize(pair, dim=-1).to(dtype).unbind()
    return first, second


def assert_as_good_as_dense(
    ours: Callable[..., Tensor], dense: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> None:
    """Error against fp64 at most 2× (gradients 3×) that of the dense form in the inputs' type, plus a few roundings.

    Args:
        ours, dense: functions of the inputs.
        inputs: tensors of the type under test; the reference sees the same numbers in fp64.
    """
    exact, exact_grads = value_and_gradients(dense, [each.double() for each in inputs])
    value, grads = value_and_gradients(ours, inputs)
    plain, plain_grads = value_and_gradients(dense, inputs)
    scale = max(1.0, *(each.abs().max().item() for each in inputs if each.numel() == 1))
    eps = torch.finfo(torch.float32).eps
    allowed = 2 * (plain - exact).abs().item() + 4 * eps * max(1.0, exact.abs().item())
    assert (value - exact).abs().item() <= allowed, (value, plain, exact)
    for each, grad, plain_grad, exact_grad in zip(inputs, grads, plain_grads, exact_grads, strict=True):
        assert grad.dtype == each.dtype
        assert grad.shape == each.shape
        # A gradient is a sum of terms of size scale / rows, as exact as a score's exponential, which may cancel.
        rounding = eps * max(4.0, scale) * max(scale / len(inputs[0]), exact_grad.abs().max().item())
        allowed = 3 * (plain_grad - exact_grad).abs().max().item() + rounding
        assert (grad - exact_grad).abs().max().item() <= allowed
