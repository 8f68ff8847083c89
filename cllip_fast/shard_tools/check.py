"""`shards check`: everything that training would skip, by kind, and what it would use but somebody should look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from cllip_fast.data.decode import MAX_PIXELS
from cllip_fast.data.faults import Fault
from cllip_fast.data.samples import Sample
from cllip_fast.errors import InputError
from cllip_fast.shard_tools.files import printable
from cllip_fast.shard_tools.pool import examine_all
from cllip_fast.shard_tools.samples import find_samples

NOTED = ("duplicate key", "box partly outside", "differs from schema")  # kinds that training does not skip
_FIRST = 3


@dataclass
class Report:
    """What a check found.

    Attributes:
        shards, samples, usable: how many were looked at, and how many samples training can use.
        counts: findings by kind.
        places: the findings of each kind: all of them, or the first few.
        keep_all: keep them all.
    """

    shards: int = 0
    samples: int = 0
    usable: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[Fault]] = field(default_factory=dict)
    keep_all: bool = False

    def add(self, fault: Fault) -> None:
        """Count a finding."""
        self.counts[fault.kind] += 1
        places = self.places.setdefault(fault.kind, [])
        if self.keep_all or len(places) < _FIRST:
            places.append(fault)

    @property
    def skipped(self) -> Counter[str]:
        """The kinds that training would skip: shards, samples, members, regions or captions."""
        return Counter({kind: count for kind, count in self.counts.items() if kind not in NOTED})

    @property
    def noted(self) -> Counter[str]:
        """The kinds that training would use all the same."""
        return Counter({kind: count for kind, count in self.counts.items() if kind in NOTED})

    def as_text(self) -> str:
        """Counts by kind with the first few places."""
        lines = [f"{self.shards} shards, {self.samples} samples, {self.usable} of them usable"]
        lines += ["training would skip nothing"] * (not self.skipped)
        for title, counts in (("training would skip", self.skipped), ("used, but look at", self.noted)):
            lines += [f"{title}:"] * bool(counts)
            for kind, count in counts.most_common():
                lines.append(f"  {count} × {kind}")
                lines += [f"      {place_of(fault)}" for fault in self.places[kind][:_FIRST]]
                lines += ["      …"] * (count > _FIRST)
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts, and each kept finding as shard, key, detail."""

        def listed(counts: Counter[str]) -> dict[str, Any]:
            return {
                kind: {
                    "count": count,
                    "places": [dict(zip(Fault._fields[1:], f[1:], strict=True)) for f in self.places[kind]],
                }
                for kind, count in counts.most_common()
            }

        totals = {"shards": self.shards, "samples": self.samples, "usable": self.usable}
        return totals | {"skipped": listed(self.skipped), "noted": listed(self.noted)}


def check_shards(
    paths: list[Path], *, workers: int = 0, max_pixels: int = MAX_PIXELS, keep_all: bool = False
) -> Report:
    """Examine every sample of `paths`; arguments and errors as for `examine_shards`."""
    report = Report(keep_all=keep_all)
    for _ in examine_shards(paths, report, workers=workers, max_pixels=max_pixels):
        pass
    return report


def examine_shards(
    paths: list[Path], report: Report, *, workers: int = 0, max_pixels: int = MAX_PIXELS
) -> Iterator[Sample]:
    """The usable samples of `paths` in order, while all findings are added to `report`; shows a progress bar.

    Args:
        workers: processes that read and decode; 0 does it here. The findings do not depend on it.
        max_pixels: larger images are not decoded but reported, as by `create_loader`.

    Raises:
        InputError: an argument is out of range.
    """
    if workers < 0:
        raise InputError(f"workers is {workers}, expected at least 0")
    if not 1 <= max_pixels <= Image.MAX_IMAGE_PIXELS:
        raise InputError(f"max_pixels is {max_pixels}, expected 1 to Pillow's own limit {Image.MAX_IMAGE_PIXELS}")
    total = sum(path.stat().st_size for path in paths if path.is_file())
    with tqdm(total=total, desc="checking shards", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for sample, verdict in examine_all(_list_all(paths, report), max_pixels, workers):
            for kind, detail in verdict.problems:
                report.add(Fault(kind, str(sample.path), sample.key, detail))
            report.samples += 1
            report.usable += verdict.usable
            bar.update(sample.tar_bytes)
            if verdict.usable:
                yield sample


def _list_all(paths: list[Path], report: Report) -> Iterator[Sample]:
    """The samples of one shard after the other; notes keys that come again in another shard."""
    first: dict[str, int] = {}
    for number, path in enumerate(paths):
        samples, faults = find_samples(path)
        report.shards += 1
        for fault in faults:
            report.add(fault)
        for sample in samples:
            seen = first.setdefault(sample.key, number)
            if seen != number:
                report.add(Fault("duplicate key", str(path), sample.key, f"also in {paths[seen]}"))
            yield sample


def place_of(fault: Fault) -> str:
    """Shard, key if there is one, and detail, on one line."""
    parts = [fault.shard, *([fault.key] if fault.key else []), fault.detail]
    return printable(": ".join(parts))
