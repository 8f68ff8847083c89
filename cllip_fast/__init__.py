"""CLLIP-Fast: contrastive localized language-image pre-training, open and fast."""

__version__ = "0.1.0"
