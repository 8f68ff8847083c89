"""Which part of an image the model sees, whether mirrored, and where the regions' boxes land in it.

All of it is chosen from sizes, texts and (seed, epoch, key) alone, before any pixel is decoded, so every decoder that
is handed the window gives the same picture, and the boxes follow by the same arithmetic. `epoch` counts the earlier
passes over the sample's own data set, which in a mixture may not be those of the run (`mixture.py`).
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterable
from typing import NamedTuple

Box = tuple[float, float, float, float]

CROPS = ("pad", "center", "random")
RANDOM_AREA = (0.5, 1.0)  # share of the image that a random window covers; smaller ones lose too many regions
RANDOM_RATIO = (3 / 4, 4 / 3)  # width over height of a random window
REDUCTIONS = (8, 4, 2)  # JPEG decoders can leave out high frequencies
MARGIN = 2  # a picture decoded smaller stays at least this many times as fine as what it is resized to
# A word's beginning, so that "leftmost" and "right-hand" count, and "bright" and "upright" do not.
_SIDES = re.compile(r"(?<![a-z])(top|bottom|upper|lower)?(left|right)|clockwise", re.IGNORECASE)


class Window(NamedTuple):
    """Rectangle `source` of the stored image is resized to fill rectangle `target` of the square the model sees.

    Both are x0, y0, x1, y1 in whole pixels, far ends excluded. What `target` leaves of the square is padding.
    """

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]


def sample_rng(seed: int, epoch: int, key: str, purpose: str) -> random.Random:
    """Random numbers that depend on these four and on nothing else: not on workers, ranks or the order of samples."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}/{key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))


def choose_window(crop: str, width: int, height: int, size: int, *, seed: int, epoch: int, key: str) -> Window:
    """The window of an image of width × height pixels for a square of `size` pixels.

    Args:
        crop: "pad": the whole image, its long side resized to `size`, centred (CLOC, arXiv 2410.02746, appendix);
            "center": what resizing the short side to `size` and cutting out the centre leaves, as OpenCLIP evaluates,
            to the next whole pixel; "random": a random rectangle of `RANDOM_AREA` and `RANDOM_RATIO`.
        seed, epoch, key: decide the random rectangle.
    """
    if crop == "pad":
        scale = size / max(width, height)
        inner_width, inner_height = max(round(width * scale), 1), max(round(height * scale), 1)
        left, top = (size - inner_width) // 2, (size - inner_height) // 2
        return Window((0, 0, width, height), (left, top, left + inner_width, top + inner_height))
    if crop == "center":
        (left, right), (top, bottom) = (_centre(length, min(width, height), size) for length in (width, height))
        return Window((left, top, right, bottom), (0, 0, size, size))
    rng = sample_rng(seed, epoch, key, "window")
    ratio = math.exp(rng.uniform(math.log(RANDOM_RATIO[0]), math.log(RANDOM_RATIO[1])))
    area = rng.uniform(*RANDOM_AREA) * width * height
    window_width = min(max(round(math.sqrt(area * ratio)), 1), width)
    window_height = min(max(round(math.sqrt(area / ratio)), 1), height)
    left, top = rng.randint(0, width - window_width), rng.randint(0, height - window_height)
    # On whole pixels of the smaller picture that a JPEG decoder may make, the window is resized several times faster.
    step = reduction(window_width, window_height, size, size)
    left, top, right, bottom = (edge - edge % step for edge in (left, top, left + window_width, top + window_height))
    return Window((left, top, right, bottom), (0, 0, size, size))


def _centre(length: int, short: int, size: int) -> tuple[int, int]:
    """First and last pixel (excluded) of one side of an image that the centre shows; torchvision rounds as here."""
    resized = size * length // short
    start = round((resized - size) / 2)
    # Halves go up at both ends: the window of an image one pixel wide must not become empty.
    return int(start * length / resized + 0.5), int((start + size) * length / resized + 0.5)


def reduction(width: int, height: int, target_width: int, target_height: int) -> int:
    """8, 4, 2 or 1: how much smaller an image may be decoded that is then resized to the target."""
    ratio = min(width / target_width, height / target_height)
    return next((factor for factor in REDUCTIONS if ratio >= MARGIN * factor), 1)


def choose_flip(share: float, texts: Iterable[str], *, seed: int, epoch: int, key: str) -> bool:
    """Whether to mirror a sample left to right: `share` of them, none whose `texts` tell left from right (in English).

    Mirroring comes after the window: the square is turned round, padding included, and boxes by `mirror_box`.
    """
    if share == 0 or sample_rng(seed, epoch, key, "flip").random() >= share:
        return False
    return not any(_SIDES.search(text) for text in texts)


def mirror_box(box: Box) -> Box:
    """A box in shares of the square, after the square was mirrored left to right."""
    x0, y0, x1, y1 = box
    return 1 - x1, y0, 1 - x0, y1


def map_box(box: Box, window: Window, size: int, min_kept_area: float) -> Box | None:
    """Where a box lands in the square, or None if it keeps too little.

    Args:
        box: x0, y0, x1, y1 in pixels of the stored image, not empty.
        window: what the model sees of it.
        size: side of the square in pixels.
        min_kept_area: share of the box's area that must lie in the window; at 0 any touch is enough.

    Returns:
        The clipped box as shares (0 to 1) of the square.
    """
    (x0, y0, x1, y1), (left, top, right, bottom) = window
    clipped_x0, clipped_y0 = max(box[0], x0), max(box[1], y0)
    clipped_x1, clipped_y1 = min(box[2], x1), min(box[3], y1)
    if clipped_x0 >= clipped_x1 or clipped_y0 >= clipped_y1:
        return None
    kept_area = (clipped_x1 - clipped_x0) * (clipped_y1 - clipped_y0)
    if kept_area < min_kept_area * (box[2] - box[0]) * (box[3] - box[1]):
        return None
    x_scale, y_scale = (right - left) / (x1 - x0), (bottom - top) / (y1 - y0)
    return (
        (left + (clipped_x0 - x0) * x_scale) / size,
        (top + (clipped_y0 - y0) * y_scale) / size,
        (left + (clipped_x1 - x0) * x_scale) / size,
        (top + (clipped_y1 - y0) * y_scale) / size,
    )
