"""The walk of patch–text contrast: whose texts a chunk holds, which pairs are positives, which are excluded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cllip_fast.exchange import Exchange
from cllip_fast.kernels.patch_text.exclusions import conflicts
from cllip_fast.kernels.products import operand
from cllip_fast.streaming.plan import rows_in_chunk

NO_PAIR = float("-inf")
"""Pooled score of an excluded pair."""


@dataclass(slots=True)
class Chunk:
    """Columns of one chunk, of all ranks: [W, k] flattened."""

    span: slice  # rows of each rank
    texts: Tensor  # [W·k, D] in the products' type
    owner: Tensor  # [W·k] image on its own rank, -1 for a text that is not valid
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

    def positives(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(image, column) of this rank's texts in the chunk."""
        columns = torch.arange(chunk.own_columns.start, chunk.own_columns.stop, device=self.images.device)
        return self.image_of[chunk.own_rows], columns


def exclude(
    pooled: Tensor,
    walk: PatchWalk,
    chunk: Chunk,
    valid: Tensor,
    ids: Tensor | None,
    filter_texts: Tensor | None,
    threshold: float | None,
    patch_mask: Tensor | None,
) -> None:
    """Set the pairs of `pooled` [B, W·k] that are no negatives to −inf: the positives too."""
    pooled.masked_fill_(chunk.owner < 0, NO_PAIR)
    own = pooled[:, chunk.own_columns]
    own.masked_fill_(walk.image_of[chunk.own_rows] == walk.images[:, None], NO_PAIR)
    excluded = conflicts(valid, chunk.texts, ids, chunk.ids, filter_texts, 1.0 if threshold is None else threshold)
    if excluded is not None:
        pooled.masked_fill_(excluded, NO_PAIR)
    if patch_mask is not None:
        pooled.masked_fill_(~patch_mask.any(1, keepdim=True), NO_PAIR)
