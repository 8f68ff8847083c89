"""Loaders: shards opened, checked and turned into batches, by this process or by workers that change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from cllip_fast.data.assemble import Assembler
from cllip_fast.data.batch import Batch
from cllip_fast.data.crop import CROPS
from cllip_fast.data.folders import DatasetInfo, read_dataset_info
from cllip_fast.data.index import FaultCounter, expand_shards, index_shards
from cllip_fast.data.order import EvaluationOrder, TrainingOrder
from cllip_fast.data.tokenizer import Tokenizer
from cllip_fast.errors import InputError, check_choice

__all__ = ["DatasetInfo", "Loader", "create_loader", "expand_shards", "read_dataset_info"]

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
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    crop: str = "pad",
    min_kept_area: float = 0.5,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
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
        seed: of the order, the crops and the sampling.
        workers: processes that prepare batches; 0 prepares them here. The batches do not depend on it.
        rank, world_size: which slice of each global batch is ours.
        crop: "pad", "center" or "random", as in `choose_window`; "random" is for training.
        min_kept_area: share of its area that a region must keep in the crop, else it is dropped.
        mean, std: of the three channels, on a scale from 0 to 1, to normalise by.
        pin_memory: put batches into page-locked memory, for copies to a GPU.

    Raises:
        InputError: an argument is out of range, a shard is missing, none can be read, or training has fewer samples
            than one global batch. A shard among others that cannot be read is counted in `skipped` and logged.
    """
    at_least = {"batch_size": 1, "image_size": 1, "text_length": 1, "region_length": 1, "max_regions": 0}
    at_least |= {"seed": 0, "workers": 0, "rank": 0, "world_size": 1}
    given = locals()
    for name, least in at_least.items():
        if given[name] < least:
            raise InputError(f"{name} is {given[name]}, expected at least {least}")
    if rank >= world_size:
        raise InputError(f"rank is {rank}, expected less than world_size {world_size}")
    check_choice("crop", crop, CROPS)
    if crop == "random" and not train:
        raise InputError("crop is 'random' with train=False, expected 'pad' or 'center': evaluation must not be random")
    if not 0 <= min_kept_area <= 1:
        raise InputError(f"min_kept_area is {min_kept_area}, expected 0 to 1")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(f"mean is {mean} and std is {std}, expected three numbers each, std positive")
    faults = FaultCounter()
    index = index_shards(expand_shards(spec), faults)
    if train and len(index.keys) < batch_size * world_size:
        raise InputError(
            f"{spec} holds {len(index.keys)} samples, expected at least one global batch: "
            f"batch_size {batch_size} × world_size {world_size}"
        )
    assembler = Assembler(
        index,
        tokenizer,
        image_size=image_size,
        text_length=text_length,
        region_length=region_length,
        max_regions=max_regions,
        train=train,
        seed=seed,
        crop=crop,
        min_kept_area=min_kept_area,
        mean=tuple(mean),
        std=tuple(std),
    )
    samples = len(index.keys)
    order = (
        TrainingOrder(samples, batch_size, seed, rank, world_size)
        if train
        else EvaluationOrder(samples, batch_size, rank, world_size)
    )
    batches = DataLoader(
        assembler,
        sampler=order,
        batch_size=None,  # the assembler makes whole batches
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )
    return Loader(batches, order, faults, samples)


class Loader:
    """Iterates over batches; made by `create_loader`.

    Attributes:
        samples: number of samples in the shards.
    """

    # Nothing that `batches` holds may refer back to this object: worker processes stop at once when it is dropped,
    # but only after timeouts of several seconds each when Python has to find a cycle first.
    def __init__(
        self, batches: DataLoader, order: TrainingOrder | EvaluationOrder, faults: FaultCounter, samples: int
    ) -> None:
        self._batches, self._order, self._faults = batches, order, faults
        self.samples = samples

    @property
    def skipped(self) -> Counter[str]:
        """How often each kind of unusable shard, sample or region was left out so far, on this rank."""
        return self._faults.counts

    @property
    def epoch(self) -> int:
        """The epoch of the last training batch."""
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
        for batch, faults in self._batches:
            self._faults.add(faults)
            if batch is not None:
                yield batch

    def forever(self) -> Iterator[Batch]:
        """Training batches without end, from where the state stands. Use one such iterator at a time.

        Raises:
            InputError: the loader was made for evaluation; later, if hardly any sample can be read.
        """
        order = self._training_order()
        for batch, faults in self._batches:
            self._faults.add(faults)
            order.hand_over()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, for any number of ranks and workers: `samples` of this `epoch` over all ranks."""
        return self._training_order().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; takes effect at the next call of `forever`.

        Raises:
            InputError: a part is missing, or the state is of another seed or another number of samples.
        """
        self._training_order().load_state_dict(state)

    def _training_order(self) -> TrainingOrder:
        if not isinstance(self._order, TrainingOrder):
            raise InputError("this loader was made with train=False; iterate over the loader itself")
        return self._order
