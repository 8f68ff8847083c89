"""Backward of the softmax losses: the walk over blocks, the text gradients' way home, and what the flags mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cllip_fast.exchange import Exchange, Pending
from cllip_fast.kernels.products import inner
from cllip_fast.streaming.walk import Walk


class TextGradients:
    """Collects d_texts [n, D] of this rank from the chunks that all ranks contribute to.

    Each chunk is reduce-scattered to its owners while the next one is computed, and kept in the type it travelled in.

    Args:
        exchange: the group.
        counts: rows on each rank.
        width: D.
        like: gives device and type (the accumulation type).
        wanted: False: nothing is computed or sent; `chunk` gives a tensor with 0 elements.
        wire: type that chunks are rounded to, travel in and are kept in; None: that of `like`.
    """

    def __init__(
        self,
        exchange: Exchange,
        counts: Sequence[int],
        width: int,
        like: Tensor,
        wanted: bool,
        wire: torch.dtype | None = None,
    ) -> None:
        self._exchange, self._wanted, self._wire = exchange, wanted, wire
        self._own = like.new_zeros((max(counts), width) if wanted else 0, dtype=wire)
        self._chunk = like.new_empty((0, width) if wanted else 0)
        self._alone = exchange.world_size == 1
        self._in_place = self._alone and wire in (None, like.dtype)
        self._in_flight: tuple[slice, Pending] | None = None

    def chunk(self, span: slice) -> Tensor:
        """[W·k, D] zeros to add the gradient of rows `span` of every rank to."""
        if not self._wanted:
            return self._chunk
        rows = self._exchange.world_size * (span.stop - span.start)
        if self._in_place:
            return self._own[span]
        if self._alone and rows <= self._chunk.shape[0]:  # it was copied at once: the same room again
            self._chunk = self._chunk[:rows].zero_()
        else:
            self._chunk = self._chunk.new_zeros((rows, self._own.shape[1]))
        return self._chunk

    def send(self, span: slice) -> None:
        """Send the chunk just computed; waits for the one before, so that at most two are held."""
        if not self._wanted or self._in_place:
            return
        if self._alone:
            self._own[span] = self._chunk
            return
        self._finish()
        chunk = self._chunk.view(self._exchange.world_size, -1, self._own.shape[1])
        self._in_flight = span, self._exchange.reduce_scatter(chunk, self._wire)

    def collect(self, rows: int) -> Tensor:
        """[rows, D] in the type of `wire`: the gradient of this rank's texts, complete."""
        self._finish()
        return self._own[:rows]

    def _finish(self) -> None:
        if self._in_flight is not None:
            span, pending = self._in_flight
            self._own[span] = pending.wait()
            self._in_flight = None


CAST_ELEMENTS = 2**22
"""Numbers that `cast_in_place` converts at a time."""


def cast_in_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (contiguous) in `dtype`, in the beginning of their own memory, which is all that a large tensor takes.

    `values` are overwritten, unless they are few, or `dtype` is no smaller type: these are converted as usual. The
    result's memory stays as large as that of `values` was.
    """
    if dtype.itemsize >= values.dtype.itemsize or values.numel() <= CAST_ELEMENTS:
        return values.to(dtype)
    source = values.view(-1)
    result = source.view(dtype)[: source.numel()]
    for start in range(0, source.numel(), CAST_ELEMENTS):
        piece = slice(start, start + CAST_ELEMENTS)
        # Through a copy: the first pieces lie on themselves. What else a piece covers was converted before.
        result[piece] = source[piece].to(dtype)
    return result.view(values.shape)


def upstream(gradient: Tensor, walk: Walk, local: bool) -> Tensor:
    """[..., W] the factor that the weights of each rank's rows and columns carry: its own gradient [...], or the mean.

    The full-batch loss is one number that every rank holds; should ranks weigh it differently, their mean is what
    averaging parameter gradients comes to.
    """
    of_ranks = walk.exchange.all_gather(gradient.to(walk.type)[None])[:, 0].movedim(0, -1)
    return of_ranks if local else of_ranks.mean(-1, keepdim=True).expand_as(of_ranks)


def row_and_column_weights(factor: Tensor, walk: Walk) -> tuple[Tensor, Tensor]:
    """factor [..., W] of each rank -> weights of this rank's rows [..., n] and of all columns [..., W, n_max]."""
    rows = factor[..., walk.exchange.rank, None].expand(*factor.shape[:-1], walk.rows.shape[0])
    columns = factor[..., None].expand(*factor.shape, max(walk.counts))
    return (
        rows if walk.valid is None else rows * walk.valid,
        columns if walk.all_valid is None else columns * walk.all_valid,
    )


