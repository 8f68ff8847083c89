"""Signals become requests that the training loop reads: SIGTERM and Ctrl-C to stop, SIGUSR1 to save and go on."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """True once the process has been asked to stop; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self) -> bool:
        return self.signal is not None


class SaveRequest:
    """SIGUSR1 asks for a checkpoint after the current step; the main rank's is the one that counts."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def take(self) -> bool:
        """Whether a signal came since the last call."""
        asked, self.asked = self.asked, False
        return asked
