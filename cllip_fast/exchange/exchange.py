"""The `Exchange` object: what the streaming engine needs of a process group, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cllip_fast.errors import InputError
from cllip_fast.exchange.groups import find_group, group_name

# The newer names replace the older ones, which warn from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Pending:
    """A collective in flight: `wait()` returns its result. Holds the buffers alive until then."""

    def __init__(
        self,
        result: Tensor,
        work: dist.Work | None = None,
        source: Tensor | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._result = result
        self._work = work
        self._source = source
        self._finish = finish

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = self._source = None
            if self._finish is not None:
                self._result = self._finish(self._result)
        return self._result


class Exchange:
    """Chunked collectives over a process group; `group=None` is this process alone.

    Args:
        group: a `torch.distributed` process group, a name made by `group_name`, or None.

    Raises:
        InputError: the group is named but `torch.distributed` is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | str | None = None) -> None:
        self._group = find_group(group_name(group))
        self.rank: int = 0 if self._group is None else dist.get_rank(self._group)
        self.world_size: int = 1 if self._group is None else dist.get_world_size(self._group)
        if self.rank < 0:
            raise InputError("group does not contain this rank")

    def row_counts(self, local: Tensor, **optional: Tensor | None) -> tuple[int, ...]:
        """Rows of `local` [n, D] on each rank. The one place that waits for the device when there are several ranks.

        Args:
            local: this rank's rows.
            optional: arguments that must be None on all ranks or on none, because the calls to come depend on it.

        Raises:
            InputError: on every rank alike, if width or dtype or what is None differ between ranks.
        """
        if self.world_size == 1:
            return (local.shape[0],)
        dtype = _DTYPES.index(local.dtype) if local.dtype in _DTYPES else -1
        given = [value is not None for value in optional.values()]
        mine = torch.tensor([local.shape[0], local.shape[1], dtype, *given], device=local.device)
        table = self.all_gather(mine[None])[:, 0].tolist()
        if len({tuple(row[1:3]) for row in table}) > 1:
            form = [f"[{n}, {width}] {_DTYPES[code] if code >= 0 else 'other'}" for n, width, code, *_ in table]
            raise InputError(f"features must have the same width and dtype on every rank, got {', '.join(form)}")
        for index, name in enumerate(optional, start=3):
            ranks = [rank for rank, row in enumerate(table) if row[index]]
            if 0 < len(ranks) < self.world_size:
                raise InputError(f"{name} must be given on every rank or on none, but only ranks {ranks} have it")
        return tuple(row[0] for row in table)

    def all_gather(self, local: Tensor, counts: Sequence[int] | None = None, fill: float = 0) -> Tensor:
        """Gather a small tensor [n, ...] from each rank -> [W, n_max, ...]; short ranks are padded with `fill`.

        Args:
            local: this rank's rows.
            counts: rows on each rank, from `row_counts`; None: the same number on all.
            fill: value of padded rows.
        """
        if self.world_size == 1:
            return local[None]
        local = _padded(local, max(counts) if counts else local.shape[0], fill)
        gathered = local.new_empty((self.world_size * local.shape[0], *local.shape[1:]))
        _all_gather(gathered, local, group=self._group)
        return gathered.view(self.world_size, *local.shape)

    def gather_chunks(
        self, local: Tensor, counts: Sequence[int], size: int, keep: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, chunk [W, k, D]) with k ≤ `size`: rows start … start+k of every rank, in rank order.

        The all-gather of the next chunk runs while the caller works on the current one.

        Args:
            local: this rank's rows [n, D].
            counts: rows on each rank.
            size: rows of each rank in a chunk.
            keep: flat buffer of W · n_max · D elements to gather into, for `kept_chunks` later; None: two small
                buffers are used in turn. Not used with one rank.
        """
        if self.world_size == 1:
            for start in range(0, counts[0], size):
                yield start, local[None, start : start + size]
            return
        local = _padded(local, max(counts))
        pieces = local.split(size)
        if keep is None:
            room = local.new_empty((2, self.world_size * min(size, local.shape[0]) * local.shape[1]))
            buffers = [room[index % 2, : self.world_size * piece.numel()] for index, piece in enumerate(pieces)]
        else:
            buffers = list(keep.split([self.world_size * piece.numel() for piece in pieces]))

        def launch(index: int) -> Pending:
            piece = pieces[index]
            result = buffers[index].view(-1, piece.shape[1])
            work = _all_gather(result, piece, group=self._group, async_op=True)
            return Pending(result.view(self.world_size, *piece.shape), work, piece)

        following = launch(0) if max(counts) else None
        for index in range(len(pieces) if max(counts) else 0):
            current, following = following, launch(index + 1) if index + 1 < len(pieces) else None
            yield index * size, current.wait()

    def kept_chunks(self, keep: Tensor, width: int, counts: Sequence[int], size: int) -> Iterator[tuple[int, Tensor]]:
        """The same chunks again, [W, k, D = `width`], from the buffer that `gather_chunks` filled."""
        whole = self.world_size * width
        for start in range(0, max(counts), size):
            stop = min(start + size, max(counts))
            yield start, keep[start * whole : stop * whole].view(self.world_size, stop - start, width)

    def reduce_scatter(self, gradient: Tensor, wire: torch.dtype | None = None) -> Pending:
        """Sum [W, k, D] over ranks and keep this rank's [k, D], in the gradient's type; in flight until `.wait()`.

        Args:
            gradient: this rank's part of every rank's rows.
            wire: type that the parts are rounded to and travel in; None: the gradient's.
        """
        if self.world_size == 1:
            return Pending(gradient[0])
        dtype = gradient.dtype
        source = gradient.to(wire or dtype).contiguous().view(-1, *gradient.shape[2:])
        if source.device.type == "cpu":
            # gloo's reduce-scatter is an all-reduce inside: twice the bytes. Owners sum the parts themselves.
            parts = torch.empty_like(source)
            work = dist.all_to_all_single(parts, source, group=self._group, async_op=True)
            return Pending(parts.view(gradient.shape), work, source, lambda parts: parts.sum(0, dtype=dtype))
        own = torch.empty_like(source[: gradient.shape[1]])
        work = _reduce_scatter(own, source, group=self._group, async_op=True)
        return Pending(own, work, source, lambda own: own.to(dtype))

    def all_sum(self, value: Tensor) -> Tensor:
        """Sum of a small tensor over ranks, the same on every rank; returns a new tensor if there are several."""
        return self._all_reduce(value, dist.ReduceOp.SUM)

    def all_max(self, value: Tensor) -> Tensor:
        """Elementwise maximum of a small tensor over ranks."""
        return self._all_reduce(value, dist.ReduceOp.MAX)

    def _all_reduce(self, value: Tensor, operation: dist.ReduceOp) -> Tensor:
        if self.world_size == 1:
            return value
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value, op=operation, group=self._group)
        return value


def padding_mask(counts: Sequence[int], device: torch.device) -> Tensor | None:
    """[W, n_max] bool, True for real rows; None if every rank has the same number of rows."""
    rows = max(counts)
    if min(counts) == rows:
        return None
    return torch.arange(rows, device=device) < torch.tensor(counts, device=device)[:, None]


def _padded(local: Tensor, rows: int, fill: float = 0) -> Tensor:
    local = local.contiguous()
    if local.shape[0] == rows:
        return local
    return torch.cat([local, local.new_full((rows - local.shape[0], *local.shape[1:]), fill)])
