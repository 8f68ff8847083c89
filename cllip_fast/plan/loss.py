"""What the losses need beside the model: workspace, gathered texts, products. The formulas are docs/design.md's."""

from __future__ import annotations

from dataclasses import dataclass

from cllip_fast.errors import InputError
from cllip_fast.kernels.block import TILE_ELEMENTS
from cllip_fast.kernels.patch_text.tiling import GPU_TILE
from cllip_fast.plan.settings import Settings
from cllip_fast.streaming.plan import AUTO, KEEP_BYTES, rows_in_chunk

FEATURE = 4
"""Bytes of a number of a feature and of the sums: autocast leaves `F.normalize` in fp32, and products take casts."""


def loss_memory(rows: int, width: int, world_size: int, element_size: int) -> int:
    """Bytes that `ClipLoss` or `RegionTextLoss` needs on a GPU, above its inputs and their gradients.

    Args:
        rows: local rows N, images or regions.
        width: D.
        world_size: ranks W, each with as many rows.
        element_size: bytes of a number of the features.

    Raises:
        InputError: a number below 1.
    """
    for name, value in (("rows", rows), ("width", width), ("world_size", world_size), ("element_size", element_size)):
        if value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    columns = rows_in_chunk((rows,) * world_size, AUTO) * world_size
    tiles = 3 * FEATURE * min(rows * columns, max(TILE_ELEMENTS, columns))
    sums = 4 * FEATURE * (rows + rows * world_size)
    gradients = 2 * FEATURE * rows * width
    return tiles + sums + gradients + gathered_memory(rows, width, world_size, element_size)


def gathered_memory(rows: int, width: int, world_size: int, element_size: int) -> int:
    """The part of `loss_memory` that gathered texts take: all of them, or two chunks if they are too many to keep."""
    if world_size == 1:
        return 0
    if is_kept(rows, width, world_size, element_size):
        return element_size * rows * world_size * width
    return 2 * element_size * rows_in_chunk((rows,) * world_size, AUTO) * world_size * width


def is_kept(rows: int, width: int, world_size: int, element_size: int) -> bool:
    """Whether gathered texts are kept for backward; otherwise they are gathered a second time."""
    return element_size * rows * world_size * width <= KEEP_BYTES


@dataclass(frozen=True)
class LossCost:
    """Bytes of features with their gradients, of workspace, of gathered texts; multiply-adds; bytes sent by a GPU."""

    features: int
    workspace: int
    gathered: int
    products: int
    sent: int


def loss_cost(run: Settings) -> LossCost:
    """All losses of one step, on the features of all its batches."""
    config, world = run.config, run.gpus
    width = config.embed_dim
    images, texts = run.batch_size * run.accum_freq, run.regions * run.accum_freq
    patches = images * config.patch_grid[0] * config.patch_grid[1] if "patch" in run.parts else 0
    workspace = gathered = products = sent = 0
    for rows in [images] * ("clip" in run.losses) + [texts] * ("region" in run.losses):
        own = gathered_memory(rows, width, world, run.element)
        gathered += own
        workspace += loss_memory(rows, width, world, run.element) - own
        products += 4 * rows * rows * world * width  # one forward, three backward
        sent += _sent(rows, width, world, run.element)
    if "patch" in run.losses:
        index = 1 if patches // images < 2**8 else 2
        gathered += gathered_memory(texts, width, world, run.element)
        workspace += images * texts * world * (FEATURE + index) + 3 * FEATURE * min(GPU_TILE, patches * texts * world)
        products += patches * texts * world * width + 2 * images * texts * world * width  # backward: best patches only
        sent += _sent(texts, width, world, run.element)
    if "localization" in run.losses:
        inside = run.max_regions * patches
        workspace += inside * (3 * FEATURE + 1)  # scores, their gradient, a copy; which patches are in the box
        products += 4 * inside * width
    # Every loss of regions keeps a copy of its texts in which padding is zero; the region loss one of its regions too.
    copies = texts * (2 * ("region" in run.losses) + ("patch" in run.losses) + ("localization" in run.losses))
    numbers = 2 * images + texts * (1 + ("region" in run.losses)) + patches + copies
    bytes_each = 2 * (FEATURE + (run.element if run.element < FEATURE else 0))  # and of casts, with their gradients
    return LossCost(bytes_each * numbers * width, workspace, gathered, products, sent)


def _sent(rows: int, width: int, world_size: int, element: int) -> int:
    """Bytes of a GPU's texts to the others, once or twice, and of the gradients of theirs."""
    gathers = 1 if is_kept(rows, width, world_size, element) else 2
    return (gathers + 1) * element * (world_size - 1) * rows * width
