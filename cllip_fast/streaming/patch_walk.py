"""The walk of patch–text contrast: whose texts a chunk holds, which pairs are positives, which are excluded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cllip_fast.exchange import Exchange
from cllip_fast.kernels.products import operand
from cllip_fast.streaming.plan import rows_in_chunk

PART_BYTES = 32 * 2**20
"""Room for the backward of a part of the images, unless one image needs more; alone on a rank."""

PAIR_BYTES = 32
"""Of that for a pair: its gradient in fp32, the lists that order texts by their best patch."""


@dataclass(slots=True)
class Chunk:
    """Columns of one chunk, of all ranks: [W, k] flattened."""

    span: slice  # rows of each rank
    texts: Tensor  # [W·k, D] in the products' type
    owner: Tensor  # [W·k] as in `kernels.patch_text.contrast.Pairs`
    ids: Tensor | None  # [W·k]
    own_rows: slice  # this rank's texts in it, of all its texts
    own_columns: slice  # and where they stand in the chunk


class PatchWalk:
    """Local images against the texts of all ranks, chunk by chunk: what forward and backward share."""

    def __init__(
        self,
        texts: Tensor,
        valid: Tensor,
        ids: Tensor | None,
        exchange: Exchange,
        counts: tuple[int, ...],
        chunk_size: int,
    ) -> None:
        self.exchange, self.counts = exchange, counts
        self.texts = texts.flatten(0, 1)
        self.size = rows_in_chunk(counts, chunk_size)
        self.images = torch.arange(valid.shape[0], device=valid.device)
        # The image of each text, valid or not.
        self.image_of = self.images[:, None].expand_as(valid).flatten()
        owner = torch.where(valid.flatten(), self.image_of, -1)
        self.owner = exchange.all_gather(owner, counts, fill=-1)
        if exchange.world_size > 1:
            self.owner.masked_fill_(self.owner >= 0, valid.shape[0])  # an image of another rank
            self.owner[exchange.rank, : owner.shape[0]] = owner
        self.ids = None if ids is None else exchange.all_gather(ids.flatten(), counts)

    def chunks(self, keep: Tensor | None, again: bool = False) -> Iterator[Chunk]:
        """Every chunk; the texts gathered are put into `keep`, or `again` taken from there."""
        if again and keep is not None:
            gathered = self.exchange.kept_chunks(keep, self.texts.shape[1], self.counts, self.size)
        else:
            gathered = self.exchange.gather_chunks(self.texts, self.counts, self.size, keep)
        for start, texts in gathered:
            length = texts.shape[1]
            span = slice(start, start + length)
            own = max(0, min(length, self.texts.shape[0] - start))
            first = self.exchange.rank * length
            yield Chunk(
                span=span,
                texts=operand(texts.flatten(0, 1)),
                owner=self.owner[:, span].flatten(),
                ids=None if self.ids is None else self.ids[:, span].flatten(),
                own_rows=slice(start, start + own),
                own_columns=slice(first, first + own),
            )

    def block(self, table: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's columns of `table` [B, W·n], which holds chunk after chunk: a view [B, W·k]."""
        ranks = self.exchange.world_size
        return table[:, ranks * chunk.span.start : ranks * chunk.span.stop]

    def columns(self, values: Tensor, chunk: Chunk) -> Tensor:
        """[n] numbers of this rank's texts -> [W·k] of the chunk's columns, 0 for those of other ranks."""
        if self.exchange.world_size == 1:
            return values[chunk.own_rows]
        columns = values.new_zeros(chunk.texts.shape[0])
        columns[chunk.own_columns] = values[chunk.own_rows]
        return columns


class PatchGradients:
    """Collects d_patches [B, P, D].

    Where one chunk holds all texts, a part of the images is completed at a time, accumulated in fp32 and rounded to the
    features' type at once; chunk after chunk needs accumulators for all images.

    Args:
        patches: [B, P, D]; gives shape and the result's type.
        like: gives the accumulation type.
        wanted: False: nothing is computed; parts have 0 elements.
        texts: how many there are, if one chunk holds them all; None: there may be more chunks.
    """

    def __init__(self, patches: Tensor, like: Tensor, wanted: bool, texts: int | None) -> None:
        self._patches, self._like, self._wanted = patches, like, wanted
        self._complete = texts is not None and patches.dtype != like.dtype
        image = 0 if texts is None else texts * PAIR_BYTES + self._complete * patches[:1].numel() * like.element_size()
        self._height = max(1, PART_BYTES // image) if image else max(1, patches.shape[0])
        rounded = self._complete and texts != 0
        empty = patches.new_empty if rounded else like.new_zeros
        self._total = empty(patches.shape if wanted else 0)

    def spans(self) -> Iterator[slice]:
        """The images of each part."""
        images = self._patches.shape[0]
        return (slice(first, min(first + self._height, images)) for first in range(0, images, self._height))

    def part(self, images: slice) -> Tensor:
        """Accumulator of some images: [b, P, D]."""
        if not self._wanted:
            return self._like.new_empty(0)
        return self._like.new_zeros(self._patches[images].shape) if self._complete else self._total[images]

    def put(self, images: slice, part: Tensor) -> None:
        """Keep what `part` gave."""
        if self._wanted and self._complete:
            self._total[images] = part

    def collect(self) -> Tensor:
        """[B, P, D] in the features' type; 0 elements if not wanted."""
        return self._total.to(self._patches.dtype)
