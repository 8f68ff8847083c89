"""`shards index`: the index files that DALI's WebDataset reader takes as `index_paths`; without, it scans the tars.

Format v1.2, as DALI's own `wds2idx` writes it: a line "v1.2 N", then a line a sample with "suffix offset size name"
for each of its files, all separated by single spaces; offset and size are in bytes, of the file's data in the tar.
Unlike there, only samples with image and record are listed, in training's order, so that sample i is the same in both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from cllip_fast.data.faults import Fault
from cllip_fast.data.samples import Sample
from cllip_fast.data.shards import Member
from cllip_fast.errors import InputError
from cllip_fast.shard_tools.files import written_whole
from cllip_fast.shard_tools.samples import find_samples

_VERSION = "v1.2"


@dataclass
class IndexSummary:
    """What was written and left out.

    Attributes:
        written: the index files.
        missing: shards without a sample to list, which got none.
        samples: how many are listed in all.
        faults: what is not listed.
    """

    written: list[Path] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    samples: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def left_out(self) -> Counter[str]:
        """`faults` by kind."""
        return Counter(fault.kind for fault in self.faults)


def write_indices(paths: list[Path], out: Path | None = None) -> IndexSummary:
    """Write `name.idx` for each `name.tar`, whole or not at all; an older one is replaced. Images are not decoded.

    Args:
        paths: the shards.
        out: folder for the index files, made if need be; None writes each beside its tar.

    Raises:
        InputError: two shards would share an index file, or one cannot be written.
    """
    targets = [(out or path.parent) / f"{path.stem}.idx" for path in paths]
    for target, count in Counter(targets).items():
        if count > 1:
            raise InputError(
                f"{count} shards would be indexed as {target}, expected one; index them one folder at a time"
            )
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out {out} cannot be made: {error.strerror}") from error
    summary = IndexSummary()
    for path, target in tqdm(
        list(zip(paths, targets, strict=True)), desc="indexing", unit=" shards", delay=2, leave=False
    ):
        samples, faults = find_samples(path)
        summary.faults += faults
        lines = []
        for sample in samples:
            # The fields of a line are separated by spaces, and there is no way to quote one.
            if any(" " in member.name for member in sample.members):
                summary.faults.append(Fault("name with a space", str(path), sample.key, "the format cannot express it"))
            else:
                lines.append(_line(sample))
        if not lines:
            summary.missing.append(path)
            continue
        with written_whole(target) as file:
            file.write(f"{_VERSION} {len(lines)}\n")
            file.writelines(lines)
        summary.written.append(target)
        summary.samples += len(lines)
    return summary


def _line(sample: Sample) -> str:
    def suffix(member: Member) -> str:
        return member.name[len(sample.key) + 1 :]  # in its own case, which DALI's reader minds

    fields = [f"{suffix(m)} {m.offset} {m.size} {m.name}" for m in sample.members if suffix(m)]
    return " ".join(fields) + "\n"