def softmax_backward(
    walk: Walk,
    backward_block: Callable[..., None],
    row_values: Tensor,
    column_values: Tensor,
    texts: Tensor,
    kept: Tensor,
    *,
    reference: float | None,
    local: bool,
    gather_grad: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """d_rows [n, D] in the accumulation type, d_texts [n, D] in theirs, d_scale []; those not needed have 0 elements.

    Args:
        walk: the call's blocks; D is the width of `texts`, its scale's first number is the logit scale.
        backward_block: kernel, see `kernels/info_nce/tiles.py`.
        row_values: [V, n] what the kernel must know of this rank's rows, weights included.
        column_values: [V, W, n_max] the same of all columns; forward left their statistics on every rank.
        texts: [n, D] of this rank (the walk's own may carry more columns).
        kept: gathered texts kept by forward, or 0 elements.
        reference: passed on to the kernel.
        local, gather_grad: see `streaming.info_nce`.
        needs: which of the three are wanted.
    """
    need_rows, need_texts, need_scale = needs
    exchange, scale = walk.exchange, walk.scale.flatten()[0]
    local = local and exchange.world_size > 1
    split = local and not gather_grad
    # A sum of W equal losses has W times the gradient; the ranks' local losses sum up to that by themselves.
    factor = scale * exchange.world_size if gather_grad and not local else scale
    d_rows = scale.new_zeros((walk.rows.shape[0], texts.shape[1]) if need_rows or need_scale else 0)
    wanted = need_texts or (local and need_scale)
    d_texts = TextGradients(exchange, walk.counts, texts.shape[1], scale, wanted, texts.dtype)
    column_part = scale.new_zeros(exchange.world_size) if local and need_scale else None
    row_part = None if split or column_part is None else torch.zeros_like(column_part)
    for span, columns, block in walk.blocks(kept if kept.numel() else None, again=True):
        d_columns = d_texts.chunk(span)
        part = None if row_part is None else scale.new_zeros(columns.shape[0])
        backward_block(
            walk.rows,
            columns,
            walk.scale,
            block,
            row_values,
            column_values[:, :, span].flatten(1),
            d_rows,
            d_columns,
            walk.space,
            reference=reference,
            split=split,
            row_part=part,
        )
        if column_part is not None:
            column_part += torch.sum((d_columns * columns[:, : texts.shape[1]]).view(exchange.world_size, -1), 1)
        if row_part is not None:
            row_part += part.view(exchange.world_size, -1).sum(1) / scale
        d_columns.mul_(factor)  # before it is rounded for the wire: the smallest would vanish in fp16
        d_texts.send(span)
    own_texts = d_texts.collect(walk.rows.shape[0])

    d_scale = scale.new_empty(0)
    if need_scale:
        by_rows = inner(d_rows, walk.rows[:, : texts.shape[1]])
        if not local:
            d_scale = exchange.all_sum(by_rows)
        elif split:
            d_scale = by_rows + exchange.all_sum(column_part)[exchange.rank]
        else:
            # This rank's loss is its rows' part and its columns' part. The latter lies on all ranks, in `column_part`,
            # which also has what these ranks' rows contribute to the columns through their own part.
            d_scale = row_part.sum() + exchange.all_sum(column_part - row_part)[exchange.rank]
    return d_rows.mul_(factor) if need_rows else d_rows[:0], own_texts, d_scale
