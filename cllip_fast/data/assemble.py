"""From sample numbers to a `Batch`: read, check, crop, pick texts and regions, tokenise, normalise. The hot path."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from cllip_fast.data.batch import Batch
from cllip_fast.data.crop import Window, choose_window, map_box, sample_rng
from cllip_fast.data.index import Fault, SampleIndex
from cllip_fast.data.record import Record, RecordError, parse_record
from cllip_fast.data.shards import ShardError, ShardReader
from cllip_fast.data.tokenizer import Tokenizer
from cllip_fast.errors import InputError

_MAX_SUBSTITUTES = 100
_Region = tuple[tuple[float, float, float, float], str]  # box in the square, text


class _Sample(NamedTuple):
    """What one sample adds to a batch beside its pixels."""

    key: str
    caption: str
    captions: list[str]
    boxes: list[tuple[float, float, float, float]]
    phrases: list[str]


class _Broken(Exception):
    """A sample that cannot be used; carries the fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Assembler(Dataset):
    """`assembler[epoch, numbers]` makes one batch and lists what was left out. Arguments as in `create_loader`."""

    def __init__(
        self,
        index: SampleIndex,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        text_length: int,
        region_length: int,
        max_regions: int,
        train: bool,
        seed: int,
        crop: str,
        min_kept_area: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self._index, self._reader = index, ShardReader(index.shards)
        self._tokenizer, self._text_length, self._region_length = tokenizer, text_length, region_length
        self._image_size, self._max_regions = image_size, max_regions
        self._train, self._seed, self._crop, self._min_kept_area = train, seed, crop, min_kept_area
        self._padding = np.array([round(255 * value) for value in mean], dtype=np.uint8)
        # (pixel / 255 - mean) / std as one multiplication and one addition
        self._scale = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)

    def __getitem__(self, item: tuple[int, list[int]]) -> tuple[Batch | None, list[Fault]]:
        """The batch of these sample numbers, or None if none of them can be used in evaluation."""
        epoch, numbers = item
        pixels = np.empty((len(numbers), self._image_size, self._image_size, 3), dtype=np.uint8)
        faults: list[Fault] = []
        samples: list[_Sample] = []
        for number in numbers:
            sample = self._load_usable(epoch, number, pixels[len(samples)], faults)
            if sample is not None:
                samples.append(sample)
        return (self._collate(samples, pixels[: len(samples)]) if samples else None), faults

    def _load_usable(self, epoch: int, number: int, pixels: np.ndarray, faults: list[Fault]) -> _Sample | None:
        """The sample; where it is broken its substitute in training, None in evaluation."""
        try:
            return self._load(epoch, number, pixels, faults)
        except _Broken as broken:
            fault = broken.fault
            faults.append(fault)
        if not self._train:
            return None
        rng = sample_rng(self._seed, epoch, self._index.keys[number], "substitute")
        for _ in range(_MAX_SUBSTITUTES):
            try:
                return self._load(epoch, rng.randrange(len(self._index.keys)), pixels, faults)
            except _Broken as broken:
                faults.append(broken.fault)
        raise InputError(
            f"{_MAX_SUBSTITUTES} samples in a row cannot be used; first {fault.shard}: {fault.key}: {fault.detail}"
        )

    def _load(self, epoch: int, number: int, pixels: np.ndarray, faults: list[Fault]) -> _Sample:
        """Read one sample, writing its picture to `pixels` [size, size, 3]; regions left out are added to `faults`."""
        key = self._index.keys[number]
        shard, image_offset, image_size, record_offset, record_size = self._index.places[number].tolist()
        path = str(self._index.shards[shard])
        try:
            record = parse_record(self._reader.read(shard, record_offset, record_size))
            data = self._reader.read(shard, image_offset, image_size)
        except RecordError as error:
            raise _Broken(Fault(error.kind, path, key, str(error))) from error
        except ShardError as error:
            raise _Broken(Fault("unreadable shard", path, key, str(error))) from error
        size = self._image_size
        window = choose_window(self._crop, record.width, record.height, size, seed=self._seed, epoch=epoch, key=key)
        try:
            _decode(data, record, window, self._padding, pixels)
        except _SizeError as error:
            raise _Broken(Fault("size differs from record", path, key, str(error))) from error
        except Exception as error:  # a damaged image makes Pillow fail in many ways, and none may end a long run
            raise _Broken(Fault("broken image", path, key, f"{type(error).__name__}: {error}")) from error
        faults.extend(Fault(kind, path, key, detail) for kind, detail in record.problems)
        placed = [map_box(box, window, size, self._min_kept_area) for box in record.boxes]
        regions = [(box, text) for box, text in zip(placed, record.phrases, strict=True) if box is not None]
        caption, chosen = self._choose(epoch, key, record.captions, regions)
        return _Sample(key, caption, record.captions, [box for box, _ in chosen], [text for _, text in chosen])

    def _choose(self, epoch: int, key: str, captions: list[str], regions: list[_Region]) -> tuple[str, list[_Region]]:
        """One caption and at most M regions: sampled in training, the first ones in evaluation."""
        if not self._train:
            return captions[0], regions[: self._max_regions]
        rng = sample_rng(self._seed, epoch, key, "texts")
        caption = captions[rng.randrange(len(captions))]
        return caption, rng.sample(regions, min(len(regions), self._max_regions))

    def _collate(self, samples: list[_Sample], pixels: np.ndarray) -> Batch:
        count, places = len(samples), self._max_regions
        boxes = np.zeros((count, places, 4), dtype=np.float32)
        region_text = np.zeros((count, places, self._region_length), dtype=np.int64)
        mask = np.zeros((count, places), dtype=bool)
        for i, sample in enumerate(samples):
            mask[i, : len(sample.phrases)] = True
            if sample.boxes:
                boxes[i, : len(sample.boxes)] = sample.boxes
        phrases = [phrase for sample in samples for phrase in sample.phrases]
        region_text[mask] = self._tokenizer.rows(phrases, self._region_length)
        # Moving the channels while they are bytes takes half the time of moving them as floats.
        images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(torch.float32)
        return Batch(
            images=images.mul_(self._scale).add_(self._shift),
            text=self._tokenizer([sample.caption for sample in samples], self._text_length),
            boxes=torch.from_numpy(boxes),
            region_text=torch.from_numpy(region_text),
            region_mask=torch.from_numpy(mask),
            keys=[sample.key for sample in samples],
            captions=[sample.captions for sample in samples],
            phrases=[sample.phrases for sample in samples],
        )


