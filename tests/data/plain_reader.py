"""A reader of shards in plain Python, by docs/data.md and the published schema alone; imports nothing of ours."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Seen(NamedTuple):
    """What a model sees of a sample: uint8 [S, S, 3], texts, and boxes as shares of the square."""

    key: str
    pixels: np.ndarray
    caption: str
    boxes: list[tuple[float, ...]]
    phrases: list[str]


def read_shards(folder: Path) -> list[tuple[str, bytes, dict]]:
    """(key, image, record) of every sample in stored order."""
    samples = []
    for path in sorted(folder.glob("*.tar")):
        files: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                key, suffix = info.name.rsplit("/", 1)[-1].split(".", 1)
                key = info.name[: len(info.name) - len(suffix) - 1]
                files.setdefault(key, {})[suffix] = tar.extractfile(info).read()
        samples += [(key, found["jpg"], json.loads(found["json"])) for key, found in files.items()]
    return samples


def order(seed: int, epoch: int, count: int) -> list[int]:
    return np.random.default_rng([seed, epoch, 0]).permutation(count).tolist()


def numbers_of(seed: int, epoch: int, purpose: str, key: str) -> random.Random:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}/{key}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))


def window(crop: str, width: int, height: int, side: int, rng: random.Random) -> tuple[tuple, tuple]:
    """Rectangle of the image, and rectangle of the square that it fills."""
    if crop == "pad":
        w, h = (max(round(edge * (side / max(width, height))), 1) for edge in (width, height))
        x, y = (side - w) // 2, (side - h) // 2
        return (0, 0, width, height), (x, y, x + w, y + h)
    if crop == "center":
        edges = []
        for length in (width, height):
            resized = side * length // min(width, height)
            first = round((resized - side) / 2)
            edges.append([math.floor(end * length / resized + 0.5) for end in (first, first + side)])
        return (edges[0][0], edges[1][0], edges[0][1], edges[1][1]), (0, 0, side, side)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    area = rng.uniform(0.5, 1.0) * width * height
    w, h = min(round(math.sqrt(area * ratio)), width), min(round(math.sqrt(area / ratio)), height)
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    step = max(n for n in (1, 2, 4, 8) if n == 1 or min(w, h) / side >= 2 * n)
    return tuple(edge // step * step for edge in (x, y, x + w, y + h)), (0, 0, side, side)


def map_box(box: list[float], size: tuple, source: tuple, target: tuple, side: int, kept_area: float) -> tuple | None:
    """A box of the record as shares of the square, None where it is left out."""
    x0, y0, x1, y1 = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    if not (x0 < x1 and y0 < y1):
        return None
    a0, b0, a1, b1 = max(x0, source[0]), max(y0, source[1]), min(x1, source[2]), min(y1, source[3])
    if a0 >= a1 or b0 >= b1 or (a1 - a0) * (b1 - b0) < kept_area * (x1 - x0) * (y1 - y0):
        return None
    scales = [(target[i + 2] - target[i]) / (source[i + 2] - source[i]) for i in (0, 1)]
    return tuple(
        (target[i % 2] + (edge - source[i % 2]) * scales[i % 2]) / side for i, edge in enumerate((a0, b0, a1, b1))
    )


def see(
    sample: tuple[str, bytes, dict], *, train: bool, seed: int, epoch: int, crop: str, side: int, most: int,
    kept_area: float, flip: float, padding: list[int],
) -> Seen:  # fmt: skip
    key, data, record = sample
    size = record["width"], record["height"]
    source, target = window(crop, *size, side, numbers_of(seed, epoch, "window", key))
    regions = [(map_box(r["box"], size, source, target, side, kept_area), r["text"]) for r in record.get("regions", [])]
    regions = [(box, text) for box, text in regions if box is not None]
    caption, chosen, mirrored = record["captions"][0], regions[:most], False
    if train:
        rng = numbers_of(seed, epoch, "texts", key)
        caption = record["captions"][rng.randrange(len(record["captions"]))]
        chosen = rng.sample(regions, min(len(regions), most))
        texts = " ".join([*record["captions"], *(r["text"] for r in record.get("regions", []))]).lower()
        tells = re.search(r"(?<![a-z])(top|bottom|upper|lower)?(left|right)|clockwise", texts)
        mirrored = numbers_of(seed, epoch, "flip", key).random() < flip and not tells
    square = Image.new("RGB", (side, side), tuple(padding))
    part = Image.open(io.BytesIO(data)).convert("RGB").resize(
        (target[2] - target[0], target[3] - target[1]), Image.Resampling.BICUBIC, box=source
    )  # fmt: skip
    square.paste(part, target[:2])
    if mirrored:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        chosen = [((1 - box[2], box[1], 1 - box[0], box[3]), text) for box, text in chosen]
    return Seen(key, np.asarray(square), caption, [box for box, _ in chosen], [text for _, text in chosen])
