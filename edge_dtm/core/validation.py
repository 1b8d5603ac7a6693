"""Data that others wrote, checked by pydantic; and one error line for all that is wrong with it.

Values come as JSON's or TOML's own types. They are checked as JSON text is: there a strict model
takes a list for a tuple and an object for a dataclass, and still no "1" and no true for 1.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, ErrorDetails

from edge_dtm.core.errors import EdgeDtmError

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 in hex.")]

_SHOWN = 40  # characters of a value or a key in a message
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

T = TypeVar("T")


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
