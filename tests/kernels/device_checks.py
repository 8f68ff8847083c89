"""Every operation that has Triton kernels, through its public loss, and checks of them on any device and back end.

compute-sanitizer --tool memcheck python -m tests.kernels.device_checks info_nce      # a few odd sizes on a GPU
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.localize.boxes import patches_in_boxes
from cllip_fast.losses import ClipLoss, PatchLocalizationLoss, PatchTextLoss, RegionTextLoss, SigLipLoss
from tests import dense

SIZES = [(1, 8), (17, 33), (123, 96), (507, 512)]
"""Rows (texts, for the losses on patches) and D, below and beyond a tile."""
PATCHES = (3, 5)
"""Grid of an image's patches."""


def patch_text(patches: Tensor, texts: Tensor, scale: Tensor, pool: str, temperature: float = 0.1) -> Tensor:
    """`dense_local.patch_text` without masks, vectorised; patches [B, P, D], texts [B, T, D]."""
    scores = torch.einsum("ipd,jd->ipj", patches, texts.flatten(0, 1))
    pooled = scores.amax(1) if pool == "max" else (torch.softmax(scores / temperature, 1) * scores).sum(1)
    logits, images = scale * pooled, torch.arange(len(patches), device=patches.device)
    owner = images.repeat_interleave(texts.shape[1])
    positive = logits.gather(0, owner[None])[0]
    negatives = logits.masked_fill(owner == images[:, None], float("-inf"))
    losses = F.softplus(negatives.logsumexp(0) - positive) + F.softplus(negatives.logsumexp(1)[owner] - positive)
    return losses.mean() / 2


def localization(patches: Tensor, texts: Tensor, scale: Tensor, boxes: Tensor, others: bool) -> Tensor:
    """`dense_local.localization` without masks, vectorised; boxes [B, T, 4]."""
    logits = scale * torch.einsum("btd,ipd->btip", texts, patches)
    own = torch.eye(len(patches), dtype=torch.bool, device=patches.device)[:, None, :, None]
    right = patches_in_boxes(boxes, PATCHES)[:, :, None] & own
    among = logits if others else logits.masked_fill(~own, float("-inf"))
    picked = logits.masked_fill(~right, float("-inf"))
    return (among.flatten(2).logsumexp(2) - picked.flatten(2).logsumexp(2)).mean()


