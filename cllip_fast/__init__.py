"""CLLIP-Fast: contrastive localized language-image pre-training, open and fast."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cllip_fast.inference import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`cllip_fast.load`, imported at its first use: the package itself imports nothing, not even PyTorch."""
    if name == "load":
        from cllip_fast.inference import load

        return load
    raise AttributeError(f"module 'cllip_fast' has no attribute {name!r}")
