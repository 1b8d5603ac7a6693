"""Device profiles: what a device can hold and read, and the byte budget that follows.

A profile is a TOML file whose every number names its source; ``docs/add-a-profile.md`` explains
the fields. Validation is strict because a mistyped key would otherwise fall back to nothing and
end in a model that does not fit the device.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from edge_dtm.core.errors import EdgeDtmError, os_errors
from edge_dtm.core.strict_json import STRICT, StrictDataclass, check_version, validated
from edge_dtm.formats.ggml_types import KV_TYPES, WEIGHT_TYPES

SCHEMA_VERSION = 1

# What `sources` says nothing of, and where it need not; it names every number's source.
_UNSOURCED = ("schema_version", "name", "description", "sources")
_SOURCE_OPTIONAL = ("isa_features", "fast_types", "kv_type")


def _one_line(text: str) -> str:
    if not text.strip() or len(text.splitlines()) != 1:
        raise ValueError(f"is {text!r}, should be one line of text")
    return text


def _no_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("should name each entry once")
    return names


def _known(known: frozenset[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"is {name!r}, known are {', '.join(sorted(known))}")
        return name

    return AfterValidator(check)


_Line = Annotated[str, AfterValidator(_one_line)]
# Not strict: TOML has no tuples.
_Distinct = (Field(min_length=1, strict=False), AfterValidator(_no_repeats))
# TOML guarantees 64-bit signed integers only.
_PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
_PositiveFloat = Annotated[float, Field(gt=0, lt=2**63)]


@dataclass(frozen=True, config=STRICT)
class DeviceProfile(StrictDataclass):
    """One device, as read from a profile file. EdgeDtmError when one is made with a wrong value.

    docs/add-a-profile.md says what each field means; sizes are in bytes.
    """

    schema_version: int
    name: _Line
    description: _Line
    ram_bytes: _PositiveInt
    reserve_bytes: _PositiveInt
    effective_bandwidth_bytes_per_s: _PositiveInt
    cores: _PositiveInt
    threads: _PositiveInt
    isa_features: Annotated[tuple[_Line, ...], *_Distinct]
    fast_types: Annotated[tuple[Annotated[str, _known(WEIGHT_TYPES)], ...], *_Distinct]
    n_ctx: _PositiveInt
    wanted_tokens_per_s: _PositiveFloat
    max_share_of_f16: Annotated[float, Field(gt=0, le=1)]
    kv_type: Annotated[str, _known(KV_TYPES)]
    # A dict has no hash; the other fields identify a profile well enough.
    sources: dict[str, _Line] = field(hash=False)

    # A field that was refused itself is not in info.data: one mistake is one offence.
    @field_validator("reserve_bytes", "threads")
    @classmethod
    def _is_below(cls, value: int, info: ValidationInfo) -> int:
        limit, least_room = {"reserve_bytes": ("ram_bytes", 1), "threads": ("cores", 0)}[
            str(info.field_name)
        ]
        if value + least_room > info.data.get(limit, math.inf):
            raise ValueError(f"is {value}, too much for {limit} {info.data[limit]}")
        return value

    @field_validator("sources")
    @classmethod
    def _names_every_number(cls, value: dict[str, str]) -> dict[str, str]:
        known = [f.name for f in fields(cls) if f.name not in _UNSOURCED]
        problems = [f"{key!r} is unknown" for key in value if key not in known]
        missing = [key for key in known if key not in {*value, *_SOURCE_OPTIONAL}]
        problems += [f"no source for {key}" for key in missing]
        if problems:
            raise ValueError(", ".join(problems))
        return value


def profiles_dir() -> Path:
    """The folder with the packaged profiles: inside an installed package, beside one in a checkout.

    EdgeDtmError when there is neither.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "device_profiles", package.parent / "device_profiles")
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise EdgeDtmError(
        f"the packaged device profiles are missing (looked in {candidates[0]} and "
        f"{candidates[1]}); reinstall edge-dtm or give the path of a profile file"
    )


def list_profiles() -> list[DeviceProfile]:
    """The packaged profiles, ordered by name."""
    return [_load_file(path) for path in sorted(profiles_dir().glob("*.toml"))]


def load_profile(name_or_path: str) -> DeviceProfile:
    """A packaged profile by its name, or one from a path, which ends in .toml or has a separator.

    EdgeDtmError, which lists every problem, when there is none or it cannot be read or is wrong.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path or "\\" in name_or_path:
        return _load_file(Path(name_or_path))
    if profile := packaged_profile(name_or_path):
        return profile
    available = sorted(path.stem for path in profiles_dir().glob("*.toml"))
    raise EdgeDtmError(
        f"no device profile named {name_or_path!r}; available: {', '.join(available)}; "
        "or give the path of a .toml file (docs/add-a-profile.md)"
    )


def packaged_profile(name: object) -> DeviceProfile | None:
    """A packaged profile by its name alone, for a name that a file gave: it is never taken as a
    path. None when there is no such profile."""
    paths = {path.stem: path for path in profiles_dir().glob("*.toml")}
    return _load_file(paths[name]) if isinstance(name, str) and name in paths else None


def _load_file(path: Path) -> DeviceProfile:
    try:
        with os_errors(f"cannot read device profile {path}"):
            table = tomllib.loads(path.read_bytes().decode())
        repr(table)  # ValueError for a hexadecimal number that is longer than Python prints any
    # tomllib leaks a plain ValueError for bad UTF-8, a NUL in the path or a huge integer, and
    # RecursionError for deep nesting.
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise EdgeDtmError(
            f"device profile {path} is not valid TOML: {reason}; correct the file"
        ) from None
    source = f"device profile {path}"
    if "schema_version" in table:
        check_version(table, SCHEMA_VERSION, source)
    return validated(DeviceProfile, table, source, "correct the file (docs/add-a-profile.md)")
