"""One block of scores: which pairs are positive, which are excluded, and the tiles that it is worked through in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cllip_fast.kernels.products import accumulation_dtype, product

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
        row_texts: [n, D] texts of the local rows, of any length, for the conflict filter; None: no filter.
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

    def excluded(self, start: int, stop: int, columns: Tensor, out: Tensor | None = None) -> Tensor | None:
        """[stop − start, m] bool, True for excluded pairs of rows start … stop; None if no pair can be.

        Args:
            start, stop: rows.
            columns: [m, D] texts, for the conflict filter.
            out: [stop − start, m] room for the filter's cosines; None: allocated.
        """
        rows, result = slice(start, stop), None
        if self.row_texts is not None:
            texts = self.row_texts[rows]
            # |text| on the right-hand side and after the product, instead of normalised copies.
            cosines = product(texts, columns.t(), out, accumulation_dtype(texts.dtype)).div_(lengths(texts)[:, None])
            result = cosines > lengths(columns).mul_(self.threshold)
        if self.row_ids is not None and self.column_ids is not None:
            same = self.row_ids[rows, None] == self.column_ids
            result = same if result is None else result.logical_or_(same)
        if result is not None:
            diagonal = self.diagonal(result, start)
            if diagonal is not None:
                diagonal.fill_(False)
        for padding in (
            None if self.row_valid is None else ~self.row_valid[rows, None],
            None if self.column_valid is None else ~self.column_valid[None],
        ):
            if padding is not None:
                whole = padding.expand(stop - start, columns.shape[0])
                result = whole.contiguous() if result is None else result.logical_or_(padding)
        return result

    def exclude(self, tile: Tensor, start: int, columns: Tensor, space: Workspace) -> None:
        """Set the excluded pairs of a score tile (whose first row is `start`) to −∞, in place."""
        room = None if self.row_texts is None else space.tile(2, *tile.shape)
        excluded = self.excluded(start, start + tile.shape[0], columns, room)
        if excluded is not None:
            tile.masked_fill_(excluded, float("-inf"))


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


def lengths(texts: Tensor) -> Tensor:
    """[n] norms of [n, D] texts in the accumulation type; never 0."""
    return torch.linalg.vector_norm(texts, dim=1, dtype=accumulation_dtype(texts.dtype)).clamp_min_(1e-12)
