"""From sample numbers to a `Batch`: read, check, choose the view, decode, tokenise, normalise. The hot path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cllip_fast.data.batch import Batch
from cllip_fast.data.crop import sample_rng
from cllip_fast.data.decode import Decoder, ImageError
from cllip_fast.data.faults import Fault
from cllip_fast.data.index import SampleIndex
from cllip_fast.data.normalise import Normalise
from cllip_fast.data.order import BatchPlan
from cllip_fast.data.record import RecordError, parse_record
from cllip_fast.data.shards import ShardError, ShardReader
from cllip_fast.data.tokenizer import Tokenizer
from cllip_fast.data.view import View, Viewer
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


class Source(NamedTuple):
    """A sample's image on the way to its square.

    Attributes:
        number: of the sample in the index.
        data: the image file.
        size: width and height that the record states.
        view: what of it the model is to see.
    """

    number: int
    data: bytes
    size: tuple[int, int]
    view: View


class Sample(NamedTuple):
    """What one sample adds to a batch; `picture` is what its `Placer` returned."""

    key: str
    captions: list[str]
    view: View
    picture: Any


Placer = Callable[[Source, np.ndarray], Any]
"""Fills a square, uint8 [S, S, 3], or returns what is left to be done; raises `ImageError`."""


class Gathered(NamedTuple):
    """The samples of a batch, substitutes in their places, as `Assembler.gather` finds them.

    Attributes:
        samples: n of them.
        squares: uint8 [n, S, S, 3], as far as the placer has filled them.
        broken, faults: as in `Assembled`.
    """

    samples: list[Sample]
    squares: np.ndarray
    broken: list[Fault]
    faults: list[Fault]


class _Broken(Exception):
    """A sample that cannot be used; carries the fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Assembler(Dataset):
    """`assembler[plan]` makes the batch of a plan. Arguments as in `create_loader`.

    A loader with a decoder of its own uses the parts: `gather` with its own `Placer`, `collate` and `normalise`.

    Attributes:
        index: the samples.
        image_size: S, side of the squares.
        decoder: of the images.
        normalise: squares of bytes to images.
    """

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
        self.index, self._reader = index, ShardReader(index.shards)
        self._tokenizer, self._text_length, self._region_length = tokenizer, text_length, region_length
        self._viewer, self.decoder, self.image_size = viewer, decoder, viewer.image_size
        self.normalise = Normalise(mean, std)

    def __getitem__(self, plan: BatchPlan) -> Assembled:
        samples, squares, broken, faults = self.gather(plan, self.place)
        batch = self.collate(samples, self.normalise(squares)) if samples else None
        return Assembled(batch, len(plan), broken, faults)

    def gather(self, plan: BatchPlan, place: Placer) -> Gathered:
        """The usable samples of `plan`, in training with a substitute for each of the others.

        Raises:
            InputError: no substitute is found.
        """
        squares = np.empty((len(plan), self.image_size, self.image_size, 3), dtype=np.uint8)
        samples: list[Sample] = []
        broken: list[Fault] = []
        faults: list[Fault] = []
        for epoch, number in plan:
            square = squares[len(samples)]
            try:
                samples.append(self._load(epoch, number, place, square, faults))
            except _Broken as error:
                broken.append(error.fault)
                if self._viewer.train:
                    samples.append(self._load_substitute(epoch, number, place, square))
        return Gathered(samples, squares[: len(samples)], broken, faults)

    def place(self, source: Source, square: np.ndarray) -> None:
        """Decode an image into its square: the plain loader's `Placer`."""
        self.decoder.fill(source.data, source.size, source.view.window, self.normalise.padding, square)
        if source.view.mirrored:
            square[...] = square[:, ::-1].copy()

    def collate(self, samples: list[Sample], images: Tensor) -> Batch:
        """The batch of n samples with their `images`; texts are tokenised here."""
        count, places = len(samples), self._viewer.max_regions
        boxes = np.zeros((count, places, 4), dtype=np.float32)
        region_text = np.zeros((count, places, self._region_length), dtype=np.int64)
        mask = np.zeros((count, places), dtype=bool)
        for i, sample in enumerate(samples):
            mask[i, : len(sample.view.phrases)] = True
            if sample.view.boxes:
                boxes[i, : len(sample.view.boxes)] = sample.view.boxes
        phrases = [phrase for sample in samples for phrase in sample.view.phrases]
        region_text[mask] = self._rows(phrases, self._region_length).numpy()
        return Batch(
            images=images,
            text=self._rows([sample.view.caption for sample in samples], self._text_length),
            boxes=torch.from_numpy(boxes),
            region_text=torch.from_numpy(region_text),
            region_mask=torch.from_numpy(mask),
            keys=[sample.key for sample in samples],
            captions=[sample.captions for sample in samples],
            phrases=[sample.view.phrases for sample in samples],
        )

    def _load(self, epoch: int, number: int, place: Placer, square: np.ndarray, faults: list[Fault]) -> Sample:
        """Read and place one sample; regions left out are added to `faults`."""
        key = self.index.keys[number]
        shard, image_offset, image_size, record_offset, record_size = self.index.places[number].tolist()
        path = str(self.index.shards[shard])
        try:
            record = parse_record(self._reader.read(shard, record_offset, record_size))
            view = self._viewer.view(record, key, epoch)
            data = self._reader.read(shard, image_offset, image_size)
            picture = place(Source(number, data, (record.width, record.height), view), square)
        except (RecordError, ImageError) as error:
            raise _Broken(Fault(error.kind, path, key, str(error))) from error
        except ShardError as error:
            raise _Broken(Fault("unreadable shard", path, key, str(error))) from error
        faults.extend(Fault(kind, path, key, detail) for kind, detail in record.problems)
        return Sample(key, record.captions, view, picture)

    def _load_substitute(self, epoch: int, number: int, place: Placer, square: np.ndarray) -> Sample:
        """Another sample, drawn from (seed, epoch, key). Its own faults count where it is due, not here."""
        rng = sample_rng(self._viewer.seed, epoch, self.index.keys[number], "substitute")
        for _ in range(_MAX_SUBSTITUTES):
            try:
                return self._load(epoch, rng.randrange(len(self.index.keys)), place, square, [])
            except _Broken as error:
                fault = error.fault
        raise InputError(
            f"{_MAX_SUBSTITUTES} samples in a row cannot be used; last {fault.shard}: {fault.key}: {fault.detail}"
        )

    def _rows(self, texts: list[str], length: int) -> Tensor:
        """Token ids int64 [len(texts), length]; equal texts are tokenised once."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        return self._tokenizer(list(places), length)[[places[text] for text in texts]]
