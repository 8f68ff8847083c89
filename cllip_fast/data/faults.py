"""What could not be used: counted by kind, the first of each kind logged, and a run ended when there is too much."""

from __future__ import annotations

import logging
from collections import Counter, deque
from typing import NamedTuple

from cllip_fast.errors import InputError

WINDOW = 1000  # samples over which the share of broken ones is taken
_log = logging.getLogger("cllip_fast.data")


class Fault(NamedTuple):
    """Something that was left out: its kind, where it was, and what was wrong with it."""

    kind: str
    shard: str
    key: str
    detail: str


class FaultCounter:
    """Counts samples and faults.

    Attributes:
        counts: of each kind of fault: shards and members, samples, regions.
        total: samples asked for so far.
        skipped: how many of them were broken; `total - skipped` were seen.
    """

    def __init__(self, max_broken: float = 1.0) -> None:
        """`max_broken`: share of the last `WINDOW` samples that may be broken."""
        self.counts: Counter[str] = Counter()
        self.total = self.skipped = 0
        self._max_broken = max_broken
        self._recent: deque[tuple[int, list[Fault]]] = deque()  # (samples, broken ones) of a batch, WINDOW samples
        self._held = 0

    def add(self, faults: list[Fault]) -> None:
        """Count `faults`; the first of each kind goes to the log as a warning."""
        for fault in faults:
            self.counts[fault.kind] += 1
            if self.counts[fault.kind] == 1:
                place = f"{fault.shard}: {fault.key}" if fault.key else fault.shard
                _log.warning("skipped (%s) %s: %s; more of this kind are only counted", fault.kind, place, fault.detail)

    def add_batch(self, samples: int, broken: list[Fault], faults: list[Fault]) -> None:
        """Count a batch for which `samples` were asked; one entry of `broken` for each that could not be used.

        Raises:
            InputError: more than the stated share of the last samples were broken.
        """
        self.add(broken + faults)
        self.total += samples
        self.skipped += len(broken)
        self._recent.append((samples, broken))
        self._held += samples
        while self._held - self._recent[0][0] >= WINDOW:
            self._held -= self._recent.popleft()[0]
        if broken:
            self._check_share()

    def _check_share(self) -> None:
        recent = [fault for _, broken in self._recent for fault in broken]
        # Until the window is full, what is to come counts as good: a few bad samples at the start end no run.
        if len(recent) > self._max_broken * max(self._held, WINDOW):
            kinds = _listed(Counter(fault.kind for fault in recent))
            last = recent[-1]
            raise InputError(
                f"{len(recent)} of the last {self._held} samples cannot be used ({kinds}), more than max_broken "
                f"{self._max_broken:g} of {max(self._held, WINDOW)}; last {last.shard}: {last.key}: {last.detail}"
            )

    def describe(self) -> str:
        """One line: seen + skipped = total, and the kinds."""
        left_out = f"; left out: {_listed(self.counts)}" if self.counts else ""
        return f"{self.total - self.skipped} samples seen + {self.skipped} skipped = {self.total}{left_out}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
