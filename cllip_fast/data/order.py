"""Which samples make up which batch: the order of an epoch, the slices of the ranks, and where training stands.

The order of an epoch is a permutation drawn from (seed, epoch). Global batch k is `order[k*W*b : (k+1)*W*b]` and rank r
of W takes the r-th slice of b samples, so one rank with 64 sees the same global batches as two ranks with 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from cllip_fast.errors import InputError

BatchPlan = tuple[int, list[int]]  # epoch, sample numbers of one batch of this rank


class TrainingOrder:
    """Shuffled batches without end. Each iteration starts where the state stands and leaves the state alone.

    Attributes:
        epoch: of the last batch that was handed over.
        consumed: samples of that epoch that all ranks together were handed.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self._samples, self._batch_size, self._seed, self._rank = samples, batch_size, seed, rank
        self._global_batch = batch_size * world_size
        self.epoch, self.consumed = 0, 0

    def __len__(self) -> int:
        return self._samples // self._global_batch

    def __iter__(self) -> Iterator[BatchPlan]:
        epoch, consumed = self.epoch, self.consumed
        while True:
            epoch, consumed = self._next(epoch, consumed)
            first = consumed - self._global_batch + self._rank * self._batch_size
            numbers = _permutation(self._seed, epoch, self._samples)[first : first + self._batch_size]
            yield epoch, numbers.tolist()

    def hand_over(self) -> None:
        """Note that the consumer got one more batch; what workers have prepared ahead is no part of the state."""
        self.epoch, self.consumed = self._next(self.epoch, self.consumed)

    def _next(self, epoch: int, consumed: int) -> tuple[int, int]:
        """State after one more global batch; a rest that does not fill one is dropped."""
        if consumed + self._global_batch > self._samples:
            return epoch + 1, self._global_batch
        return epoch, consumed + self._global_batch

    def state_dict(self) -> dict[str, Any]:
        """The state, valid for any number of ranks and workers."""
        return {"epoch": self.epoch, "samples": self.consumed, "seed": self._seed, "size": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state`; `InputError` if a part is missing or it belongs to another seed or number of samples."""
        missing = [name for name in ("epoch", "samples", "seed", "size") if not isinstance(state.get(name), int)]
        if missing:
            raise InputError(f"loader state lacks {', '.join(missing)}; expected what Loader.state_dict returned")
        for name, ours in (("seed", self._seed), ("size", self._samples)):
            if state[name] != ours:
                raise InputError(f"loader state has {name} {state[name]}, but this loader has {ours}")
        if state["epoch"] < 0 or not 0 <= state["samples"] <= self._samples:
            raise InputError(f"loader state has epoch {state['epoch']}, samples {state['samples']} of {self._samples}")
        self.epoch, self.consumed = state["epoch"], state["samples"]


class EvaluationOrder:
    """Every sample once, as stored; the last global batch may be smaller, and ranks without a share of it get none."""

    def __init__(self, samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self._samples, self._batch_size = samples, batch_size
        self._firsts = range(rank * batch_size, samples, world_size * batch_size)

    def __len__(self) -> int:
        return len(self._firsts)

    def __iter__(self) -> Iterator[BatchPlan]:
        for first in self._firsts:
            yield 0, list(range(first, min(first + self._batch_size, self._samples)))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The sample numbers of an epoch, the same wherever they are drawn."""
    return np.random.default_rng([seed, epoch]).permutation(samples)
