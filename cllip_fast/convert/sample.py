"""What readers hand to the writer: samples as the data set has them, before anything is checked against the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_LISTED = 8


@dataclass(frozen=True, slots=True)
class Region:
    """A box with its text.

    Attributes:
        box: x0, y0, x1, y1; the far ends are excluded. In pixels, or shares of the image if its sample says so.
        text: what is in the box.
        score: the annotator's confidence in [0, 1], None where the data set has none.
    """

    box: tuple[float, float, float, float]
    text: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """An image with its texts.

    Attributes:
        key: names the sample; the same in every conversion.
        image: the file's bytes, or its name below `Source.images`.
        captions: texts of the whole image.
        regions: boxes with texts.
        size: width and height that the data set records, None where it does not.
        relative: boxes are in [0, 1] of width and height, not in pixels.
        source, licence: where the image is from and its terms, as far as known.
    """

    key: str
    image: bytes | str
    captions: list[str]
    regions: list[Region]
    size: tuple[int, int] | None = None
    relative: bool = False
    source: str | None = None
    licence: str | None = None


@dataclass
class Source:
    """A data set that is being read.

    Attributes:
        name: what to call it in `dataset.json`.
        samples: in the data set's order, which is the shards' order.
        images: the folder that files named in `samples` must lie in.
        classes: the texts of its regions if it has a closed list of them; complete once `samples` is read.
        total: how many samples there are, None where that is not known before they are read.
        skipped: what the reader left out, by kind; complete once `samples` is read.
    """

    name: str
    samples: Iterable[Sample]
    images: Path | None = None
    classes: list[str] = field(default_factory=list)
    total: int | None = None
    skipped: Counter[str] = field(default_factory=Counter)


def listed(texts: Iterable[str]) -> str:
    """The caption of an image of a data set without captions: its first distinct region texts, up to 8, with commas."""
    return ", ".join(list(dict.fromkeys(texts))[:_LISTED])
