"""SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and the end of the run; all ranks agree after which step."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

UNFINISHED = 75
"""Exit code of a run that was asked to end before it was done: EX_TEMPFAIL of sysexits.h, "try again later"."""


class StopRequest:
    """True once this process has been asked to stop; a second Ctrl-C ends it at once.

    Args:
        group: the ranks that stop together, a group of CPU tensors; None: this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.signal: str | None = None
        self._group = group
        self._votes: torch.Tensor | None = None
        self._vote: dist.Work | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    def agreed(self) -> bool:
        """Whether some rank has been asked: the same answer on all ranks. Call it once a step on each.

        The votes travel while the next step is computed, so that nothing waits for them: on several ranks the answer
        is the last call's.
        """
        if self._group is None:
            return bool(self)
        answer = False
        if self._vote is not None:
            self._vote.wait()
            answer = bool(self._votes.item())
        self._votes = torch.tensor([float(bool(self))])
        self._vote = dist.all_reduce(self._votes, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer
