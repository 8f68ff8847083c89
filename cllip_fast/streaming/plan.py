"""How a problem is cut: columns in a chunk, and whether gathered chunks are kept for backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cllip_fast.errors import InputError

CHUNK_COLUMNS = 2048
"""Texts (over all ranks) in a chunk by default: wide enough for fast products, few enough for tall tiles."""

KEEP_BYTES = 256 * 2**20
"""Gathered texts up to this size are kept for backward; larger ones are gathered a second time."""

AUTO = 0
"""`chunk_size` of an operator when the caller gave none."""


def chunk_argument(chunk_size: int | None) -> int:
    """A loss's `chunk_size` (texts over all ranks; None or 0: chosen for the caller) as an operator's argument."""
    if chunk_size is None:
        return AUTO
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 0:
        raise InputError(f"chunk_size is {chunk_size!r}, expected a positive number of texts, or None")
    return chunk_size


def rows_in_chunk(counts: Sequence[int], chunk_size: int) -> int:
    """Texts that each rank gives to a chunk, at least one."""
    world_size, rows = len(counts), max(counts)
    if chunk_size == AUTO:
        # Chunks of equal size, instead of full ones and a small rest.
        chunks = -(-rows * world_size // CHUNK_COLUMNS)
        return max(1, -(-rows // max(1, chunks)))
    return max(1, min(rows, chunk_size // world_size))


def gathered_buffer(texts: Tensor, shape: tuple[int, int], keep: bool) -> Tensor:
    """Flat room for the texts [n, D] of all ranks, `shape` = (W, n_max); 0 elements if they are not to be kept.

    They are if backward will want them (`keep`), there are several ranks, and they fit `KEEP_BYTES`.
    """
    elements = shape[0] * shape[1] * texts.shape[1]
    keep = keep and shape[0] > 1 and elements * texts.element_size() <= KEEP_BYTES
    return texts.new_empty(elements if keep else 0)
