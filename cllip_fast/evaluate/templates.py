"""Sentences around a class name, for zero-shot classification and segmentation."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cllip_fast.errors import InputError
from cllip_fast.evaluate.texts import CHUNK

if TYPE_CHECKING:
    from cllip_fast.inference import TrainedModel

PLAIN = ("{}",)
PHOTO = ("a photo of a {}.",)
NAMED = ("plain", "photo", "openai")


def read_templates(name: str | Path) -> list[str]:
    """Templates, each with one `{}` for the class name.

    Args:
        name: "plain" ("{}"), "photo" ("a photo of a {}."), "openai" (the 80 of CLIP's ImageNet evaluation, Radford et
            al. 2021, read from the installed open_clip), or a text file with a template a line.

    Raises:
        InputError: no such file, no open_clip, or a line without its place.
    """
    if name in ("plain", "photo"):
        return list(PLAIN if name == "plain" else PHOTO)
    if name == "openai":
        return _openai()
    path = Path(name)
    if not path.is_file():
        raise InputError(f"templates is {str(name)!r}, expected {', '.join(NAMED)} or a text file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = next((line for line in lines if line.count("{}") != 1), None)
    if wrong is not None or not lines:
        raise InputError(f"{path}: {wrong!r} is no template, expected a text with one {{}} for the class name")
    return lines


def _openai() -> list[str]:
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise InputError(
            "templates 'openai' are read from open_clip, which is not installed: pip install open_clip_torch"
        )
    path = Path(package.submodule_search_locations[0], "zero_shot_metadata.py")
    # The file alone: the package imports torchvision, which none of this needs.
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [template("{}") for template in module.OPENAI_IMAGENET_TEMPLATES]


def class_features(
    model: TrainedModel, names: Sequence[str], templates: Sequence[str], *, progress: bool = True
) -> Tensor:
    """Features [C, E] of classes: the mean over templates of the sentences' unit features, again of unit length.

    As CLIP's evaluation (Radford et al. 2021, section 3.1.4).

    Raises:
        InputError: no names, or one twice.
    """
    if not names:
        raise InputError("names is empty, expected at least one class")
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError(f"names holds {twice!r} twice, expected distinct classes")
    step = max(1, CHUNK // len(templates))
    means = []
    starts = range(0, len(names), step)
    for start in tqdm(starts, desc="encode classes", leave=False, disable=None if progress else True):
        own = names[start : start + step]
        features = model.encode_text([template.replace("{}", name) for name in own for template in templates])
        means.append(features.unflatten(0, (len(own), len(templates))).mean(1))
    return F.normalize(torch.cat(means), dim=-1)
