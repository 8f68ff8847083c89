"""Steps whose loss or gradient is not finite: the optimizer skips them; here they are written down, and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cllip_fast.data import Batch
from cllip_fast.errors import InputError
from cllip_fast.train.distributed import World
from cllip_fast.train.reports import JsonLines


class SkippedSteps:
    """Holds the keys and losses of an interval's steps until it is known, once an interval, which were skipped.

    Those are written to `file` with the keys of every rank's batch: {"step", "losses", "keys": [a list a rank]}.

    Args:
        file: skipped.jsonl of the run.
        limit: as many in a row end the run.
        start: the step after which the run goes on.
        say: prints.
    """

    def __init__(
        self, file: Path, limit: int, start: int, model: nn.Module, world: World, say: Callable[[str], None]
    ) -> None:
        self.file, self.limit, self.model, self.world, self.say = file, limit, model, world, say
        self._lines = JsonLines(file, start) if world.is_main else None
        self._steps: list[tuple[int, list[str], Mapping[str, Tensor]]] = []
        self._flags: list[Tensor] = []
        self._in_row = 0

    def add(self, step: int, batches: Sequence[Batch], losses: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Take a step: its micro-batches, its losses, and whether it was skipped (1 or 0, the same on all ranks)."""
        self._steps.append((step, [key for batch in batches for key in batch.keys], losses))
        self._flags.append(skipped.reshape(()))

    def check(self) -> None:
        """Look at the steps since the last call; call it at the same steps on all ranks.

        Raises:
            InputError: too many steps in a row were skipped, or a parameter is not finite.
        """
        skipped = torch.stack(self._flags).tolist() if self._flags else []
        steps, self._steps, self._flags = self._steps, [], []
        for flag in skipped:
            self._in_row = self._in_row + 1 if flag else 0
            if self._in_row == self.limit:
                break
        bad = [step for step, flag in zip(steps, skipped, strict=True) if flag]
        if not bad:
            return
        self._write(bad)
        broken = [name for name, parameter in self.model.named_parameters() if not _own(parameter).isfinite().all()]
        if broken:
            raise InputError(
                f"{len(broken)} parameters are not finite, first {broken[0]}, and no step can mend them; step "
                f"{bad[0][0]} was the first in this interval to be skipped: {self.file} has its batch. "
                "--resume takes an earlier checkpoint"
            )
        if self._in_row >= self.limit:
            raise InputError(
                f"{self.limit} steps in a row, up to step {bad[-1][0]}, had a loss or gradient that is not finite "
                f"(--max-skipped); {self.file} has their losses and the keys of their batches"
            )

    def _write(self, bad: list[tuple[int, list[str], Mapping[str, Tensor]]]) -> None:
        keys: list[list[list[str]]] = [[keys for _, keys, _ in bad]]
        if self.world.group is not None:
            gathered = [None] * self.world.size if self.world.is_main else None
            dist.gather_object(keys[0], gathered, group=self.world.patient)
            keys = gathered
        if self._lines is None:
            return
        for number, (step, _, losses) in enumerate(bad):
            values = {name: str(float(value)) for name, value in losses.items()}  # "nan" and "inf" are the point here
            try:
                self._lines.write(step, {"losses": values, "keys": [of_rank[number] for of_rank in keys]})
            except OSError as error:
                self.say(f"warning: {self.file} cannot be written: {error}")


def _own(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, which is all of it unless it is sharded."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
