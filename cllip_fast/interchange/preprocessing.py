"""What CLIP weights were shown: the channels' mean and standard deviation, as the files beside them say.

Not all are OpenAI's: OpenCLIP's ViT-L-14 of laion2b_s32b_b82k, for one, was trained on pixels from -1 to 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cllip_fast.data.folders import read_json
from cllip_fast.data.loader import CLIP_MEAN, CLIP_STD
from cllip_fast.errors import InputError
from cllip_fast.interchange import openclip
from cllip_fast.interchange.files import find_file

HF_FILE = "preprocessor_config.json"
BICUBIC = 3  # Pillow's number, which Hugging Face writes


class Preprocessing(NamedTuple):
    """Mean and standard deviation of red, green and blue, on a scale from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


CLIP = Preprocessing(CLIP_MEAN, CLIP_STD)


def read_preprocessing(path: str | Path) -> Preprocessing:
    """Read `open_clip_config.json` or Hugging Face's `preprocessor_config.json` beside weights; without: CLIP's.

    Args:
        path: as `read_weights`.

    Raises:
        InputError: a malformed file, or images that were not resized by their short side, bicubic, and cropped.
    """
    folder = find_file(Path(path)).parent
    theirs, hf = folder / openclip.CONFIG_FILE, folder / HF_FILE
    if theirs.is_file():
        values = read_json(theirs).get("preprocess_cfg", {})
        return _checked(theirs, values, ("mean", "std"), {"resize_mode": "shortest", "interpolation": "bicubic"})
    if hf.is_file():
        return _checked(hf, read_json(hf), ("image_mean", "image_std"), {"resample": BICUBIC, "do_center_crop": True})
    return CLIP


def _checked(file: Path, values: Any, names: tuple[str, str], fixed: dict[str, object]) -> Preprocessing:
    if not isinstance(values, dict):
        raise InputError(f"{file}: preprocess_cfg is {values!r}, expected an object")
    for name, expected in fixed.items():
        if values.get(name) not in (None, expected):
            raise InputError(f"{file} has {name} {values[name]!r}, expected {expected!r}: the only way here")
    found = []
    for name, usual in zip(names, CLIP, strict=True):
        numbers = values.get(name) or usual
        if len(numbers) != 3 or not all(type(number) in (int, float) for number in numbers):
            raise InputError(f"{file} has {name} {numbers!r}, expected three numbers")
        found.append(tuple(numbers))
    return Preprocessing(*found)
