"""Patch localization in Triton for bf16, fp16 and fp32, with the functions of `tiles.py`, which does fp64.

    forward   a program has a few texts and walks the patches of their image, or of a share of all images: a tile of
              scores [texts, patches] in registers, running (max, sum) of those in the box and of those outside; the
              shares' log-sum-exps are combined at the end
    backward  a program computes one tile of scores again and writes its gradients, in the features' type, for a piece
              of images × texts that `tile_spans` bounds; two library products consume the piece

Saved: I and O, by the engine. The box test is four comparisons of integers with a patch's place in its grid. Nothing
of the size of all scores is stored but, with the own images alone, their gradients. No atomics: the same input gives
the same bits. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllip_fast.kernels.info_nce.triton_tiles import runs
from cllip_fast.kernels.localize import tiles
from cllip_fast.kernels.localize.tiles import add_products
from cllip_fast.kernels.patch_text.tiling import tile_spans
from cllip_fast.kernels.products import accumulate, operand
from cllip_fast.kernels.triton_patches import Tile, product, rows_contiguous
from cllip_fast.kernels.tuning import LARGE, CompileCase, Table, choose

OWN, OTHERS = "own", "others"
HALF, FULL = " half", " full"
"""Kinds of tiles: an image's own texts are few; with other images all texts of the batch are worked through."""

TUNING = Table(
    "localize",
    {(0, LARGE, OWN + size): Tile(16, 32, 32, 4, 1) for size in (HALF, FULL)}
    | {(0, LARGE, OTHERS + size): Tile(32, 16, 32, 4, 1) for size in (HALF, FULL)}
    | {
        (80, LARGE, OWN + HALF): Tile(16, 128, 64, 4, 3),
        (80, LARGE, OWN + FULL): Tile(16, 64, 32, 4, 3),
        (80, LARGE, OTHERS + HALF): Tile(128, 64, 64, 8, 3),
        (80, LARGE, OTHERS + FULL): Tile(64, 64, 32, 8, 3),
        (90, LARGE, OWN + HALF): Tile(64, 64, 64, 4, 4),
        (90, LARGE, OWN + FULL): Tile(16, 64, 32, 4, 3),
        (90, LARGE, OTHERS + HALF): Tile(128, 64, 64, 8, 4),
        (90, LARGE, OTHERS + FULL): Tile(64, 64, 32, 8, 3),
        (100, LARGE, OWN + HALF): Tile(64, 64, 64, 4, 4),
        (100, LARGE, OWN + FULL): Tile(16, 64, 32, 4, 3),
        (100, LARGE, OTHERS + HALF): Tile(128, 64, 64, 8, 4),
        (100, LARGE, OTHERS + FULL): Tile(64, 64, 32, 8, 3),
    },
    {
        (80, OWN + HALF): (Tile(16, 64, 64, 4, 4), Tile(32, 64, 64, 4, 3)),
        (80, OTHERS + HALF): (Tile(64, 64, 64, 4, 3), Tile(128, 128, 32, 8, 3)),
        (90, OWN + HALF): (Tile(16, 128, 64, 4, 3), Tile(16, 64, 64, 4, 4)),
        (90, OTHERS + HALF): (Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 3)),
    },
)
"""Both kernels'. There is no small class: an image's texts are one program's already."""

PROGRAMS = 1024
"""About how many programs the forward is cut into: several for each multiprocessor of the largest devices."""


@triton.jit
def _texts(spans, start, stop, TEXTS: tl.constexpr):
    """Of this program's texts: columns, whether they exist, and their boxes."""
    column = start + tl.program_id(1) * TEXTS + tl.arange(0, TEXTS)
    real = column < stop
    span = spans + column.to(tl.int64) * 4
    x0, y0 = tl.load(span, mask=real, other=0), tl.load(span + 1, mask=real, other=0)
    x1, y1 = tl.load(span + 2, mask=real, other=0), tl.load(span + 3, mask=real, other=0)
    return column, real, x0, y0, x1, y1


