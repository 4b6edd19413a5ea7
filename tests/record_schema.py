"""The part of JSON Schema that bench/records.schema.json uses."""

import json
from pathlib import Path
from typing import Any

SCHEMA: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "bench" / "records.schema.json").read_text(encoding="utf-8")
)
KINDS: dict[str, Any] = {
    "array": list,
    "object": dict,
    "string": str,
    "number": (int, float),
    "integer": int,
    "null": type(None),
}
KNOWN = {"$schema", "title", "description", "type", "enum", "items", "required", "properties", "additionalProperties"}


def misfits(value: Any, schema: dict[str, Any] = SCHEMA, where: str = "records") -> list[str]:
    """Where a JSON value does not fit, a sentence each."""
    assert not schema.keys() - KNOWN, f"{where}: this check does not know {schema.keys() - KNOWN}"
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if isinstance(value, bool) or not isinstance(value, tuple(KINDS[kind] for kind in kinds)):
        return [f"{where} is {value!r}, not of {kinds}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where} is {value!r}, not one of {schema['enum']}"]
    found = []
    if isinstance(value, list):
        for at, item in enumerate(value):
            found += misfits(item, schema["items"], f"{where}[{at}]")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{where} lacks {name}" for name in schema.get("required", ()) if name not in value]
        if schema.get("additionalProperties") is False:
            found += [f"{where} has {name}" for name in value.keys() - known.keys()]
        for name in value.keys() & known.keys():
            found += misfits(value[name], known[name], f"{where}.{name}")
    return found
