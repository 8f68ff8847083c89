"""From sample numbers to what DALI decodes: files, windows, and beside them texts and boxes as in the plain loader."""

from __future__ import annotations

import functools
import io
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cllip_fast.data.assemble import Assembled, Assembler, _Broken, _Sample
from cllip_fast.data.batch import Batch
from cllip_fast.data.crop import Window
from cllip_fast.data.dali.jpeg import why_not
from cllip_fast.data.decode import ImageError
from cllip_fast.data.faults import Fault
from cllip_fast.data.order import BatchPlan
from cllip_fast.data.record import RecordError, parse_record
from cllip_fast.data.shards import ShardError

_STAND_IN_WINDOW = Window((0, 0, 16, 16), (0, 0, 1, 1))


class Run(NamedTuple):
    """What DALI's graph takes for n pictures, in the order of its inputs. Rows come before columns: (y, x)."""

    files: list[np.ndarray]  # uint8, one array a file
    start: np.ndarray  # int32 [n, 2]: first pixel of the window in the file's picture
    shape: np.ndarray  # int32 [n, 2]: the window's size
    size: np.ndarray  # float32 [n, 2]: what it is resized to
    place: np.ndarray  # float32 [n, 2]: where that lies in the square, as a share of the room there
    mirrored: np.ndarray  # int32 [n]


@dataclass(frozen=True)
class Encoded:
    """A batch whose pictures are still to be decoded.

    Attributes:
        batch: texts and boxes; its images are a stand-in.
        plan: what the batch was made from.
        numbers: the samples' numbers, substitutes in place of what they replace.
        files: uint8, all files one after the other; a tiny JPEG stands in for each that Pillow decoded.
        ends: where in `files` each file ends.
        windows: int64 [B, 2, 4]: source and target of each window.
        mirrored: int32 [B].
        rows: which pictures Pillow decoded.
        squares: uint8 [len(rows), S, S, 3]: those.
        reasons: why they were not for DALI.
    """

    batch: Batch
    plan: BatchPlan
    numbers: list[int]
    files: Tensor
    ends: list[int]
    windows: np.ndarray
    mirrored: np.ndarray
    rows: list[int]
    squares: Tensor
    reasons: Counter[str]

    def __len__(self) -> int:
        return len(self.numbers)

    def for_dali(self) -> set[int]:
        """Numbers of the samples that Pillow has not decoded."""
        rows = set(self.rows)
        return {number for row, number in enumerate(self.numbers) if row not in rows}

    def run(self, rows: range, side: int) -> Run:
        """DALI's input for some of the pictures, in squares of `side` pixels; the files are not copied."""
        files, starts = self.files.numpy(), [0, *self.ends]
        window = self.windows[rows.start : rows.stop]
        source, target = window[:, 0], window[:, 1]
        start, corner = source[:, 1::-1], target[:, 1::-1]
        shape, size = source[:, 3:1:-1] - start, target[:, 3:1:-1] - corner
        return Run(
            [files[starts[row] : self.ends[row]] for row in rows],
            start.astype(np.int32),
            shape.astype(np.int32),
            size.astype(np.float32),
            (corner / np.maximum(side - size, 1)).astype(np.float32),
            self.mirrored[rows.start : rows.stop],
        )


class _Picture(NamedTuple):
    """One sample; without `data` its picture is in its square already."""

    sample: _Sample
    number: int
    data: bytes | None
    window: Window
    mirrored: bool
    reason: str | None


class Encoder(Assembler):
    """`encoder[plan]` is the plain assembler's batch of this plan, with `Encoded` where that has decoded pictures.

    Attributes:
        refused: samples that DALI was found to refuse; Pillow decodes them.
    """

    # The plain assembler's way through a batch is inherited, so that samples are left out and replaced alike; only
    # what becomes of a picture differs.
    @classmethod
    def like(cls, assembler: Assembler, max_decoded_pixels: int) -> Encoder:
        """An encoder for the same samples, texts and views. Larger pictures than stated are not for DALI."""
        made = cls.__new__(cls)
        made.__dict__.update(assembler.__dict__)
        made._max_decoded = min(max_decoded_pixels, assembler.decoder._max_pixels)
        made.refused = set()
        return made

    def normalise(self, squares: Tensor) -> Tensor:
        """uint8 [n, S, S, 3] as float32 [n, 3, S, S], on the same device."""
        scale, shift = self._scale.to(squares.device), self._shift.to(squares.device)
        return squares.permute(0, 3, 1, 2).float() * scale + shift

    def __getitem__(self, plan: BatchPlan) -> Assembled:
        assembled = super().__getitem__(plan)
        if assembled.batch is None:
            return assembled
        return assembled._replace(batch=replace(assembled.batch, plan=plan))

    def _load(self, epoch: int, number: int, square: np.ndarray, faults: list[Fault]) -> _Picture:
        key = self._index.keys[number]
        shard, image_offset, image_size, record_offset, record_size = self._index.places[number].tolist()
        path = str(self._index.shards[shard])
        try:
            record = parse_record(self._reader.read(shard, record_offset, record_size))
            view = self._viewer.view(record, key, epoch)
            data = self._reader.read(shard, image_offset, image_size)
            size = (record.width, record.height)
            reason = self._why_not(number, data, size)
            if reason is not None:
                self.decoder.fill(data, size, view.window, self._padding, square)
        except (RecordError, ImageError) as error:
            raise _Broken(Fault(error.kind, path, key, str(error))) from error
        except ShardError as error:
            raise _Broken(Fault("unreadable shard", path, key, str(error))) from error
        faults.extend(Fault(kind, path, key, detail) for kind, detail in record.problems)
        sample = _Sample(key, view.caption, record.captions, view.boxes, view.phrases)
        if reason is None:
            return _Picture(sample, number, data, view.window, view.mirrored, None)
        if view.mirrored:
            square[...] = square[:, ::-1].copy()
        return _Picture(sample, number, None, _STAND_IN_WINDOW, False, reason)

    def _why_not(self, number: int, data: bytes, size: tuple[int, int]) -> str | None:
        if size[0] * size[1] > self._max_decoded:
            return "large"
        return "refused by DALI" if number in self.refused else why_not(data, size)

    def _collate(self, pictures: list[_Picture], pixels: np.ndarray) -> Encoded:
        rows = [row for row, picture in enumerate(pictures) if picture.data is None]
        files = [stand_in() if picture.data is None else picture.data for picture in pictures]
        return Encoded(
            batch=super()._collate([picture.sample for picture in pictures], pixels[:, :1, :1]),
            plan=[],
            numbers=[picture.number for picture in pictures],
            files=torch.frombuffer(bytearray().join(files), dtype=torch.uint8),
            ends=np.cumsum([len(file) for file in files]).tolist(),
            windows=np.array([picture.window for picture in pictures], dtype=np.int64),
            mirrored=np.array([picture.mirrored for picture in pictures], dtype=np.int32),
            rows=rows,
            squares=torch.from_numpy(pixels[rows]),
            reasons=Counter(picture.reason for picture in pictures if picture.reason is not None),
        )


@functools.cache
def stand_in() -> bytes:
    """A JPEG of 16 × 16 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return file.getvalue()


def stand_in_run() -> Run:
    """A run of one picture that every DALI must be able to decode."""
    origin, size, one = np.int32([[0, 0]]), np.int32([[16, 16]]), np.float32([[1, 1]])
    return Run([np.frombuffer(stand_in(), dtype=np.uint8)], origin, size, one, np.float32([[0, 0]]), np.int32([0]))
