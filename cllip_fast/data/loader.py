"""Loaders: shards opened, checked and turned into batches, by this process or by workers that change nothing."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cllip_fast.data.assemble import Assembled, Assembler
from cllip_fast.data.batch import Batch
from cllip_fast.data.crop import CROPS
from cllip_fast.data.decode import MAX_PIXELS, Decoder
from cllip_fast.data.faults import FaultCounter
from cllip_fast.data.folders import DatasetInfo, read_dataset_info
from cllip_fast.data.index import expand_shards, index_shards
from cllip_fast.data.mixture import Mixture
from cllip_fast.data.order import EvaluationOrder, TrainingOrder
from cllip_fast.data.tokenizer import Tokenizer
from cllip_fast.data.view import Viewer
from cllip_fast.errors import InputError, check_choice

__all__ = ["DatasetInfo", "Loader", "create_loader", "expand_shards", "read_dataset_info"]

_log = logging.getLogger("cllip_fast.data")

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def create_loader(
    spec: str | Path,
    *,
    tokenizer: Tokenizer,
    batch_size: int,
    image_size: int,
    text_length: int,
    region_length: int,
    max_regions: int,
    train: bool,
    weights: Sequence[float] | None = None,
    resampled: bool = False,
    accum_freq: int = 1,
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    crop: str = "pad",
    min_kept_area: float = 0.5,
    flip: float = 0.0,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    decoder: str = "auto",
    max_pixels: int = MAX_PIXELS,
    max_broken: float = 0.05,
    pin_memory: bool = False,
) -> Loader:
    """Open shards and note where every sample lies.

    Args:
        spec: what to read, as for `expand_shards`.
        batch_size: images in a batch of this rank.
        image_size: side in pixels of the square images.
        text_length, region_length: token columns of captions and of region texts.
        max_regions: M, the region places of an image.
        train: sample one caption and up to M regions of an image, shuffle, and never end; else take all in order, the
            first caption as text and the first M regions.
        weights: in training, each part of `spec` between `::` is a data set of its own and fills this share of every
            epoch (`mixture.py`); None joins the parts. An epoch is as many samples as all parts hold, so that without
            weights each comes once.
        resampled: in training, draw every sample anew, with replacement.
        accum_freq: batches of an optimizer step; what does not fill a whole step is dropped at the end of an epoch.
        seed: of the order, the crops and the sampling.
        workers: processes that prepare batches; 0 prepares them here. The batches do not depend on it.
        rank, world_size: which slice of each global batch is ours.
        crop: "pad", "center" or "random", as in `choose_window`; "random" is for training.
        min_kept_area: share of its area that a region must keep in the crop, else it is dropped.
        flip: share of the training images to mirror; none whose texts tell left from right, as in `choose_flip`.
        mean, std: of the three channels, on a scale from 0 to 1, to normalise by.
        decoder: "pillow", "simplejpeg" or "auto", as in `Decoder`.
        max_pixels: an image with more is left out, by its header, before anything of it is decoded.
        max_broken: share of the last 1000 training samples of this rank that may be broken before training ends.
        pin_memory: put batches into page-locked memory, for copies to a GPU.

    Raises:
        InputError: an argument is out of range, a shard is missing, none of a data set can be read, or training has
            fewer samples than one step. A shard among others that cannot be read is counted in `skipped` and logged.
    """
    at_least = {"batch_size": 1, "image_size": 1, "text_length": 1, "region_length": 1, "max_regions": 0}
    at_least |= {"seed": 0, "workers": 0, "rank": 0, "world_size": 1, "accum_freq": 1, "max_pixels": 1}
    given = locals()
    for name, least in at_least.items():
        if given[name] < least:
            raise InputError(f"{name} is {given[name]}, expected at least {least}")
    for name in ("min_kept_area", "flip", "max_broken"):
        if not 0 <= given[name] <= 1:
            raise InputError(f"{name} is {given[name]}, expected 0 to 1")
    if rank >= world_size:
        raise InputError(f"rank is {rank}, expected less than world_size {world_size}")
    if max_pixels > Image.MAX_IMAGE_PIXELS:
        raise InputError(f"max_pixels is {max_pixels}, expected at most Pillow's own limit {Image.MAX_IMAGE_PIXELS}")
    check_choice("crop", crop, CROPS)
    if crop == "random" and not train:
        raise InputError("crop is 'random' with train=False, expected 'pad' or 'center': evaluation must not be random")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(f"mean is {mean} and std is {std}, expected three numbers each, std positive")
    parts = _data_sets(spec, weights)
    faults = FaultCounter(max_broken if train else 1.0)
    index = index_shards([expand_shards(part) for part in parts], faults)
    samples = len(index.keys)
    if train and samples < batch_size * accum_freq * world_size:
        raise InputError(
            f"{spec} holds {samples} samples, expected at least one step: "
            f"batch_size {batch_size} × accum_freq {accum_freq} × world_size {world_size}"
        )
    viewer = Viewer(image_size, max_regions, train, seed, crop, min_kept_area, flip)
    assembler = Assembler(
        index,
        tokenizer,
        viewer,
        Decoder(decoder, max_pixels),
        text_length=text_length,
        region_length=region_length,
        mean=tuple(mean),
        std=tuple(std),
    )
    if train:
        mixture = Mixture(index.sizes, weights or [1.0], seed, resampled)
        data = f"{index.digest()} weights {list(weights or [])} resampled {resampled}"
        order = TrainingOrder(
            mixture,
            batch_size,
            seed,
            data=data,
            tokenizer=_identity(tokenizer),
            accum_freq=accum_freq,
            rank=rank,
            world_size=world_size,
        )
    else:
        order = EvaluationOrder(samples, batch_size, rank, world_size)
    batches = work_ahead(assembler, order, workers, pin_memory)
    return Loader(Parts(assembler, order, faults), batches, assembler.decoder.name)


def work_ahead(
    dataset: Dataset, order: TrainingOrder | EvaluationOrder, workers: int, pin_memory: bool = False
) -> DataLoader:
    """`dataset[plan]` of each plan of `order`, made by `workers` processes, or here with none; two a worker ahead."""
    return DataLoader(
        dataset,
        sampler=order,
        batch_size=None,  # the data set makes whole batches
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        # PyTorch seeds its workers, which draw nothing, from here and not from the run's own random numbers.
        generator=torch.Generator(),
    )


def _identity(tokenizer: Tokenizer) -> str:
    """The same for tokenizers that give every text the same ids."""
    about = tokenizer.describe()
    return f"{about['kind']} with {about['vocab_size']} ids, SHA-256 {about['sha256'][:16]}"


def _data_sets(spec: str | Path, weights: Sequence[float] | None) -> list[str]:
    """The parts of `spec` that `weights` are for."""
    if weights is None:
        return [str(spec)]
    parts = str(spec).split("::")
    if len(weights) != len(parts):
        raise InputError(f"weights are {list(weights)} for {len(parts)} data sets in {spec}, expected one for each")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(f"weights are {list(weights)}, expected positive numbers")
    return parts


class Parts(NamedTuple):
    """What a loader is made of, whoever decodes: which samples make a batch, in which order, and what was left out."""

    assembler: Assembler
    order: TrainingOrder | EvaluationOrder
    faults: FaultCounter


class Loader:
    """Iterates over batches; made by `create_loader`.

    Attributes:
        parts: what it is made of, for a loader of another kind to share.
        samples: number of samples in the shards.
        decoder: the library that decodes JPEGs.
    """

    # Nothing that `batches` holds may refer back to this object: worker processes stop at once when it is dropped,
    # but only after timeouts of several seconds each when Python has to find a cycle first.
    def __init__(self, parts: Parts, batches: Iterable[Assembled], decoder: str) -> None:
        self.parts, self._batches, self.decoder = parts, batches, decoder
        _, self._order, self._faults = parts
        self.samples = len(parts.assembler.index.keys)

    @property
    def skipped(self) -> Counter[str]:
        """How often each kind of unusable shard, sample or region was left out so far, on this rank."""
        return self._faults.counts

    @property
    def counts(self) -> dict[str, int]:
        """Samples on this rank since it was made: `samples_total` asked for = `samples_seen` + `samples_skipped`.

        In training a substitute, which is none of them, took the place of each that was skipped.
        """
        total, skipped = self._faults.total, self._faults.skipped
        return {"samples_seen": total - skipped, "samples_skipped": skipped, "samples_total": total}

    @property
    def epoch(self) -> int:
        """The epoch of the last whole training step."""
        return self._training_order().epoch

    def __len__(self) -> int:
        """Batches of this rank in an epoch; the last smaller one counts in evaluation."""
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        """One pass in order, for evaluation; ranks may get different numbers of batches.

        Raises:
            InputError: the loader was made for training.
        """
        if isinstance(self._order, TrainingOrder):
            raise InputError("this loader was made with train=True; iterate over loader.forever()")
        for assembled in self._batches:
            self._faults.add_batch(assembled.asked, assembled.broken, assembled.faults)
            if assembled.batch is not None:
                yield assembled.batch

    def forever(self) -> Iterator[Batch]:
        """Training batches without end, from where the state stands. Use one such iterator at a time.

        The state moves on with the last batch of each step: a step that was begun is taken again. At the end of every
        epoch the log says how many samples were seen and skipped.

        Raises:
            InputError: the loader was made for evaluation; later, if more samples are broken than `max_broken` allows.
        """
        order = self._training_order()
        for number, assembled in enumerate(self._batches, start=1):
            self._faults.add_batch(assembled.asked, assembled.broken, assembled.faults)
            if number % order.accum_freq == 0:
                order.hand_over_step()
                if order.at_end_of_epoch:
                    _log.info("epoch %d ends: %s", order.epoch, self._faults.describe())
            yield assembled.batch

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, for any number of ranks and workers: `samples` of this `epoch` over all ranks.

        It names the samples, weights and seed on which the order depends, and the tokenizer: equal on all ranks that
        read the same data.
        """
        return self._training_order().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; takes effect at the next call of `forever`.

        Raises:
            InputError: a part is missing, or the state is of another seed or tokenizer, or other samples or weights.
        """
        self._training_order().load_state_dict(state)

    def _training_order(self) -> TrainingOrder:
        if not isinstance(self._order, TrainingOrder):
            raise InputError("this loader was made with train=False; iterate over the loader itself")
        return self._order
