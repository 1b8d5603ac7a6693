"""Verdict files, read back: checked against the packaged schema before anything is believed.

The schema is data/verdict.schema.json (JSON Schema, draft 2020-12). The device has no validator
installed, so this one knows the keywords that the schema uses, and no others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from edge_dtm.core import strict_json
from edge_dtm.core.errors import EdgeDtmError

LIMIT_BYTES = 16 * 2**20  # a thousand times what verify writes
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_CHECKED = {"type", "enum", "const", "minimum", "maximum", "minLength", "pattern", "$ref",
            "properties", "required", "additionalProperties", "items"}  # fmt: skip
_WORDS = {"$schema", "$id", "$defs", "title", "description"}


@cache
def schema() -> dict[str, Any]:
    """The packaged schema of verdicts."""
    text = resources.files("edge_dtm.data").joinpath("verdict.schema.json").read_text("utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def read_verdict(path: Path) -> dict[str, Any]:
    """A verdict as Verdict.to_json wrote it. EdgeDtmError, in one line, for anything else."""
    data = read_numbers(path)
    if not isinstance(data, dict) or data.get("kind") != "edge-dtm verdict":
        raise EdgeDtmError(f"{path} is no verdict: give a file that edge-dtm verify --json wrote")
    known = schema()["properties"]["schema_version"]["const"]
    if data.get("schema_version") != known:
        raise EdgeDtmError(
            f"{path} has schema version {str(data.get('schema_version'))[:20]}, this edge-dtm reads "
            f"{known}: verify again, or use the edge-dtm that wrote it"
        )
    found = problems(data) or _contradictions(data)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise EdgeDtmError(f"{path} is no whole verdict: {'; '.join(found[:3])}{more}")
    return data


def read_numbers(path: Path) -> Any:
    """JSON without NaN and Infinity, of LIMIT_BYTES at most. EdgeDtmError when it is not."""
    try:
        with path.open("rb") as file:
            raw = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise EdgeDtmError(f"cannot read {path}: {error.strerror or error}") from None
    if len(raw) > LIMIT_BYTES:
        raise EdgeDtmError(f"{path} is above {LIMIT_BYTES} bytes: it is none of ours")
    try:
        return strict_json.loads(raw)
    except ValueError as error:
        raise EdgeDtmError(f"{path} is no JSON ({error}): make it again") from None


def problems(data: Any) -> list[str]:
    """What the schema says against data, one short text each, with the place."""
    return _problems(data, schema(), "")


def _problems(value: Any, rule: Mapping[str, Any], at: str) -> list[str]:
    unknown = set(rule) - _CHECKED - _WORDS
    if unknown:
        raise ValueError(f"the schema uses {sorted(unknown)}, which is not checked here")
    place = at or "it"
    if "$ref" in rule:
        name = rule["$ref"].removeprefix("#/$defs/")
        return _problems(value, schema()["$defs"][name], at)
    if "type" in rule:
        names = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
        if not any(_is(value, name) for name in names):
            return [f"{place} is no {' or '.join(names)}"]
    if "const" in rule and value != rule["const"]:
        return [f"{place} is not {rule['const']!r}"]
    if "enum" in rule and value not in rule["enum"]:
        return [f"{place} is none of {', '.join(map(str, rule['enum']))}"]
    if isinstance(value, str):
        return _text_problems(value, rule, place)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = rule.get("minimum", -math.inf), rule.get("maximum", math.inf)
        return [] if low <= value <= high else [f"{place} is {value}"]
    if isinstance(value, list):
        items = rule.get("items", {})
        return [p for i, v in enumerate(value) for p in _problems(v, items, f"{at}[{i}]")]
    if isinstance(value, dict):
        return _object_problems(value, rule, at)
    return []


def _is(value: Any, name: str) -> bool:
    """JSON's types: a boolean is no number, and 2.0 is an integer."""
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _text_problems(value: str, rule: Mapping[str, Any], place: str) -> list[str]:
    if len(value) < rule.get("minLength", 0):
        return [f"{place} is empty"]
    if "pattern" in rule and not re.search(rule["pattern"], value):
        return [f"{place} does not look like one"]
    return []


def _object_problems(value: Mapping[str, Any], rule: Mapping[str, Any], at: str) -> list[str]:
    known = rule.get("properties", {})
    dot = f"{at}." if at else ""
    found = [f"{dot}{name} is missing" for name in rule.get("required", ()) if name not in value]
    if rule.get("additionalProperties", True) is False:
        found += [f"{dot}{name[:40]} is unknown" for name in value if name not in known]
    for name, inner in known.items():
        if name in value:
            found += _problems(value[name], inner, f"{dot}{name}")
    return found


def _contradictions(data: Mapping[str, Any]) -> list[str]:
    """What no schema can say: the lists belong to the sequences, a token to its sequence."""
    first, lengths, n = data["first_divergent_tokens"], data["lengths"], data["sequences"]
    found = [
        f"{name} has {len(values)} entries for {n} sequences"
        for name, values in (("first_divergent_tokens", first), ("lengths", lengths))
        if len(values) != n
    ]
    if not found and any(f > length for f, length in zip(first, lengths, strict=True)):
        found.append("a first divergent token lies beyond its sequence")
    return found


def device_name(data: Mapping[str, Any]) -> str:
    """A few words for the machine of a verdict."""
    runtime = data["runtime"]
    cpus = int(runtime["cpus"])
    return f"{runtime['machine']}, {cpus} {'CPU' if cpus == 1 else 'CPUs'}"
