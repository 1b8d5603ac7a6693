"""Data that others wrote, read and checked so that nothing in it surprises later.

json.loads takes NaN, halves of characters, and nests as deep as the stack allows; pydantic's reader
does not. Numbers that no float holds and deep trees would still fail far from the file that they
came from. pydantic then checks the values, which come as JSON's or TOML's own types, as it checks
JSON text: there a strict model takes a list for a tuple and an object for a dataclass, and still
no "1" and no true for 1. One error line has all that is wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, ErrorDetails, from_json

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import read_within

LIMIT_BYTES = 16 * 2**20  # of a file; a thousand times what verify writes
MAX_DEPTH = 32  # our own files have less than ten
MAX_INTEGER = 2**64

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 in hex.")]

_SHOWN = 40  # characters of a value or a key in a message
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

T = TypeVar("T")


def loads(data: bytes) -> Any:
    """The tree of UTF-8 text. ValueError, in one line, for no JSON or more than any of our files has."""
    tree = from_json(data, allow_inf_nan=False)
    _check(tree, MAX_DEPTH)
    return tree


def _check(node: Any, levels: int) -> None:
    if isinstance(node, (dict, list)):
        if not levels:
            raise ValueError("it is nested too deeply")
        for child in node.values() if isinstance(node, dict) else node:
            _check(child, levels - 1)
    elif (isinstance(node, int) and abs(node) >= MAX_INTEGER) or node in (math.inf, -math.inf):
        raise ValueError("a number in it is too large")


def read(path: Path) -> Any:
    """The tree of a JSON file of LIMIT_BYTES at most. EdgeDtmError, in one line, for another."""
    return parse(read_within(path, LIMIT_BYTES), str(path))


def parse(data: bytes, source: str) -> Any:
    """The tree of UTF-8 text. EdgeDtmError, in one line that begins with source, for another."""
    try:
        return loads(data)
    except ValueError as error:
        raise EdgeDtmError(f"{source} is no JSON ({error}): make or copy it again") from None


def plain(tree: Any) -> Any:
    """The same tree with null for NaN and the infinities."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def dumps(tree: Any) -> str:
    """A file's text: sorted keys, indented by one space, numbers that are not finite as null."""
    return json.dumps(plain(tree), indent=1, sort_keys=True, allow_nan=False) + "\n"


class StrictModel(BaseModel):
    """An object of a file: every field of its own type, no field that is unknown."""

    model_config = STRICT | {"frozen": True}


@dataclass(frozen=True, config=STRICT)
class StrictDataclass:
    """Base of dataclasses that are checked whenever one is made. EdgeDtmError for a wrong value."""

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if isinstance(value, ArgsKwargs):  # made by code, not part of a larger file
                _refuse(error, cls.__name__, "")
            raise


def validated(model: type[T], tree: object, source: str, remedy: str) -> T:
    """The model's instance of a tree of JSON or TOML values.

    EdgeDtmError that begins with source, lists every offence with its place and ends with remedy.
    """
    try:
        return TypeAdapter(model).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        _refuse(error, source, remedy)


def check_version(tree: object, version: int, source: str, kind: str | None = None) -> None:
    """EdgeDtmError when tree is no object, or has another schema version or kind.

    Asked before validated: the fields of another version would only give misleading offences.
    """
    if kind is not None and not (isinstance(tree, dict) and tree.get("kind") == kind):
        raise EdgeDtmError(f"{source} holds no {kind}: give another file")
    value = tree.get("schema_version") if isinstance(tree, dict) else None
    if type(value) is not int or value != version:
        raise EdgeDtmError(
            f"{source} has schema version {_shown(value)}, this edge-dtm reads {version}: make it "
            "again, or use the edge-dtm that wrote it"
        )


def _refuse(error: ValidationError, source: str, remedy: str) -> NoReturn:
    details = error.errors(include_url=False)
    line = f"{source} is wrong: " + "; ".join(f"{_place(d['loc'])}: {_reason(d)}" for d in details)
    raise EdgeDtmError(f"{line}; {remedy}" if remedy else line) from None


def _place(steps: tuple[int | str, ...]) -> str:
    """Such as `files."a/b".size_bytes` or `kernels[2].type`."""
    place = ""
    for step in steps:
        if isinstance(step, int):
            place += f"[{step}]"
        elif step != "[key]":  # pydantic's word for a key that is wrong itself
            name = step[:_SHOWN]
            place += f".{name if _PLAIN.fullmatch(name) else json.dumps(name)}"
    return place.removeprefix(".") or "it"


def _reason(detail: ErrorDetails) -> str:
    match detail["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden" | "unexpected_keyword_argument":
            return "is unknown"
        case "value_error":
            return str(detail["ctx"]["error"])
    words = detail["msg"].replace("Input should", "should", 1)
    value = detail["input"]
    if isinstance(value, (dict, list, ArgsKwargs)):
        return words
    return f"is {_shown(value)}, {words}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
