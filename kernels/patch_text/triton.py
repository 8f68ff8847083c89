"""Patch–text pooling in Triton for bf16, fp16 and fp32, with the functions of `tiles.py`, which does fp64.

Forward (`triton_forward.py`) keeps the scores in registers and writes what `tiles.py` writes: the pooled scores and one
number beside them. Backward (`triton_backward.py`) gathers best patches for max; for softmax it recomputes scores and
hands their gradients, in the features' type, to two library products. No atomics; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from cllip_fast.kernels.info_nce.triton_tiles import runs
from cllip_fast.kernels.patch_text import tiles, triton_backward, triton_forward
from cllip_fast.kernels.patch_text.tiles import saved_dtype
from cllip_fast.kernels.patch_text.triton_product import Tile
from cllip_fast.kernels.tuning import CompileCase

__all__ = ["compile_cases", "pool_backward", "pool_scores", "saved_dtype"]


def pool_scores(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    pool: str,
    temperature: float,
    pooled: Tensor,
    saved: Tensor,
) -> None:
    """Fill `pooled` and `saved`; see `tiles.pool_scores`.

    Raises:
        InputError: the features are not on a GPU.
    """
    if not runs(texts):
        return tiles.pool_scores(patches, texts, patch_mask, pool, temperature, pooled, saved)
    triton_forward.launch_pool(patches, texts, patch_mask, pool == "softmax", temperature, pooled, saved)


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
    if pool == "max":
        triton_backward.max_backward(patches, texts, saved, *into)
    else:
        triton_backward.softmax_backward(patches, texts, patch_mask, temperature, pooled, saved, *into)


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every configuration for one compute capability, with a patch mask, the larger of the two variants."""
    gather = triton_backward.GATHERS[80]
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for tile in triton_forward.TILES[capability][size]:
            for softmax in (False, True):
                kind = "softmax" if softmax else "max"
                types = {"pooled": "*fp32", "saved": "*fp32" if softmax else "*u8"}
                yield _case(f"{kind} forward", triton_forward.pool, dtype, tile, types, {"SOFTMAX": softmax})
        for tile in triton_backward.TILES[capability][size]:
            types = {"pooled": "*fp32", "saved": "*fp32", "gradient": "*fp32", "out": f"*{dtype}"}
            yield _case("softmax backward", triton_backward.softmax_gradient, dtype, tile, types, {})
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


def _case(
    name: str, kernel: Any, dtype: str, tile: Tile, types: dict[str, str], constants: dict[str, Any]
) -> CompileCase:
    """Of a kernel with a product, at a P that is not divisible by 16."""
    constants = {
        **constants,
        "MASKED": True,
        "BLOCK_T": tile.texts,
        "BLOCK_P": tile.patches,
        "BLOCK_D": tile.width,
        "EVEN_D": True,
    }
    pointers = {"patches": f"*{dtype}", "texts": f"*{dtype}", "patch_mask": "*i1", **types}
    signature = {name: "i32" for name in kernel.arg_names if name not in constants}
    signature |= {**pointers, "inverse_temperature": "fp32"}
    strides = {name for name in signature if name.endswith("_stride")} - {"mask_stride"}
    return CompileCase(
        name=f"patch_text {name} {dtype} {tile.texts}x{tile.patches}x{tile.width}",
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible_by_16=(*pointers, *sorted(strides), "columns", "width"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
