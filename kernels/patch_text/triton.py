"""Patch–text contrast in Triton for bf16, fp16 and fp32, with the functions of `tiles.py`, which does fp64.

    forward     `triton_forward.py`: scores in registers, pooled there, and the sums of the InfoNCE with their
                exclusions; written are the pooled scores, one number beside each, and a line of sums a tile
    gradient    `triton_contrast.py`: that of the pooled scores, in one pass over them
    backward    `triton_backward.py`: best patches are gathered for max; for softmax scores are recomputed, and their
                gradients, in the features' type, handed to two library products

No atomics; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cllip_fast.kernels.info_nce.triton_tiles import runs
from cllip_fast.kernels.patch_text import contrast, tiles, triton_backward, triton_contrast, triton_forward
from cllip_fast.kernels.patch_text.contrast import Pairs, Pulls
from cllip_fast.kernels.patch_text.tiles import saved_dtype
from cllip_fast.kernels.patch_text.triton_operands import FULL, launch_options
from cllip_fast.kernels.triton_patches import Tile
from cllip_fast.kernels.tuning import LARGE, CompileCase, Table

__all__ = ["compile_cases", "forward_block", "pool_backward", "pooled_gradient", "saved_dtype"]


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
    """Fill `pooled`, `saved`, `positive` and return log Σ e^{a S} of images and texts; see `tiles.forward_block`.

    Raises:
        InputError: the features are not on a GPU.
    """
    into = scale, pairs, pooled, saved, positive
    if not runs(texts):
        return tiles.forward_block(patches, texts, patch_mask, pool, temperature, *into)
    with torch.cuda.device_of(texts):  # Triton launches on the current device
        return triton_forward.forward(patches, texts, patch_mask, pool == "softmax", temperature, *into)


def pooled_gradient(pooled: Tensor, pulls: Pulls, factor: Tensor) -> tuple[Tensor, Tensor]:
    """See `contrast.pooled_gradient`.

    Raises:
        InputError: the scores are not on a GPU.
    """
    if not runs(pooled):
        return contrast.pooled_gradient(pooled, pulls, factor)
    with torch.cuda.device_of(pooled):
        return triton_contrast.pooled_gradient(pooled, pulls, factor)


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
    """Add the gradients to `d_patches` and `d_texts`; see `tiles.pool_backward`.

    Raises:
        InputError: the features are not on a GPU.
    """
    into = gradient, d_patches, d_texts
    if not runs(texts):
        return tiles.pool_backward(patches, texts, patch_mask, pool, temperature, pooled, saved, *into)
    with torch.cuda.device_of(texts):
        if pool == "max":
            triton_backward.max_backward(patches, texts, saved, *into)
        else:
            triton_backward.softmax_backward(patches, texts, patch_mask, temperature, pooled, saved, *into)


# What may be None, with its type.
MASKS = {"patch_mask": "*i1", "ids": "*i64", "own_ids": "*i64", "own_valid": "*i1", "excluded": "*i1"}


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every configuration for one compute capability; kernels with a product without masks, and with every one."""
    gather = triton_backward.GATHERS.row(capability, LARGE, triton_backward.ROWS)
    for dtype in ("bf16", "fp16", "fp32"):
        for tile in _tiles(triton_forward.TILES, capability, dtype):
            for softmax in (False, True):
                kind = "softmax" if softmax else "max"
                types = {"saved": "*fp32" if softmax else "*u8", "owner": "*i64"}
                yield from _cases(
                    f"{kind} forward", triton_forward.forward_kernel, dtype, tile, types, {"SOFTMAX": softmax}
                )
        for tile in _tiles(triton_backward.TILES, capability, dtype):
            yield from _cases(
                "softmax backward", triton_backward.softmax_gradient, dtype, tile, {"out": f"*{dtype}"}, {}
            )
        yield CompileCase(
            name=f"patch_text sum_rows {dtype}",
            kernel=triton_backward.sum_rows,
            signature={
                "table": f"*{dtype}",
                "rows": "*i64",
                "weights": "*fp32",
                "first": "*i64",
                "out": "*fp32",
                **dict.fromkeys(("width", "table_stride", "out_stride"), "i32"),
            },
            constants={"ENTRIES": gather.entries, "BLOCK_D": gather.width},
            divisible_by_16=("table", "rows", "weights", "first", "out", "width", "table_stride", "out_stride"),
            num_warps=gather.num_warps,
            num_stages=1,
        )
    kernel = triton_contrast.gradient_kernel
    floats = [name for name in kernel.arg_names if name not in ("owner", "columns", "pooled_stride", "BLOCK_T")]
    yield CompileCase(
        name="patch_text pooled gradient",
        kernel=kernel,
        signature=dict.fromkeys(floats, "*fp32") | {"owner": "*i64", "columns": "i32", "pooled_stride": "i32"},
        constants={"BLOCK_T": triton_contrast.TEXTS},
        divisible_by_16=(*floats, "owner", "columns", "pooled_stride"),
        num_warps=4,
        num_stages=1,
    )


def _tiles(table: Table[Tile], capability: int, dtype: str) -> list[Tile]:
    """Those of a type, each once."""
    rows = table.at(capability).items()
    return list(dict.fromkeys(tile for (_, kind), tile in rows if (kind == FULL) == (dtype == "fp32")))


def _cases(
    name: str, kernel: Any, dtype: str, tile: Tile, types: dict[str, str], constants: dict[str, Any]
) -> Iterator[CompileCase]:
    """Of a kernel with a product, at a P that is not divisible by 16."""
    masks = {mask: kind for mask, kind in MASKS.items() if mask in kernel.arg_names}
    options = launch_options(tile, tile.width, tile.tma)
    constants = constants | {each: options.pop(each) for each in kernel.arg_names if each in options}
    types = types | {"patches": f"*{dtype}", "texts": f"*{dtype}"}
    floats = ("scale", "pooled", "saved", "positive", "row_partials", "column_partials", "gradient")
    for masked in (False, True):
        pointers = {each: "*fp32" for each in floats if each in kernel.arg_names} | types | (masks if masked else {})
        constant = constants | ({} if masked else dict.fromkeys(masks))
        signature = {each: "i32" for each in kernel.arg_names if each not in constant} | pointers
        signature["inverse_temperature"] = "fp32"
        if tile.tma:
            signature["patches"] = f"tensordesc<{dtype}[1, {tile.patches}, {tile.width}]>"
            signature["texts"] = f"tensordesc<{dtype}[{tile.texts}, {tile.width}]>"
        divisible = [each for each in signature if each in pointers or each.endswith("_stride")]
        yield CompileCase(
            name=" ".join(
                ["patch_text", name, dtype, f"{tile.texts}x{tile.patches}x{tile.width}"]
                + (["tma"] if tile.tma else [])
                + (["masked"] if masked else [])
            ),
            kernel=kernel,
            signature=signature,
            constants=constant,
            divisible_by_16=tuple(
                each for each in (*divisible, "columns", "width") if not signature[each].startswith("tensordesc")
            ),
            **options,
        )
