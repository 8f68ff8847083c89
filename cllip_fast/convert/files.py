"""Annotation files, read and checked; every error names the file and the entry."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cllip_fast.errors import InputError

_EXPECTED = {int: "an integer", float: "a number", str: "a text", list: "a list"}
_LARGEST = 1e9  # no coordinate is larger; NaN and infinity fail the comparison too


def check_folder(name: str, folder: Path) -> Path:
    """Return `folder` if it is one, else raise `InputError`."""
    if not folder.is_dir():
        raise InputError(f"{name} folder {folder} does not exist")
    return folder


def read_text(path: Path) -> str:
    """A UTF-8 file; `InputError` if it is missing or something else."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error}") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that hold something, stripped."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def parse_json(place: str, text: str | bytes) -> Any:
    """The value in a JSON text; `InputError` that names `place` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON: {error}") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file; `InputError` if it is missing or not JSON."""
    return parse_json(str(path), read_text(path))


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file; `InputError` if it is missing or not XML. Expat bounds what entities expand to."""
    try:
        return ElementTree.fromstring(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise InputError(f"{path} is not XML: {error}") from error


def check_entries(place: str, value: object, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Return `value` if it is a list of objects that have `fields` of the given types, else raise `InputError`."""
    if not isinstance(value, list):
        raise InputError(f"{place} is {reprlib.repr(value)}, expected a list")
    for number, entry in enumerate(value):
        check_entry(f"{place}[{number}]", entry, fields)
    return value


def check_entry(place: str, entry: object, fields: Mapping[str, type]) -> dict[str, Any]:
    """Return `entry` if it is an object that has `fields` of the given types, else raise `InputError`.

    Types are int, str, list, or float for any finite number.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{place} is {reprlib.repr(entry)}, expected an object")
    for name, kind in fields.items():
        value = entry.get(name)
        if not (is_number(value) if kind is float else type(value) is kind):
            raise InputError(f"{place} has {name} {reprlib.repr(value)}, expected {_EXPECTED[kind]}")
    return entry


def check_numbers(place: str, value: object, count: int) -> list[float]:
    """Return `value` if it is a list of `count` finite numbers, else raise `InputError`."""
    if not (isinstance(value, list) and len(value) == count and all(map(is_number, value))):
        raise InputError(f"{place} is {reprlib.repr(value)}, expected {count} numbers")
    return value


def to_number(place: str, text: str | None) -> float:
    """The number that a text spells, else `InputError`."""
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not is_number(value):
        raise InputError(f"{place} is {reprlib.repr(text)}, expected a number")
    return value


def is_number(value: object) -> bool:
    """True for a finite int or float of a size that coordinates can have."""
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST
