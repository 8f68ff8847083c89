"""Data set folders: what they say about themselves, and how they appear complete or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllip_fast.errors import InputError

INFO_FILE, TOKENIZER_FILE = "dataset.json", "tokenizer.json"


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set says about itself in `dataset.json`.

    Attributes:
        classes: the phrases that region recognition chooses from.
        attributes: for each class its attributes, such as {"colour": "red", ...}; None where classes have none.
        tokenizer_path: the data set's own tokenizer, None where it has none.
        name: what to call the data set.
    """

    classes: list[str]
    attributes: dict[str, dict[str, str]] | None
    tokenizer_path: Path | None
    name: str


def read_dataset_info(spec: str | Path) -> DatasetInfo:
    """Read `dataset.json` in the folder that `spec` (as for `expand_shards`) names, or in the folder above it.

    Of several parts joined by `::` the first that has one is taken.

    Raises:
        InputError: there is no `dataset.json`, or it lacks "name" or "classes".
    """
    starts = [Path(part) for part in str(spec).split("::")]
    folders = (f for start in starts for f in (start, start.parent, start.parent.parent))
    folder = next((folder for folder in folders if (folder / INFO_FILE).is_file()), None)
    if folder is None:
        gone = "" if starts[0].exists() or "{" in starts[0].name else f"{starts[0]} does not exist: "
        where = f"{starts[0]} or the folders above it"
        raise InputError(f"{gone}no {INFO_FILE} ('name', 'classes') in {where}; expected a data set folder")
    info = read_json(folder / INFO_FILE)
    classes, attributes, name = info.get("classes"), info.get("attributes"), info.get("name")
    if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes) and isinstance(name, str)):
        raise InputError(f"{folder / INFO_FILE} lacks a text 'name' or a list of texts 'classes'")
    if attributes is not None and not (isinstance(attributes, dict) and all(c in attributes for c in classes)):
        raise InputError(f"{folder / INFO_FILE}: 'attributes' must be null or hold every class")
    tokenizer = folder / TOKENIZER_FILE
    return DatasetInfo(classes, attributes, tokenizer if tokenizer.is_file() else None, name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `InputError` if the file is missing, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Let one process at a time work on `root`; the others wait here (the lock file beside it stays behind, empty).

    Raises:
        InputError: the folder above `root` cannot be written to.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        lock = open(root.parent / f".{root.name}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{root} cannot be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def completed(root: Path) -> Iterator[Path]:
    """A fresh folder to write to, renamed to `root` when the block ends well and removed when it fails.

    What a killed process left behind is removed too, so call it under `locked`.

    Raises:
        InputError: `root` exists and is not an empty folder.
    """
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise InputError(f"{root} exists and is not empty; choose another folder or remove it")
    partial = root.parent / f".{root.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
