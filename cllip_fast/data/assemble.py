"""From sample numbers to a `Batch`: read, check, choose the view, decode, tokenise, normalise. The hot path."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cllip_fast.data.batch import Batch
from cllip_fast.data.crop import sample_rng
from cllip_fast.data.decode import Decoder, ImageError
from cllip_fast.data.faults import Fault
from cllip_fast.data.index import SampleIndex
from cllip_fast.data.order import BatchPlan
from cllip_fast.data.record import RecordError, parse_record
from cllip_fast.data.shards import ShardError, ShardReader
from cllip_fast.data.tokenizer import Tokenizer
from cllip_fast.data.view import Viewer
from cllip_fast.errors import InputError

_MAX_SUBSTITUTES = 100


class Assembled(NamedTuple):
    """A batch, or None where no sample of it can be used, and what was left out on the way.

    Attributes:
        asked: samples that the batch was to hold.
        broken: why samples could not be used, one fault each.
        faults: regions left out of samples that could.
    """

    batch: Batch | None
    asked: int
    broken: list[Fault]
    faults: list[Fault]


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
    """`assembler[plan]` makes the batch of a plan. Arguments as in `create_loader`."""

    def __init__(
        self,
        index: SampleIndex,
        tokenizer: Tokenizer,
        viewer: Viewer,
        decoder: Decoder,
        *,
        text_length: int,
        region_length: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self._index, self._reader = index, ShardReader(index.shards)
        self._tokenizer, self._text_length, self._region_length = tokenizer, text_length, region_length
        self._viewer, self.decoder = viewer, decoder
        self._padding = np.array([round(255 * value) for value in mean], dtype=np.uint8)
        # (pixel / 255 - mean) / std as one multiplication and one addition
        self._scale = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)

    def __getitem__(self, plan: BatchPlan) -> Assembled:
        size = self._viewer.image_size
        pixels = np.empty((len(plan), size, size, 3), dtype=np.uint8)
        samples: list[_Sample] = []
        broken: list[Fault] = []
        faults: list[Fault] = []
        for epoch, number in plan:
            square = pixels[len(samples)]
            try:
                samples.append(self._load(epoch, number, square, faults))
            except _Broken as error:
                broken.append(error.fault)
                if self._viewer.train:
                    samples.append(self._load_substitute(epoch, number, square))
        batch = self._collate(samples, pixels[: len(samples)]) if samples else None
        return Assembled(batch, len(plan), broken, faults)

    def _load_substitute(self, epoch: int, number: int, square: np.ndarray) -> _Sample:
        """Another sample, drawn from (seed, epoch, key). Its own faults count where it is due, not here."""
        rng = sample_rng(self._viewer.seed, epoch, self._index.keys[number], "substitute")
        for _ in range(_MAX_SUBSTITUTES):
            try:
                return self._load(epoch, rng.randrange(len(self._index.keys)), square, [])
            except _Broken as error:
                fault = error.fault
        raise InputError(
            f"{_MAX_SUBSTITUTES} samples in a row cannot be used; last {fault.shard}: {fault.key}: {fault.detail}"
        )

    def _load(self, epoch: int, number: int, square: np.ndarray, faults: list[Fault]) -> _Sample:
        """Read one sample, writing its picture to `square` [size, size, 3]; regions left out are added to `faults`."""
        key = self._index.keys[number]
        shard, image_offset, image_size, record_offset, record_size = self._index.places[number].tolist()
        path = str(self._index.shards[shard])
        try:
            record = parse_record(self._reader.read(shard, record_offset, record_size))
            view = self._viewer.view(record, key, epoch)
            data = self._reader.read(shard, image_offset, image_size)
            self.decoder.fill(data, (record.width, record.height), view.window, self._padding, square)
        except (RecordError, ImageError) as error:
            raise _Broken(Fault(error.kind, path, key, str(error))) from error
        except ShardError as error:
            raise _Broken(Fault("unreadable shard", path, key, str(error))) from error
        if view.mirrored:
            square[...] = square[:, ::-1].copy()
        faults.extend(Fault(kind, path, key, detail) for kind, detail in record.problems)
        return _Sample(key, view.caption, record.captions, view.boxes, view.phrases)

    def _collate(self, samples: list[_Sample], pixels: np.ndarray) -> Batch:
        count, places = len(samples), self._viewer.max_regions
        boxes = np.zeros((count, places, 4), dtype=np.float32)
        region_text = np.zeros((count, places, self._region_length), dtype=np.int64)
        mask = np.zeros((count, places), dtype=bool)
        for i, sample in enumerate(samples):
            mask[i, : len(sample.phrases)] = True
            if sample.boxes:
                boxes[i, : len(sample.boxes)] = sample.boxes
        phrases = [phrase for sample in samples for phrase in sample.phrases]
        region_text[mask] = self._rows(phrases, self._region_length).numpy()
        # Moving the channels while they are bytes takes half the time of moving them as floats.
        images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(torch.float32)
        return Batch(
            images=images.mul_(self._scale).add_(self._shift),
            text=self._rows([sample.caption for sample in samples], self._text_length),
            boxes=torch.from_numpy(boxes),
            region_text=torch.from_numpy(region_text),
            region_mask=torch.from_numpy(mask),
            keys=[sample.key for sample in samples],
            captions=[sample.captions for sample in samples],
            phrases=[sample.phrases for sample in samples],
        )

    def _rows(self, texts: list[str], length: int) -> torch.Tensor:
        """Token ids int64 [len(texts), length]; equal texts are tokenised once."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        return self._tokenizer(list(places), length)[[places[text] for text in texts]]
