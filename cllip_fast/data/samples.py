"""The samples of one shard: members by key, and what is left out before anything is read. Loaders and tools use it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cllip_fast.data.faults import Fault
from cllip_fast.data.shards import IMAGE_SUFFIXES, RECORD_SUFFIX, Member, list_members, split_name

# What is read into memory at once. A record's objects take some twenty times its bytes.
MAX_IMAGE_BYTES = 1 << 28
MAX_RECORD_BYTES = 1 << 22
_BLOCK = 512


class Sample(NamedTuple):
    """A key that has an image and a record.

    Attributes:
        members: all files of the key in the tar's order: the image, the record, and others such as key.txt.
    """

    path: Path
    key: str
    image: Member
    record: Member
    members: list[Member]

    @property
    def tar_bytes(self) -> int:
        """What the sample takes in a tar file: a header and whole blocks for each file."""
        return sum(_BLOCK - (-member.size // _BLOCK) * _BLOCK for member in self.members)


def list_samples(path: Path) -> tuple[list[Sample], list[Fault]]:
    """The samples of one shard in the order of their images, and what is left out; nothing is decoded.

    Of several files with the same key and suffix (or several images of a key) the first counts. Files without image
    and record beside them are no sample, and no fault either.

    Raises:
        ShardError: as `list_members`.
    """
    shard = str(path)
    groups: dict[str, dict[str, Member]] = {}
    faults: list[Fault] = []
    for member in list_members(path):
        if member.problem is not None:
            faults.append(Fault(member.problem, shard, ascii(member.name), "such a member is never read"))
            continue
        key, suffix = split_name(member.name)
        group, role = groups.setdefault(key, {}), "image" if suffix in IMAGE_SUFFIXES else f".{suffix}"
        if role in group:
            faults.append(Fault("duplicate member", shard, key, f"a second {suffix} for the same key"))
        else:
            group[role] = member
    samples = []
    for key, group in groups.items():
        image, record = group.get("image"), group.get(f".{RECORD_SUFFIX}")
        if image and record:
            too_large = _too_large("image", image, MAX_IMAGE_BYTES) or _too_large("record", record, MAX_RECORD_BYTES)
            if too_large:
                faults.append(Fault("over the byte limit", shard, key, too_large))
            else:
                samples.append(Sample(path, key, image, record, list(group.values())))
        elif image:
            faults.append(Fault("missing record", shard, key, "an image without .json"))
        elif record:
            faults.append(Fault("missing image", shard, key, "a record without image"))
    if not samples:
        faults.append(Fault("empty shard", shard, "", "it holds no image with a record"))
    return sorted(samples, key=lambda sample: sample.image.offset), faults


def _too_large(name: str, member: Member, limit: int) -> str | None:
    return f"{name} of {member.size} bytes, at most {limit} are read" if member.size > limit else None
