"""Which samples make up which batch: the slices of the ranks, and where training stands.

Step k of an epoch takes places `k*S` to `(k+1)*S` of the epoch's order (`mixture.py`), S = batch_size × world_size ×
accum_freq, as `accum_freq` global batches one after the other, of which rank r of W takes the r-th slice of
`batch_size` samples. So one rank with 64 sees the same global batches as two ranks with 32. A rest that does not fill
a step is dropped: no step straddles two epochs, all ranks take the same steps, and the next epoch drops others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cllip_fast.data.mixture import Mixture
from cllip_fast.errors import InputError

BatchPlan = list[tuple[int, int]]  # (pass, number) of each sample in one batch of this rank, as in `Mixture.epoch`


class TrainingOrder:
    """Batches without end. Each iteration starts where the state stands and leaves the state alone.

    Attributes:
        accum_freq: batches of a step.
        epoch: of the last step that was handed over whole.
        consumed: samples of that epoch that all ranks together were handed.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        seed: int,
        *,
        data: str,
        tokenizer: str,
        accum_freq: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`data` and `tokenizer` name what the numbers stand for; a state of others is refused."""
        self._mixture, self._batch_size, self.accum_freq = mixture, batch_size, accum_freq
        self._rank, self._global_batch = rank, batch_size * world_size
        self._fixed = {"seed": seed, "size": len(mixture), "data": data, "tokenizer": tokenizer}
        self.epoch, self.consumed = 0, 0

    def __len__(self) -> int:
        return len(self._mixture) // self._step * self.accum_freq

    def __iter__(self) -> Iterator[BatchPlan]:
        epoch, consumed = self.epoch, self.consumed
        order = self._mixture.epoch(epoch)
        while True:
            if consumed + self._step > len(order):
                epoch, consumed = epoch + 1, 0
                order = self._mixture.epoch(epoch)
            first = consumed + self._rank * self._batch_size
            for start in range(first, first + self._step, self._global_batch):
                yield order[start : start + self._batch_size].tolist()
            consumed += self._step

    def hand_over_step(self) -> None:
        """Note that the consumer got one more step; what workers have prepared ahead is no part of the state."""
        if self.at_end_of_epoch:
            self.epoch, self.consumed = self.epoch + 1, 0
        self.consumed += self._step

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether what is left of the epoch fills no step."""
        return self.consumed + self._step > len(self._mixture)

    @property
    def _step(self) -> int:
        return self._global_batch * self.accum_freq

    def state_dict(self) -> dict[str, Any]:
        """The state, valid for any number of ranks and workers."""
        return {"epoch": self.epoch, "samples": self.consumed} | self._fixed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state`; `InputError` if a part is missing or it belongs to another seed, size or data."""
        kinds = {"epoch": int, "samples": int} | {name: type(value) for name, value in self._fixed.items()}
        missing = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
        if missing:
            raise InputError(f"loader state lacks {', '.join(missing)}; expected what Loader.state_dict returned")
        for name, ours in self._fixed.items():
            if state[name] != ours:
                raise InputError(f"loader state has {name} {state[name]}, but this loader has {ours}")
        size = self._fixed["size"]
        if state["epoch"] < 0 or not 0 <= state["samples"] <= size:
            raise InputError(f"loader state has epoch {state['epoch']}, samples {state['samples']} of {size}")
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
            yield [(0, number) for number in range(first, min(first + self._batch_size, self._samples))]
