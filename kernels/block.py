"""One block of scores: which pairs are positive, which are excluded, and the tiles that it is worked through in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cllip_fast.kernels.products import operand

TILE_ELEMENTS = 2**20
"""Scores in a tile, at most (unless one row has more): 4 MiB in fp32. A kernel holds up to three tiles at a time."""


@dataclass(frozen=True, slots=True)
class Block:
    """What a kernel must know of local rows [n] × one chunk's columns [m], apart from the features.

    Attributes:
        positive: (first row, first column, length) of the run of positives (row + t, column + t); length 0: none.
        row_valid: [n] bool, or None if all rows are real. A pair with a padded row or column is excluded.
        column_valid: [m] bool, or None.
        row_ids: [n] integers; a pair of equal ids is excluded unless it is the positive.
        column_ids: [m] integers.
        row_texts: [n, D] unit-norm texts of the local rows, for the conflict filter; None: no filter.
        threshold: a pair whose texts' cosine exceeds it is excluded unless it is the positive.
    """

    positive: tuple[int, int, int]
    row_valid: Tensor | None = None
    column_valid: Tensor | None = None
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    row_texts: Tensor | None = None
    threshold: float = 1.0

    def diagonal(self, tile: Tensor, start: int) -> Tensor | None:
        """View of the positives in `tile` (whose first row is row `start`), or None if it has none."""
        row, column, length = self.positive
        first, last = max(row, start), min(row + length, start + tile.shape[0])
        if first >= last:
            return None
        column += first - row
        return tile[first - start : last - start, column : column + last - first].diagonal()

    def rows_of(self, start: int, stop: int) -> slice:
        """Positions in [n] of the positives that lie in rows start … stop; empty if there are none."""
        row, _, length = self.positive
        first = max(row, start)
        return slice(first, max(first, min(row + length, stop)))

    def exclude(self, tile: Tensor, start: int, columns: Tensor, space: Workspace, value: float) -> None:
        """Set the excluded pairs of a score tile (whose first row is `start`) to `value`, in place."""
        rows = slice(start, start + tile.shape[0])
        excluded = None
        if self.row_texts is not None:
            # |column| on the right-hand side instead of a normalised copy of the chunk.
            norms = torch.linalg.vector_norm(columns, dim=1, dtype=tile.dtype)
            cosines = space.tile(2, *tile.shape)
            texts = self.row_texts[rows]
            if texts.dtype == tile.dtype:
                torch.mm(texts, columns.t(), out=cosines)
            else:
                torch.mm(texts, columns.t(), out_dtype=tile.dtype, out=cosines)
            excluded = cosines > norms * self.threshold
        if self.row_ids is not None and self.column_ids is not None:
            same = self.row_ids[rows, None] == self.column_ids
            excluded = same if excluded is None else excluded.logical_or_(same)
        if excluded is not None:
            diagonal = self.diagonal(excluded, start)
            if diagonal is not None:
                diagonal.fill_(False)
            tile.masked_fill_(excluded, value)
        if self.column_valid is not None:
            tile.masked_fill_(~self.column_valid, value)
        if self.row_valid is not None:
            tile.masked_fill_(~self.row_valid[rows, None], value)


class Workspace:
    """Tile buffers, allocated on first use and used again for every tile of a call.

    Args:
        rows: local rows, in all.
        columns: columns of the largest chunk.
        like: gives device and type (the accumulation type).
    """

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        self._like = like
        self._height = max(1, min(rows, TILE_ELEMENTS // max(1, columns)))
        self._elements = self._height * columns
        self._buffers: dict[int, Tensor] = {}

    def spans(self, rows: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the row tiles."""
        for start in range(0, rows, self._height):
            yield start, min(rows, start + self._height)

    def tile(self, index: int, rows: int, columns: int) -> Tensor:
        """Buffer number `index` as [rows, columns], not initialised."""
        if index not in self._buffers:
            self._buffers[index] = self._like.new_empty(self._elements)
        return self._buffers[index][: rows * columns].view(rows, columns)


def unit_texts(texts: Tensor) -> Tensor:
    """[n, D] texts divided by their norms, in the products' type: the rows of the conflict filter."""
    norms = torch.linalg.vector_norm(texts, dim=1, keepdim=True, dtype=torch.promote_types(texts.dtype, torch.float32))
    return operand((texts / norms.clamp_min(1e-12)).to(texts.dtype))
