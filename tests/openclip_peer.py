"""The real OpenCLIP losses: `loss.py` of the installed package, loaded alone (the whole package needs torchvision)."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from types import ModuleType


@functools.cache
def openclip_losses() -> ModuleType:
    """The module `open_clip.loss`, with ClipLoss, SigLipLoss, CoCaLoss, DistillClipLoss."""
    path = importlib.metadata.distribution("open_clip_torch").locate_file("open_clip/loss.py")
    spec = importlib.util.spec_from_file_location("openclip_peer_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
