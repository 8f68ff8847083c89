"""Several ranks evaluate as one: each takes its share of the images, and all count the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cllip_fast.evaluate.features import SplitFeatures

T = TypeVar("T")
Texts = tuple[list[str], Tensor]
"""Distinct texts and their features [U, E]."""


def share_of(items: Sequence[T], group: dist.ProcessGroup | None) -> Sequence[T]:
    """This rank's items: every W-th."""
    return items if group is None else items[dist.get_rank(group) :: dist.get_world_size(group)]


def bar_is_off(group: dist.ProcessGroup | None) -> bool | None:
    """tqdm's `disable`: a bar is shown on a terminal, by the first rank alone."""
    return None if group is None or dist.get_rank(group) == 0 else True


def gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """The value of each rank, in their order."""
    if group is None:
        return [value]
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def summed(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Counts on the CPU, summed over the ranks."""
    return torch.stack(gather(counts, group)).sum(0)


def gather_split(
    split: SplitFeatures, captions: Texts, phrases: Texts, group: dist.ProcessGroup | None
) -> tuple[SplitFeatures, Tensor, Tensor]:
    """The splits of all ranks as one, and the features of its captions and phrases.

    Texts are numbered anew, in the order of the ranks, so that those which every rank numbered first (the classes) keep
    their numbers.
    """
    parts = gather((split, captions, phrases), group)
    caption_texts, caption_numbers = join_texts([part[1] for part in parts])
    phrase_texts, phrase_numbers = join_texts([part[2] for part in parts])
    splits = [part[0] for part in parts]
    firsts = [0, *torch.tensor([len(each.image_features) for each in splits]).cumsum(0).tolist()]

    def joined(name: str) -> Tensor:
        found = [getattr(each, name) for each in splits]
        return torch.cat([each for each in found if len(each)] or found[:1])

    whole = SplitFeatures(
        image_features=joined("image_features"),
        caption_image=torch.cat([each.caption_image + first for each, first in zip(splits, firsts, strict=False)]),
        caption_text=torch.cat([n[each.caption_text] for each, n in zip(splits, caption_numbers, strict=True)]),
        region_features=joined("region_features"),
        region_phrase=torch.cat([n[each.region_phrase] for each, n in zip(splits, phrase_numbers, strict=True)]),
        iou=None if split.iou is None else joined("iou"),
        own_iou=None if split.own_iou is None else joined("own_iou"),
        hit=joined("hit"),
    )
    return whole, caption_texts, phrase_texts


def join_texts(parts: list[Texts]) -> tuple[Tensor, list[Tensor]]:
    """Features [U, E] of all distinct texts; for each part, the numbers [U_part] int64 of its texts in them."""
    number_of: dict[str, int] = {}
    rows, numbers = [], []
    for texts, features in parts:
        new = [place for place, text in enumerate(texts) if text not in number_of]
        rows.append(features[new])
        numbers.append(torch.tensor([number_of.setdefault(text, len(number_of)) for text in texts], dtype=torch.int64))
    return torch.cat([each for each in rows if len(each)] or rows[:1]), numbers
