"""What forward and backward of an operator share: operands, masks, and the blocks of scores in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from cllip_fast.exchange import Exchange, padding_mask
from cllip_fast.kernels.block import Block, Workspace
from cllip_fast.kernels.products import accumulation_dtype, operand
from cllip_fast.streaming.plan import rows_in_chunk


class Walk:
    """Local rows against the texts of all ranks, chunk by chunk.

    Args:
        rows, texts: [n, D] of this rank.
        scale: logit_scale, [] or [1] (an operator may carry more numbers).
        exchange: the group.
        counts: texts on each rank.
        chunk_size: texts (over all ranks) in a chunk; 0: chosen.
        valid, ids, threshold: masks, see `streaming.info_nce`.
    """

    def __init__(
        self,
        rows: Tensor,
        texts: Tensor,
        scale: Tensor,
        exchange: Exchange,
        counts: Sequence[int],
        chunk_size: int,
        valid: Tensor | None = None,
        ids: Tensor | None = None,
        threshold: float | None = None,
    ) -> None:
        self.exchange, self.counts = exchange, counts
        self.type = accumulation_dtype(rows.dtype)
        self.rows, self.texts, self.scale = operand(rows), texts, scale.to(self.type)
        self.size = rows_in_chunk(counts, chunk_size)
        self.space = Workspace(rows.shape[0], self.size * len(counts), self.scale)
        self.valid, self.ids = valid, ids
        self.filter_rows = None if threshold is None else operand(texts)
        self.threshold = 1.0 if threshold is None else threshold
        self.all_valid = padding_mask(counts, rows.device) if valid is None else exchange.all_gather(valid, counts)
        self.all_ids = None if ids is None else exchange.all_gather(ids, counts)

    def blocks(self, keep: Tensor | None, again: bool = False) -> Iterator[tuple[slice, Tensor, Block]]:
        """(rows of each rank, columns [W·k, D] in the products' type, block) of every chunk.

        Args:
            keep: buffer for the gathered texts, see `Exchange.gather_chunks`; None: they are not kept.
            again: read the chunks from `keep` if there is one, instead of gathering.
        """
        if again and keep is not None:
            chunks = self.exchange.kept_chunks(keep, self.texts.shape[1], self.counts, self.size)
        else:
            chunks = self.exchange.gather_chunks(self.texts, self.counts, self.size, keep)
        for start, chunk in chunks:
            span = slice(start, start + chunk.shape[1])
            length = max(0, min(chunk.shape[1], self.rows.shape[0] - start))
            block = Block(
                positive=(start, self.exchange.rank * chunk.shape[1], length),
                row_valid=self.valid,
                column_valid=None if self.all_valid is None else self.all_valid[:, span].flatten(),
                row_ids=self.ids,
                column_ids=None if self.all_ids is None else self.all_ids[:, span].flatten(),
                row_texts=self.filter_rows,
                threshold=self.threshold,
            )
            yield span, operand(chunk.flatten(0, 1)), block
