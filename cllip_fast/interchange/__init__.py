"""Weights of OpenCLIP and Hugging Face's CLIP come in (`load_pretrained`), models go out (`export`)."""

from cllip_fast.interchange.commands import add_commands
from cllip_fast.interchange.export import export
from cllip_fast.interchange.load import load_clip, load_model, load_pretrained

__all__ = ["add_commands", "export", "load_clip", "load_model", "load_pretrained"]
