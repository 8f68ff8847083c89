"""The subcommand `cllip-fast export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cllip_fast.data import load_tokenizer
from cllip_fast.interchange.export import FORMATS, export
from cllip_fast.interchange.load import load_model


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `export` to the command line."""
    parser = commands.add_parser("export", help="turn a checkpoint into others' formats", description=_export.__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="a run's folder, its checkpoint, or this command's safetensors file"
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="whose format")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="the run's, whose end token openclip and hf pool at (default: CLIP's)"
    )
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    """Write a model for OpenCLIP, Hugging Face's transformers or ONNX runtimes, or whole as safetensors."""
    end_id = load_tokenizer(options.tokenizer).end_id if options.tokenizer else None
    print(export(load_model(options.checkpoint), options.out, options.to, end_id=end_id))