@triton.jit
def _scores(
    patches, texts, image, patch, column, real, image_stride, patch_stride, text_stride, count, width,
    WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[TEXTS, PATCHES]. Texts and patches that do not exist are given the scores of some that do."""
    text = texts + tl.where(real, column, 0).to(tl.int64) * text_stride
    row = (
        patches + tl.full((), image, tl.int64) * image_stride + tl.minimum(patch, count - 1).to(tl.int64) * patch_stride
    )
    return product(text, row, width, WIDTH, EVEN)


@triton.jit
def _answers(
    excluded, image, patch, column, real, x0, y0, x1, y1, columns, count, each, across,
    OTHERS: tl.constexpr,
):  # fmt: skip
    """[TEXTS, PATCHES] bool, twice: right answers, wrong ones."""
    own = real & (column // each == image)
    x, y = (patch % across)[None, :], (patch // across)[None, :]
    right = own[:, None] & (x >= x0[:, None]) & (x <= x1[:, None]) & (y >= y0[:, None]) & (y <= y1[:, None])
    among = own
    if OTHERS:
        among |= real & (tl.load(excluded + tl.full((), image, tl.int64) * columns + column, mask=real, other=1) == 0)
    return right, among[:, None] & (patch < count)[None, :] & (right == 0)


@triton.jit
def forward_kernel(
    patches, texts, scale, spans, excluded, log_inside, log_outside,
    images, columns, count, each, across, width, image_stride, patch_stride, text_stride, images_per_program,
    OTHERS: tl.constexpr, PATCHES: tl.constexpr, TEXTS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
    if OTHERS:
        start, stop = 0, columns
        begin = share * images_per_program
        end = tl.minimum(begin + images_per_program, images)
    else:
        start, stop = share * each, share * each + each
        begin, end = share, share + 1
    column, real, x0, y0, x1, y1 = _texts(spans, start, stop, TEXTS)
    a = tl.load(scale)
    none: tl.constexpr = float("-inf")
    max_inside = tl.full((TEXTS,), none, tl.float32)
    max_outside = tl.full((TEXTS,), none, tl.float32)
    sum_inside = tl.zeros((TEXTS,), tl.float32)
    sum_outside = tl.zeros((TEXTS,), tl.float32)
    for image in range(begin, end):
        for first in range(0, count, PATCHES):
            patch = first + tl.arange(0, PATCHES)
            logits = a * _scores(
                patches, texts, image, patch, column, real, image_stride, patch_stride, text_stride, count, width,
                WIDTH, EVEN,
            )  # fmt: skip
            right, wrong = _answers(
                excluded, image, patch, column, real, x0, y0, x1, y1, columns, count, each, across, OTHERS
            )  # fmt: skip
            old_inside, old_outside = max_inside, max_outside
            max_inside = tl.maximum(max_inside, tl.max(tl.where(right, logits, none), 1))
            max_outside = tl.maximum(max_outside, tl.max(tl.where(wrong, logits, none), 1))
            # Before the first answer of a kind its maximum is -inf: any finite reference does.
            reference_inside = tl.where(max_inside == none, 0.0, max_inside)
            reference_outside = tl.where(max_outside == none, 0.0, max_outside)
            reference = tl.where(right, reference_inside[:, None], reference_outside[:, None])
            powers = tl.exp(tl.where(right | wrong, logits - reference, none))
            sum_inside *= tl.exp(old_inside - reference_inside)
            sum_outside *= tl.exp(old_outside - reference_outside)
            sum_inside += tl.sum(tl.where(right, powers, 0.0), 1)
            sum_outside += tl.sum(tl.where(wrong, powers, 0.0), 1)
    place = column
    if OTHERS:
        place = share.to(tl.int64) * columns + column
    tl.store(log_inside + place, max_inside + tl.log(sum_inside), mask=real)
    tl.store(log_outside + place, max_outside + tl.log(sum_outside), mask=real)


@triton.jit
def backward_kernel(
    patches, texts, scale, spans, excluded, log_inside, log_outside, pull, gradient, totals,
    gradient_stride, first_image, first_column, last_column, columns, count, each, across, width,
    image_stride, patch_stride, text_stride,
    OTHERS: tl.constexpr, PATCHES: tl.constexpr, TEXTS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(count, PATCHES)
    local = tl.program_id(0) // blocks
    image = first_image + local
    patch = tl.program_id(0) % blocks * PATCHES + tl.arange(0, PATCHES)
    if OTHERS:
        start, stop = first_column, last_column
    else:
        start, stop = image * each, image * each + each
    column, real, x0, y0, x1, y1 = _texts(spans, start, stop, TEXTS)
    scores = _scores(
        patches, texts, image, patch, column, real, image_stride, patch_stride, text_stride, count, width, WIDTH, EVEN
    )
    right, wrong = _answers(excluded, image, patch, column, real, x0, y0, x1, y1, columns, count, each, across, OTHERS)
    log_right = tl.load(log_inside + column, mask=real, other=0.0)[:, None]
    log_wrong = tl.load(log_outside + column, mask=real, other=0.0)[:, None]
    pulls = tl.load(pull + column, mask=real, other=0.0)[:, None]
    logits = tl.load(scale) * scores - tl.where(right, log_right, log_wrong)
    gradients = tl.where(right, -pulls, pulls) * tl.exp(tl.where(right | wrong, logits, float("-inf")))
    exists = real[:, None] & (patch < count)[None, :]
    # [B, T, P], or [texts, images · P] of a piece
    place = column.to(tl.int64) * count
    if OTHERS:
        place = (column - first_column).to(tl.int64) * gradient_stride + local * count
    tl.store(gradient + place[:, None] + patch[None, :], gradients.to(gradient.dtype.element_ty), mask=exists)
    total = tl.sum(tl.where(exists, gradients * scores, 0.0))
    tl.store(totals + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), total)


def log_sums(
    patches: Tensor, texts: Tensor, scale: Tensor, spans: Tensor, grid: tuple[int, int], excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """I and O; see `tiles.log_sums`."""
    if not runs(patches):
        return tiles.log_sums(patches, texts, scale, spans, grid, excluded)
    images, each = texts.shape[:2]
    arguments = _common(patches, texts, grid, excluded)

    def launch(tile: Tile) -> Tensor:
        """[2, shares, B, T]; the shares of the images are one where there are only the own ones."""
        blocks = triton.cdiv(each if excluded is None else images * each, tile.texts)
        images_per_program = 1 if excluded is None else max(1, images * blocks // PROGRAMS)
        shares = triton.cdiv(images, images_per_program)
        out = scale.new_empty((2, 1 if excluded is None else shares, images, each))
        if out.numel():
            forward_kernel[shares, blocks](
                scale=scale,
                spans=spans.contiguous(),
                log_inside=out[0],
                log_outside=out[1],
                images=images,
                images_per_program=images_per_program,
                **arguments,
                **_options(tile, excluded is not None, patches.shape[2]),
            )
        return out

    with torch.cuda.device_of(patches):  # Triton launches on the current device
        out = launch(_tile(patches, texts, excluded, launch))
    log_inside, log_outside = out[:, 0] if excluded is None else out.logsumexp(1)
    return log_inside, log_outside


def backward(
    patches: Tensor,
    texts: Tensor,
    scale: Tensor,
    spans: Tensor,
    grid: tuple[int, int],
    excluded: Tensor | None,
    log_inside: Tensor,
    log_outside: Tensor,
    pull: Tensor,
    d_patches: Tensor,
    d_texts: Tensor,
) -> Tensor:
    """Add the gradients, without the factor `scale`, and return Σ G s; see `tiles.backward`."""
    if not runs(patches):
        given = (patches, texts, scale, spans, grid, excluded, log_inside, log_outside, pull)
        return tiles.backward(*given, d_patches, d_texts)
    images, each = texts.shape[:2]
    arguments, tile = _common(patches, texts, grid, excluded), _tile(patches, texts, excluded)
    left, right = operand(patches), operand(texts)
    arguments |= _options(tile, excluded is not None, patches.shape[2])
    arguments |= {
        "scale": scale,
        "spans": spans.contiguous(),
        "log_inside": log_inside.contiguous(),
        "log_outside": log_outside.contiguous(),
        "pull": pull.contiguous(),
    }

    def gradients(these: slice, columns: slice, out: Tensor) -> Tensor:
        """Fill `out` [..., images · P] for some images and texts; return Σ G s."""
        blocks = (these.stop - these.start) * triton.cdiv(patches.shape[1], tile.patches)
        width = each if excluded is None else columns.stop - columns.start
        launched = blocks, triton.cdiv(width, tile.texts)
        totals = scale.new_empty(launched)
        if out.numel():
            with torch.cuda.device_of(patches):
                backward_kernel[launched](
                    gradient=out,
                    totals=totals,
                    gradient_stride=out.stride(0),
                    first_image=these.start,
                    first_column=columns.start,
                    last_column=columns.stop,
                    **arguments,
                )
        return totals.sum()

    if excluded is None:
        gradient = left.new_empty((images, each, patches.shape[1]))
        total = gradients(slice(0, images), slice(0, images * each), gradient)
        if d_patches.numel():
            add_products(d_patches, gradient.transpose(1, 2), right)
        if d_texts.numel():
            add_products(d_texts, gradient, left)
        return total
    total = scale.new_zeros(())
    right = right.flatten(0, 1)
    for these, columns in tile_spans(images, patches.shape[1], images * each, patches.is_cuda):
        rows = left[these].flatten(0, 1)
        gradient = left.new_empty((columns.stop - columns.start, rows.shape[0]))
        total += gradients(these, columns, gradient)
        if d_patches.numel():
            accumulate(d_patches[these].flatten(0, 1), gradient.t(), right[columns])
        if d_texts.numel():
            accumulate(d_texts.flatten(0, 1)[columns], gradient, rows)
    return total


def _tile(
    patches: Tensor, texts: Tensor, excluded: Tensor | None, launch: Callable[[Tile], object] | None = None
) -> Tile:
    images, each = texts.shape[:2]
    kind = (OWN if excluded is None else OTHERS) + (HALF if patches.element_size() == 2 else FULL)

    def programs(tile: Tile) -> int:
        return images * triton.cdiv(each if excluded is None else images * each, tile.texts)

    return choose(TUNING, kind, patches.device, programs, launch if texts.numel() else None)


def _common(patches: Tensor, texts: Tensor, grid: tuple[int, int], excluded: Tensor | None) -> dict[str, Any]:
    """The arguments that both kernels have, without the tile."""
    patches, texts = rows_contiguous(patches, patches.dtype), texts.contiguous()
    return {
        "patches": patches,
        "texts": texts,
        "excluded": None if excluded is None else excluded.contiguous().view(torch.uint8),
        "columns": texts.shape[0] * texts.shape[1],
        "count": patches.shape[1],
        "each": texts.shape[1],
        "across": grid[1],
        "width": patches.shape[2],
        "image_stride": patches.stride(0),
        "patch_stride": patches.stride(1),
        "text_stride": texts.stride(1),
    }


def _options(tile: Tile, others: bool, width: int) -> dict[str, Any]:
    """A tile as launch arguments."""
    return _constants(tile, others, width) | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _constants(tile: Tile, others: bool, width: int) -> dict[str, Any]:
    even = width % tile.width == 0
    return {"OTHERS": others, "PATCHES": tile.patches, "TEXTS": tile.texts, "WIDTH": tile.width, "EVEN": even}


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Both kernels with each tile of the table's row for `capability`, for every type; D is no constant."""
    floats = ("scale", "log_inside", "log_outside", "pull", "totals")
    for (_, name), tile in TUNING.at(capability).items():
        for kind in ("bf16", "fp16") if name.endswith(HALF) else ("fp32",):
            pointers = dict.fromkeys(floats, "*fp32") | {"spans": "*i32", "excluded": "*u8"}
            pointers |= dict.fromkeys(("patches", "texts", "gradient"), f"*{kind}")
            constants = _constants(tile, name.startswith(OTHERS), tile.width)
            if name.startswith(OWN):
                constants["excluded"] = None
            for kernel in (forward_kernel, backward_kernel):
                arguments = [each for each in kernel.arg_names if each not in constants]
                direction, images = kernel.__name__.removesuffix("_kernel"), name.split()[0]
                yield CompileCase(
                    name=f"localize {direction} {images} {kind} {tile.texts}×{tile.patches}×{tile.width}",
                    kernel=kernel,
                    signature={each: pointers.get(each, "i32") for each in arguments},
                    constants={each: constants[each] for each in kernel.arg_names if each in constants},
                    divisible_by_16=tuple(
                        each for each in arguments if each in pointers or each == "width" or each.endswith("_stride")
                    ),
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                )
