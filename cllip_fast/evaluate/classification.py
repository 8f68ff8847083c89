"""Zero-shot classification: is an image closest to its class's sentences (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from cllip_fast.data import Loader
from cllip_fast.errors import InputError
from cllip_fast.evaluate.ranks import bar_is_off, share_of, summed

if TYPE_CHECKING:
    from cllip_fast.inference import TrainedModel

Labelled = Iterable[tuple[Tensor | None, Tensor]]
"""Images [n, 3, S, S] and their classes [n] int64; None for n images that cannot be used."""


def classification(
    model: TrainedModel, images: Labelled, classes: Tensor, *, group: dist.ProcessGroup | None = None
) -> dict[str, float | None]:
    """Zero-shot accuracy.

    Args:
        model: from `cllip_fast.load`.
        images: this rank's.
        classes: features [C, E] of the classes, from `class_features`.
        group: the ranks that share the images; all return the same.

    Returns:
        images and skipped, how many; top1, top5 (None of up to 5 classes) and mean_class, the mean over the
        classes present of their top-1 accuracy, as shares. An image whose scores are not finite is wrong.
    """
    counts = torch.zeros(len(classes), 3, dtype=torch.int64)  # a class's images, those right, those right among 5
    skipped = 0
    for pixels, labels in images:
        if pixels is None:
            skipped += len(labels)
            continue
        scores = (model.encode_pixels(pixels) @ classes.T).cpu()
        own = scores.gather(1, labels[:, None])
        # Ties and NaN count against the class, so that a collapsed model is at 0 % and not at 100 %.
        rank = (~(scores < own)).sum(1) - own[:, 0].isfinite().long()
        right = torch.stack([torch.ones_like(rank, dtype=torch.bool), rank < 1, rank < 5], 1)
        counts.index_add_(0, labels, right.long())
    counts, skipped = summed(counts, group), int(summed(torch.tensor(skipped), group))
    present = counts[counts[:, 0] > 0].double()
    total = float(present[:, 0].sum())
    return {
        "images": total,
        "skipped": float(skipped),
        "top1": float(present[:, 1].sum() / total) if total else None,
        "top5": float(present[:, 2].sum() / total) if total and len(classes) > 5 else None,
        "mean_class": float((present[:, 1] / present[:, 0]).mean()) if total else None,
    }


def from_folders(
    model: TrainedModel, files: Sequence[tuple[Path, int]], *, group: dist.ProcessGroup | None = None, batch: int = 32
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """This rank's share of image files, each with its class, as `classification` takes them."""
    own = share_of(files, group)
    for start in tqdm(range(0, len(own), batch), desc="classify", unit="batch", leave=False, disable=bar_is_off(group)):
        pixels, labels = [], []
        for path, label in own[start : start + batch]:
            try:
                pixels.append(model.preprocess(path))
                labels.append(label)
            except InputError as error:
                tqdm.write(f"skipped: {error}")
                yield None, torch.tensor([label])
        if pixels:
            yield torch.stack(pixels), torch.tensor(labels)


def from_shards(loader: Loader, names: Sequence[str]) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Samples whose first caption is the name of their class, as `convert class-folders` writes them.

    Raises:
        InputError: a caption is no class.
    """
    number_of = {name: number for number, name in enumerate(names)}
    for batch in loader:
        first = [captions[0] for captions in batch.captions]
        unknown = next((caption for caption in first if caption not in number_of), None)
        if unknown is not None:
            raise InputError(
                f"the caption {unknown!r} is no class, expected one of {len(names)} names such as {names[0]!r}"
            )
        yield batch.images, torch.tensor([number_of[caption] for caption in first])
    yield None, torch.full((loader.counts["samples_skipped"],), -1)  # their classes are not known