def local_features(count: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """About `count` texts, three an image: patches [B, P, D], texts [B, T, D], boxes [B, T, 4]."""
    each = 3 if count > 1 else 1
    images = -(-count // each)
    number = PATCHES[0] * PATCHES[1]
    patches = dense.features(images * number, width, dtype, seed=1)[0].view(images, number, width)
    texts = dense.features(images * each, width, dtype, seed=2)[0].view(images, each, width)
    generator = torch.Generator().manual_seed(count)
    return patches, texts, torch.rand(images, each, 2, 2, generator=generator).sort(2).values.flatten(2)


@dataclass(frozen=True)
class Problem:
    """Differentiable inputs, the last ones scalars, and what maps them to the loss."""

    inputs: list[Tensor]
    ours: Callable[..., Tensor]
    dense: Callable[..., Tensor]


def clip(count: int, width: int, scale: float, dtype: torch.dtype, device: str, backend: str) -> Problem:
    inputs = [*dense.features(count, width, dtype), torch.tensor(scale)]
    return Problem([each.to(device) for each in inputs], ClipLoss(backend=backend), dense.clip)


def region(count: int, width: int, scale: float, dtype: torch.dtype, device: str, backend: str) -> Problem:
    """With padding, ids and texts that are nearly the same."""
    regions, texts = dense.features(count, width, dtype)
    texts[count - count // 3 :] = texts[: count // 3].clone()
    index = torch.arange(count, device=device)
    masks = index % 7 != 3, index % (count // 2 + 1)
    loss = RegionTextLoss(filter_threshold=0.9, backend=backend)
    return Problem(
        [each.to(device) for each in (regions, texts, torch.tensor(scale))],
        lambda *each: loss(*each, *masks),
        lambda *each: dense.region(*each, *masks, 0.9),
    )


def siglip(count: int, width: int, scale: float, dtype: torch.dtype, device: str, backend: str) -> Problem:
    inputs = [*dense.features(count, width, dtype), torch.tensor(scale), torch.tensor(-5.0)]
    return Problem([each.to(device) for each in inputs], SigLipLoss(backend=backend), dense.siglip)


def pooled(pool: str, count: int, width: int, scale: float, dtype: torch.dtype, device: str, backend: str) -> Problem:
    patches, texts, _ = local_features(count, width, dtype)
    loss = PatchTextLoss(pool=pool, pool_temperature=0.1, backend=backend)
    inputs = [each.to(device) for each in (patches, texts, torch.tensor(scale))]
    return Problem(inputs, loss, partial(patch_text, pool=pool))


def located(
    others: bool, count: int, width: int, scale: float, dtype: torch.dtype, device: str, backend: str
) -> Problem:
    patches, texts, boxes = (each.to(device) for each in local_features(count, width, dtype))
    loss = PatchLocalizationLoss(other_images=others, backend=backend)
    return Problem(
        [patches, texts, torch.tensor(scale, device=device)],
        lambda patches, texts, scale: loss(patches, texts, boxes, scale, patch_grid=PATCHES),
        lambda patches, texts, scale: localization(patches, texts, scale, boxes, others),
    )


OPERATIONS: dict[str, Callable[..., Problem]] = {
    "info_nce": clip,
    "info_nce filtered": region,
    "sigmoid": siglip,
    "patch_text max": partial(pooled, "max"),
    "patch_text softmax": partial(pooled, "softmax"),
    "localize": partial(located, False),
    "localize others": partial(located, True),
}


def value_and_gradients(problem: Problem) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in problem.inputs]
    value = problem.ours(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def check_error_rule(operation: str, scale: float, dtype: torch.dtype, device: str, backend: str) -> None:
    """Value and every gradient as good as plain PyTorch's in the same type, see `dense.assert_as_good_as_dense`."""
    for count, width in SIZES:
        problem = OPERATIONS[operation](count, width, scale, dtype, device, backend)
        dense.assert_as_good_as_dense(problem.ours, problem.dense, problem.inputs)


def check_each_gradient_alone(operation: str, dtype: torch.dtype, device: str, backend: str) -> None:
    """What is computed for one argument does not depend on which others want a gradient."""
    problem = OPERATIONS[operation](123, 64, 20.0, dtype, device, backend)
    _, *together = value_and_gradients(problem)
    for place, expected in enumerate(together):
        inputs = [each.detach().requires_grad_(index == place) for index, each in enumerate(problem.inputs)]
        (alone,) = torch.autograd.grad(problem.ours(*inputs), [inputs[place]])
        torch.testing.assert_close(alone, expected, msg=lambda text, place=place: f"argument {place}: {text}")


def check_in_a_graph(operation: str, dtype: torch.dtype, backend: str) -> None:
    """Forward and backward captured in one CUDA graph; replayed with inputs that it has not seen."""
    problem = OPERATIONS[operation](123, 64, 20.0, dtype, "cuda", backend)
    static = Problem([each.clone() for each in problem.inputs], problem.ours, problem.dense)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and lets libraries allocate
            value_and_gradients(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(static)
    for sign in (1, -1):
        for index, (place, each) in enumerate(zip(static.inputs, problem.inputs, strict=True)):
            place.copy_(each.roll(sign * (index + 1), 0) if each.dim() else each * (1 + sign / 4))
        graph.replay()
        torch.testing.assert_close(captured, value_and_gradients(static))


def check_on_a_side_stream(operation: str, dtype: torch.dtype, backend: str) -> None:
    """Inputs arrive late on the stream of the call: a kernel on another stream would read what was there before."""
    problem = OPERATIONS[operation](123, 64, 20.0, dtype, "cuda", backend)
    expected = value_and_gradients(problem)  # compiles
    late = Problem([torch.zeros_like(each) for each in problem.inputs], problem.ours, problem.dense)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        for place, each in zip(late.inputs, problem.inputs, strict=True):
            place.copy_(each)
        found = value_and_gradients(late)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, expected)


def large_features(count: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """[count, width], about unit norm, made piece by piece."""
    features = torch.empty(count, width, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(count)
    for piece in features.split(2**16):
        piece.normal_(std=width**-0.5, generator=generator)
    return features


def info_nce_of(kernel: ModuleType, rows: Tensor, columns: Tensor, scale: Tensor, block: Block) -> list[Tensor]:
    """Log-sum-exps and gradients of the last rows, and of all columns."""
    space = Workspace(len(rows), len(columns), scale)
    statistics = kernel.RowStatistics.start(len(rows), scale)
    sums = kernel.forward_block(rows, columns, scale, block, statistics, space)
    lse = [maximum + total.log() for maximum, total in ((statistics.maximum, statistics.total), sums)]
    values = [torch.stack([each, torch.ones_like(each), torch.ones_like(each)]) for each in lse]
    d_rows, d_columns = (torch.zeros(each.shape, device=each.device) for each in (rows, columns))
    kernel.backward_block(rows, columns, scale, block, *values, d_rows, d_columns, space, reference=None)
    return [lse[0][-99:], lse[1], statistics.positive[-99:], d_rows[-99:].clone(), d_columns]


def sigmoid_of(kernel: ModuleType, rows: Tensor, columns: Tensor, scale: Tensor, block: Block) -> list[Tensor]:
    d_rows, d_columns = (torch.zeros(each.shape, device=each.device) for each in (rows, columns))
    d_bias, bias, space = torch.zeros_like(scale), torch.zeros_like(scale), Workspace(len(rows), len(columns), scale)
    loss = kernel.backward_block(rows, columns, scale, bias, block, d_rows, d_columns, d_bias, space)
    return [loss, d_rows[-99:].clone(), d_columns, d_bias]


def check_block_border(
    run: Callable[..., list[Tensor]], kernel: ModuleType, plain: ModuleType, count: int, width: int, device: str
) -> None:
    """rows [count, width] and their gradient against few columns; the positives are the last rows'."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows, columns = large_features(count, width, dtype, device), large_features(40, width, dtype, device)
    inputs = rows, columns, torch.tensor(10.0, device=device), Block((count - 40, 0, 40))
    found, expected = run(kernel, *inputs), run(plain, *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()  # both round the gradient tile to bf16


def check_patch_border(operation: str, images: int, width: int, device: str, backend: str) -> None:
    """Patches [images, P, D] of which the last ones count: value, gradients of the last image and of the texts.

    The reference is plain PyTorch on slices: all images but the last few have no text; on patches, they are negatives.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    number = PATCHES[0] * PATCHES[1]
    patches = large_features(images * number, width, dtype, device).view(images, number, width).requires_grad_()
    texts = large_features(images, width, dtype, device)[:, None].requires_grad_()
    mask = (torch.arange(images, device=device) >= images - 5)[:, None]
    boxes = torch.tensor([0.1, 0.0, 0.5, 1.0], device=device).expand(images, 1, 4)
    scale = torch.tensor(10.0, device=device)
    results = []
    for each in (backend, "torch"):
        if operation == "localize":
            loss = PatchLocalizationLoss(backend=each)(patches, texts, boxes, scale, mask, PATCHES)
        else:
            loss = PatchTextLoss(pool=operation.removeprefix("patch_text "), backend=each)(patches, texts, scale, mask)
        d_patches, d_texts = torch.autograd.grad(loss, [patches, texts])
        results.append([loss.detach(), d_patches[-9:].clone().float(), d_texts[-9:].float()])
        del d_patches, d_texts
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()
        assert ours.any()


def main() -> None:
    """Forward and backward of one operation in every type, for a tool that watches memory."""
    (name,) = sys.argv[1:]
    for operation in (each for each in OPERATIONS if each.split()[0] == name):
        for dtype in (torch.bfloat16, torch.float32):
            for count, width in SIZES[1:3]:
                value_and_gradients(OPERATIONS[operation](count, width, 20.0, dtype, "cuda", "triton"))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
