"""Compositional pairs: is the caption closer to its image than one with a word changed (SugarCrepe, 2306.14610)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from cllip_fast.convert.files import read_json
from cllip_fast.errors import InputError
from cllip_fast.evaluate.ranks import bar_is_off, share_of, summed

if TYPE_CHECKING:
    from cllip_fast.inference import TrainedModel


class Pair(NamedTuple):
    """An image with its caption and a wrong one."""

    image: Path
    caption: str
    negative: str


def compositional(
    model: TrainedModel,
    kinds: Mapping[str, Sequence[Pair]],
    *,
    group: dist.ProcessGroup | None = None,
    batch: int = 32,
) -> dict[str, float | None]:
    """Share of pairs whose caption is closer to the image than the wrong one; a tie is wrong.

    Args:
        model: from `cllip_fast.load`.
        kinds: name -> its pairs, such as SugarCrepe's seven files.
        group: the ranks that share the pairs; all return the same.

    Returns:
        images and skipped, how many pairs; `<kind>` for each, and `compositional`, their mean, as shares.
    """
    counts = torch.zeros(len(kinds), 3, dtype=torch.int64)  # pairs, right, skipped
    for number, (kind, pairs) in enumerate(kinds.items()):
        own = share_of(pairs, group)
        for start in tqdm(range(0, len(own), batch), desc=kind, unit="batch", leave=False, disable=bar_is_off(group)):
            counts[number] += _judge(model, own[start : start + batch])
    counts = summed(counts, group)
    shares = {
        kind: right / pairs if pairs else None for kind, (pairs, right, _) in zip(kinds, counts.tolist(), strict=True)
    }
    known = [share for share in shares.values() if share is not None]
    return {
        "images": float(counts[:, 0].sum()),
        "skipped": float(counts[:, 2].sum()),
        **shares,
        "compositional": sum(known) / len(known) if known else None,
    }


def _judge(model: TrainedModel, pairs: Sequence[Pair]) -> torch.Tensor:
    """Pairs, those right, those skipped: [3] int64."""
    pixels, usable = [], []
    for pair in pairs:
        try:
            pixels.append(model.preprocess(pair.image))
            usable.append(pair)
        except InputError as error:
            tqdm.write(f"skipped: {error}")
    if not usable:
        return torch.tensor([0, 0, len(pairs)])
    images = model.encode_pixels(torch.stack(pixels))
    texts = model.encode_text([text for pair in usable for text in (pair.caption, pair.negative)])
    true, wrong = (images[:, None] * texts.unflatten(0, (-1, 2))).sum(-1).unbind(1)
    return torch.tensor([len(usable), int((true > wrong).sum()), len(pairs) - len(usable)])


def read_pairs(files: Sequence[Path], images: Path) -> dict[str, list[Pair]]:
    """SugarCrepe's files: {"0": {"filename", "caption", "negative_caption"}, ...}, or a list of such entries.

    A file that holds such a list or object under each of several names is several kinds.

    Raises:
        InputError: a file that is not JSON, or an entry that lacks a text.
    """
    kinds: dict[str, list[Pair]] = {}
    for file in files:
        content = read_json(file)
        several = isinstance(content, dict) and content and not any(_is_entry(each) for each in content.values())
        for kind, entries in content.items() if several else [(file.stem, content)]:
            entries = list(entries.values()) if isinstance(entries, dict) else entries
            if not isinstance(entries, list):
                raise InputError(f"{file}: {kind} is no list of pairs")
            for number, entry in enumerate(entries):
                if not _is_entry(entry):
                    raise InputError(
                        f"{file}: pair {number} of {kind} lacks a text 'filename', 'caption' or 'negative_caption'"
                    )
                pair = Pair(images / entry["filename"], entry["caption"], entry["negative_caption"])
                kinds.setdefault(kind, []).append(pair)
    if not kinds:
        raise InputError("data holds no pairs, expected SugarCrepe's JSON files")
    return kinds


def _is_entry(value: object) -> bool:
    names = ("filename", "caption", "negative_caption")
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)
