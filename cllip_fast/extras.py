"""Optional packages: probed once, reported at start, refused with one clear line when asked for and absent."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

from cllip_fast.errors import InputError

# name -> (module to import, distribution, how to get it)
_EXTRAS = {
    "triton": ("triton", "triton", "pip install 'cllip-fast[triton]'"),
    "dali": ("nvidia.dali", "nvidia-dali-cuda130", "pip install 'cllip-fast[dali]'"),
    "flash-attn": ("flash_attn", "flash-attn", "pip install 'cllip-fast[flash-attn]' --no-build-isolation"),
    "flash-attn-3": (
        "flash_attn_interface",
        "flash_attn_3",
        "build the folder hopper/ of github.com/Dao-AILab/flash-attention; it needs a Hopper GPU",
    ),
    "flash-attn-4": ("flash_attn.cute", "flash-attn-4", "pip install flash-attn-4; it needs a Hopper or Blackwell GPU"),
    "xformers": ("xformers.ops", "xformers", "pip install 'cllip-fast[xformers]'"),
    "apex": (
        "apex.optimizers",
        "apex",
        "build NVIDIA Apex from its repository; the 'apex' that pip finds is another project",
    ),
    "open-clip": ("open_clip", "open_clip_torch", "pip install 'cllip-fast[open-clip]'"),
    "simplejpeg": ("simplejpeg", "simplejpeg", "pip install 'cllip-fast[simplejpeg]'"),
    "pyarrow": ("pyarrow", "pyarrow", "pip install 'cllip-fast[parquet]'"),
    "ftfy": ("ftfy", "ftfy", "pip install 'cllip-fast[clip]'"),
    "sentencepiece": ("sentencepiece", "sentencepiece", "pip install 'cllip-fast[sentencepiece]'"),
    "tensorboard": ("tensorboard", "tensorboard", "pip install 'cllip-fast[tensorboard]'"),
    "wandb": ("wandb", "wandb", "pip install 'cllip-fast[wandb]'"),
    "matplotlib": ("matplotlib", "matplotlib", "pip install 'cllip-fast[plots]'"),
}


@functools.cache
def probe(name: str) -> str | None:
    """The version of an optional package if it can be imported, else None."""
    module, distribution, _ = _EXTRAS[name]
    try:
        found = importlib.import_module(module)
    except Exception:  # a broken binary package fails in its own ways; absent and broken are the same to the caller
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # of another name, such as nvidia-dali-cuda120
        return getattr(found, "__version__", "unknown version")


def require(name: str, wanted_by: str) -> None:
    """Raise `InputError` if the optional package `name`, asked for by the option `wanted_by`, is absent."""
    if probe(name) is None:
        raise InputError(f"{wanted_by} needs {name}, which cannot be imported here: {_EXTRAS[name][2]}")


def report() -> str:
    """One line that names each optional package with its version, or `-` where it is absent."""
    return "  ".join(f"{name} {probe(name) or '-'}" for name in _EXTRAS)
