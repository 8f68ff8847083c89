"""Shards made by hand from painted pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cllip_fast.data.shards import ShardWriter


def jpeg(width: int = 16, height: int = 16, rectangle: tuple[int, int, int, int] | None = None) -> bytes:
    """A black picture with a white rectangle."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    if rectangle is not None:
        x0, y0, x1, y1 = rectangle
        pixels[y0:y1, x0:x1] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=98)
    return file.getvalue()


def record(width: int = 16, height: int = 16, **changes: Any) -> dict[str, Any]:
    return {"captions": ["a picture"], "regions": [], "width": width, "height": height} | changes


def write_shard(folder: Path, samples: list[tuple[str, bytes, Any]], first: int = 0) -> Path:
    with ShardWriter(folder, 1000, first) as writer:
        for sample in samples:
            writer.write(*sample)
    return folder / f"{first:06d}.tar"
