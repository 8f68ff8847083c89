"""Where a record departs from `sample.schema.json`; only the keywords that this schema uses are understood."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

_TYPES = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int}
KEYWORDS = {"type", "required", "properties", "items", "minItems", "maxItems", "pattern", "minimum", "maximum"}


@functools.cache
def record_schema() -> dict[str, Any]:
    """The schema of a record, as it is shipped."""
    return json.loads(resources.files("cllip_fast.data").joinpath("sample.schema.json").read_text(encoding="utf-8"))


def violations(value: Any, schema: dict[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """(place, what is wrong) for each departure of a JSON value from `schema`; a place is such as `regions[3].text`."""
    kind = schema.get("type")
    if kind and (not isinstance(value, _TYPES[kind]) or isinstance(value, bool)):
        yield place, f"a {type(value).__name__}, expected {kind}"
        return
    if isinstance(value, dict):
        yield from (
            (f"{place}.{name}".lstrip("."), "absent") for name in schema.get("required", ()) if name not in value
        )
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                yield from violations(value[name], inner, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield place, f"{len(value)} items"
        for i, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), f"{place}[{i}]")
    elif isinstance(value, str):
        if not re.search(schema.get("pattern", ""), value):
            yield place, f"does not match {schema['pattern']}"
    elif "minimum" in schema and not value >= schema["minimum"]:
        yield place, f"{value}, expected at least {schema['minimum']}"
    elif "maximum" in schema and not value <= schema["maximum"]:
        yield place, f"{value}, expected at most {schema['maximum']}"
