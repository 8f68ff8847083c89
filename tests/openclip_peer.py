"""The real OpenCLIP, of the installed package: single files of it, or its trainer; neither needs torchvision."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock, patch

_TORCHVISION = ("torchvision", "torchvision.ops.misc", "torchvision.transforms", "torchvision.transforms.functional")


@functools.cache
def openclip_losses() -> ModuleType:
    """The module `open_clip.loss`, with ClipLoss, SigLipLoss, CoCaLoss, DistillClipLoss."""
    return openclip_file("open_clip/loss.py")


@functools.cache
def openclip_file(name: str, absent: tuple[str, ...] = ()) -> ModuleType:
    """The module in one file, such as "open_clip/loss.py"; imports from the modules `absent` do nothing."""
    path = importlib.metadata.distribution("open_clip_torch").locate_file(name)
    spec = importlib.util.spec_from_file_location(f"openclip_peer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {other: MagicMock() for other in absent}):
        spec.loader.exec_module(module)
    return module


@functools.cache
def openclip_model() -> ModuleType:
    """The module `open_clip.model`, with CLIP, under a name of its own: `open_clip` itself stays as it is."""
    name = "openclip_peer"
    package = ModuleType(name)
    package.__path__ = [str(Path(importlib.metadata.distribution("open_clip_torch").locate_file("open_clip")))]
    sys.modules[name] = package
    absent = {"transformers": None} | {each: MagicMock() for each in _TORCHVISION}  # not for this model
    held = {module: sys.modules.get(module) for module in absent}
    sys.modules.update(absent)
    try:
        return importlib.import_module(f"{name}.model")
    finally:
        for module, earlier in held.items():
            if earlier is None:
                del sys.modules[module]
            else:
                sys.modules[module] = earlier


def openclip_trainer() -> ModuleType:
    """The module `open_clip_train.train`, which imports `open_clip`.

    That imports torchvision for image transforms, which training on tensors does not need: where torchvision is missing
    or does not fit this PyTorch, names that do nothing stand in for it. Call it in a process of its own, such as
    `on_ranks` starts.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        sys.modules.update({name: MagicMock() for name in _TORCHVISION})
        sys.modules["transformers"] = None  # which open_clip can do without, and which the stand-ins confuse
    return importlib.import_module("open_clip_train.train")