class _SizeError(Exception):
    """The image is not as large as its record says, so its boxes cannot be trusted."""


def _decode(data: bytes, record: Record, window: Window, padding: np.ndarray, pixels: np.ndarray) -> None:
    """Decode the window of an image into `pixels`, uint8 [size, size, 3].

    An EXIF orientation is ignored: boxes refer to the pixels as they are stored.
    """
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    if image.size != (record.width, record.height):
        raise _SizeError(f"image {image.width}×{image.height}, record {record.width}×{record.height}")
    left, top, right, bottom = window.target
    size = (right - left, bottom - top)
    x0, y0, x1, y1 = window.source
    if size != (x1 - x0, y1 - y0):
        # JPEG can be decoded at 1/2, 1/4 or 1/8: take what is still twice as fine as needed.
        scale = max(size[0] / (x1 - x0), size[1] / (y1 - y0)) * 2
        if scale < 1:
            image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
        x_scale, y_scale = image.width / record.width, image.height / record.height
        box = (x0 * x_scale, y0 * y_scale, x1 * x_scale, y1 * y_scale)
        image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    elif size != image.size:
        image = image.convert("RGB").crop(window.source)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    if window.target != (0, 0, pixels.shape[1], pixels.shape[0]):
        pixels[...] = padding
    pixels[top:bottom, left:right] = np.asarray(image)
