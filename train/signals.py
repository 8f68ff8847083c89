"""SIGTERM and Ctrl-C become a request to stop after the current step."""

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
