"""Small files written whole or not at all, and text from shards made fit for a terminal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cllip_fast.errors import InputError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """A text file to write to, renamed to `path` when the block ends well, removed when it fails.

    Raises:
        InputError: it cannot be written: no such folder, no right to, no space left.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with open(aside, "w", encoding="utf-8", newline="\n") as file:
                yield file
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def printable(text: str) -> str:
    """`text` with line ends, terminal codes and broken characters spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
