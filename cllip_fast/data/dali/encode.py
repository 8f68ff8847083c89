"""From sample numbers to what DALI decodes: files, windows, and beside them texts and boxes as in the plain loader."""

from __future__ import annotations

import functools
import io
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cllip_fast.data.assemble import Assembled, Assembler, Sample, Source
from cllip_fast.data.batch import Batch
from cllip_fast.data.crop import Window
from cllip_fast.data.dali.jpeg import why_not
from cllip_fast.data.order import BatchPlan

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
        batch: texts and boxes, tokenised; its images are empty.
        plan: what the batch was made from.
        numbers: the samples' numbers, substitutes in place of what they replace.
        files: uint8, all files one after the other; a tiny JPEG stands in for each that Pillow decoded.
        ends: where in `files` each file ends.
        windows: int64 [B, 2, 4]: source and target of each window.
        mirrored: int32 [B].
        rows: which pictures Pillow decoded.
        squares: float32 [len(rows), 3, S, S]: those, normalised.
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
    """What DALI gets of one sample; `reason` says why it gets a stand-in, and the picture is in its square already."""

    number: int
    data: bytes
    window: Window
    mirrored: bool
    reason: str | None


class Encoder(Dataset):
    """`encoder[plan]` is the assembler's batch of this plan, with `Encoded` where that has decoded pictures.

    Attributes:
        assembler: finds samples, substitutes and texts, and decodes what is not for DALI.
        refused: numbers of samples that DALI was found to refuse; Pillow decodes them.
    """

    def __init__(self, assembler: Assembler, max_decoded_pixels: int) -> None:
        """Larger pictures than stated are not for DALI."""
        self.assembler, self.refused = assembler, set[int]()
        self._max_decoded = min(max_decoded_pixels, assembler.decoder.max_pixels)

    def __getitem__(self, plan: BatchPlan) -> Assembled:
        samples, squares, broken, faults = self.assembler.gather(plan, self._place)
        encoded = self._encode(plan, samples, squares) if samples else None
        return Assembled(encoded, len(plan), broken, faults)

    def _place(self, source: Source, square: np.ndarray) -> _Picture:
        reason = self._why_not(source)
        if reason is None:
            return _Picture(source.number, source.data, source.view.window, source.view.mirrored, None)
        self.assembler.place(source, square)
        return _Picture(source.number, stand_in(), _STAND_IN_WINDOW, False, reason)

    def _why_not(self, source: Source) -> str | None:
        if source.size[0] * source.size[1] > self._max_decoded:
            return "large"
        return "refused by DALI" if source.number in self.refused else why_not(source.data, source.size)

    def _encode(self, plan: BatchPlan, samples: list[Sample], squares: np.ndarray) -> Encoded:
        pictures: list[_Picture] = [sample.picture for sample in samples]
        rows = [row for row, picture in enumerate(pictures) if picture.reason is not None]
        return Encoded(
            batch=self.assembler.collate(samples, torch.empty(0)),
            plan=plan,
            numbers=[picture.number for picture in pictures],
            files=torch.frombuffer(bytearray().join(picture.data for picture in pictures), dtype=torch.uint8),
            ends=np.cumsum([len(picture.data) for picture in pictures]).tolist(),
            windows=np.array([picture.window for picture in pictures], dtype=np.int64),
            mirrored=np.array([picture.mirrored for picture in pictures], dtype=np.int32),
            rows=rows,
            squares=self.assembler.normalise(squares[rows]),
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
