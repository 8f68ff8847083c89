"""Checks values against `sample.schema.json`, by the part of JSON Schema that it uses."""

from __future__ import annotations

import functools
import json
import re
import reprlib
from importlib import resources
from typing import Any

_TYPES = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int}
_KEYWORDS = {"type", "required", "properties", "items", "minItems", "maxItems", "pattern", "minimum", "maximum"}
_ANNOTATIONS = {"$schema", "title", "description"}


def find_violation(record: object) -> str | None:
    """What in `record` does not fit the schema, None if it fits."""
    return _violation("record", record, _sample_schema())


@functools.cache
def _sample_schema() -> dict[str, Any]:
    schema = json.loads((resources.files("cllip_fast.data") / "sample.schema.json").read_text(encoding="utf-8"))
    _check_keywords(schema)
    return schema


def _check_keywords(schema: dict[str, Any]) -> None:
    """A keyword that `_violation` would ignore must not get into the schema unnoticed."""
    unknown = schema.keys() - _KEYWORDS - _ANNOTATIONS
    if unknown:
        raise NotImplementedError(f"sample.schema.json uses {', '.join(sorted(unknown))}")
    for part in (*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])):
        _check_keywords(part)


def _violation(place: str, value: Any, schema: dict[str, Any]) -> str | None:
    kind = schema["type"]
    if not isinstance(value, _TYPES[kind]) or isinstance(value, bool):
        return f"{place} is {reprlib.repr(value)}, expected type {kind}"
    if kind == "object":
        missing = [name for name in schema.get("required", []) if name not in value]
        if missing:
            return f"{place} lacks {missing[0]!r}"
        parts = [(f"{place}.{name}", value[name], part) for name, part in schema["properties"].items() if name in value]
    elif kind == "array":
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{place} has {len(value)} items"
        parts = [(f"{place}[{number}]", item, schema["items"]) for number, item in enumerate(value)]
    else:
        if kind == "string":
            fits = re.search(schema.get("pattern", ""), value) is not None
        else:
            fits = schema.get("minimum", value) <= value <= schema.get("maximum", value)
        return None if fits else f"{place} is {reprlib.repr(value)}, outside what the schema allows"
    return next((found for part in parts if (found := _violation(*part)) is not None), None)
