"""Device profiles: what a device can hold and read, and the byte budget that follows.

A profile is a TOML file whose every number names its source; ``docs/add-a-profile.md`` explains
the fields. Validation is strict because a mistyped key would otherwise fall back to nothing and
end in a model that does not fit the device.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeGuard

from edge_dtm.core.errors import EdgeDtmError

SCHEMA_VERSION = 1

# Spelled out instead of taken from the gguf package, so that listing profiles needs no
# third-party import.
GGML_TYPE_NAMES: frozenset[str] = frozenset(
    {
        "F32", "F16", "BF16",
        "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K",
        "Q5_1", "Q5_0", "Q4_1", "Q4_0",
        "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
        "TQ2_0", "TQ1_0", "MXFP4",
    }
)  # fmt: skip

# The values llama.cpp accepts for --cache-type-k and --cache-type-v.
KV_TYPE_NAMES: frozenset[str] = frozenset(
    {"F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"}
)

_INT_KEYS = (
    "ram_bytes",
    "reserve_bytes",
    "effective_bandwidth_bytes_per_s",
    "cores",
    "threads",
    "n_ctx",
)
_FLOAT_KEYS = ("wanted_tokens_per_s", "max_share_of_f16")
_STRING_KEYS = ("name", "description", "kv_type")
_LIST_KEYS = ("isa_features", "fast_types")
_SOURCE_REQUIRED = _INT_KEYS + _FLOAT_KEYS
_SOURCE_ALLOWED = (*_SOURCE_REQUIRED, *_LIST_KEYS, "kv_type")

# TOML guarantees 64-bit signed integers only.
_INT_MAX = 2**63 - 1
# Keeps a message with a long faulty value readable.
_SHOWN_MAX = 80


@dataclass(frozen=True)
class DeviceProfile:
    """One device, as read from a profile file.

    Attributes:
        schema_version: version of the file format, ``SCHEMA_VERSION``.
        name: short name, for instance ``raspberrypi``.
        description: one line for people.
        ram_bytes: physical memory, bytes.
        reserve_bytes: memory that the operating system and other processes keep, bytes.
        effective_bandwidth_bytes_per_s: memory bytes read per second while llama.cpp decodes.
        cores: CPU cores.
        threads: threads llama.cpp should use, at most ``cores``.
        isa_features: instruction set extensions, for instance ``dotprod``.
        fast_types: GGML types with fast kernels on this device.
        n_ctx: context length to reserve memory for, tokens.
        wanted_tokens_per_s: decoding speed to reach, tokens per second.
        max_share_of_f16: largest budget as a share of the F16 file, in (0, 1].
        kv_type: GGML type of the KV cache.
        sources: where each number comes from, by field name.
    """

    schema_version: int
    name: str
    description: str
    ram_bytes: int
    reserve_bytes: int
    effective_bandwidth_bytes_per_s: int
    cores: int
    threads: int
    isa_features: tuple[str, ...]
    fast_types: tuple[str, ...]
    n_ctx: int
    wanted_tokens_per_s: float
    max_share_of_f16: float
    kv_type: str
    # A dict has no hash; the other fields identify a profile well enough.
    sources: dict[str, str] = field(hash=False)


def profiles_dir() -> Path:
    """Return the folder with the packaged profiles.

    An installed wheel has it inside the package, a source checkout beside the package.

    Raises:
        EdgeDtmError: neither folder exists.
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
    """Return the packaged profiles, ordered by name.

    Raises:
        EdgeDtmError: a packaged profile is missing or invalid.
    """
    profiles = [_load_file(path) for path in sorted(profiles_dir().glob("*.toml"))]
    return sorted(profiles, key=lambda profile: profile.name)


def load_profile(name_or_path: str) -> DeviceProfile:
    """Read and check one profile.

    Args:
        name_or_path: name of a packaged profile, or path of a ``.toml`` file. Anything that ends
            in ``.toml`` or has a path separator is a path.

    Raises:
        EdgeDtmError: no such profile, an unreadable file, broken TOML or invalid content; the
            message lists every problem of the file.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path or "\\" in name_or_path:
        return _load_file(Path(name_or_path))
    folder = profiles_dir()
    available = sorted(path.stem for path in folder.glob("*.toml"))
    if name_or_path not in available:
        raise EdgeDtmError(
            f"no device profile named {name_or_path!r}; available: {', '.join(available)}; "
            "or give the path of a .toml file (docs/add-a-profile.md)"
        )
    return _load_file(folder / f"{name_or_path}.toml")


def packaged_profile(name: object) -> DeviceProfile | None:
    """A packaged profile by its name alone, for a name that a file gave: it is never taken as a
    path. None when there is no such profile."""
    known = {path.stem for path in profiles_dir().glob("*.toml")}
    return load_profile(name) if isinstance(name, str) and name in known else None


def _load_file(path: Path) -> DeviceProfile:
    try:
        with path.open("rb") as stream:
            table = tomllib.load(stream)
    except OSError as error:
        raise EdgeDtmError(
            f"cannot read device profile {path}: {error.strerror or error}; "
            "check the path and its permissions"
        ) from error
    # tomllib leaks a plain ValueError for bad UTF-8, a NUL in the path or a huge integer, and
    # RecursionError for deep nesting.
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise EdgeDtmError(
            f"device profile {path} is not valid TOML: {reason}; correct the file"
        ) from error
    return _parse(table, path)


def _parse(table: Mapping[str, object], path: Path) -> DeviceProfile:
    version = table.get("schema_version")
    # Alone and first: the keys of another version would only give misleading complaints.
    if version is not None and not (_is_int(version) and version == SCHEMA_VERSION):
        raise EdgeDtmError(
            f"device profile {path} has schema_version {_shown(version)}, this edge-dtm reads "
            f"{SCHEMA_VERSION}; update the file (docs/add-a-profile.md) or edge-dtm"
        )

    known = [item.name for item in fields(DeviceProfile)]
    problems = [f"unknown key {key!r}" for key in table if key not in known]
    problems += [f"missing key {key!r}" for key in known if key not in table]

    strings = {key: _string(table, key, problems) for key in _STRING_KEYS}
    lists = {key: _string_list(table, key, problems) for key in _LIST_KEYS}
    ints = {key: _positive_int(table, key, problems) for key in _INT_KEYS}
    floats = {key: _positive_float(table, key, problems) for key in _FLOAT_KEYS}
    sources = _sources(table, problems)

    kv_type = strings["kv_type"]
    if kv_type and kv_type not in KV_TYPE_NAMES:
        problems.append(
            f"kv_type {kv_type!r} is no KV cache type (known: {', '.join(sorted(KV_TYPE_NAMES))})"
        )
    unknown_types = [name for name in lists["fast_types"] if name not in GGML_TYPE_NAMES]
    if unknown_types:
        problems.append(
            f"fast_types has unknown GGML types {', '.join(map(repr, unknown_types))} "
            f"(known: {', '.join(sorted(GGML_TYPE_NAMES))})"
        )
    # A value of 0 stands for one that was already reported.
    if ints["cores"] and ints["threads"] > ints["cores"]:
        problems.append(f"threads {ints['threads']} is more than cores {ints['cores']}")
    if ints["ram_bytes"] and ints["reserve_bytes"] >= ints["ram_bytes"]:
        problems.append(
            f"reserve_bytes {ints['reserve_bytes']} leaves nothing of ram_bytes {ints['ram_bytes']}"
        )
    if floats["max_share_of_f16"] > 1:
        problems.append(f"max_share_of_f16 {floats['max_share_of_f16']:g} is above 1")

    if problems:
        raise EdgeDtmError(
            f"device profile {path} is invalid: {'; '.join(problems)}; "
            "correct the file (docs/add-a-profile.md)"
        )
    return DeviceProfile(
        schema_version=SCHEMA_VERSION,
        name=strings["name"],
        description=strings["description"],
        ram_bytes=ints["ram_bytes"],
        reserve_bytes=ints["reserve_bytes"],
        effective_bandwidth_bytes_per_s=ints["effective_bandwidth_bytes_per_s"],
        cores=ints["cores"],
        threads=ints["threads"],
        isa_features=lists["isa_features"],
        fast_types=lists["fast_types"],
        n_ctx=ints["n_ctx"],
        wanted_tokens_per_s=floats["wanted_tokens_per_s"],
        max_share_of_f16=floats["max_share_of_f16"],
        kv_type=kv_type,
        sources=sources,
    )


# The readers below report a problem and return an empty value, so that one pass finds them all;
# a missing key is reported by the caller.


def _is_int(value: object) -> TypeGuard[int]:
    # bool is a subclass of int; `cores = true` is a mistake, not one core.
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer above 4300 digits, but TOML hex can hold one.
        return "a huge number"
    return text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "..."


def _string(table: Mapping[str, object], key: str, problems: list[str]) -> str:
    if key not in table:
        return ""
    value = table[key]
    if not isinstance(value, str):
        problems.append(f"{key} is {_shown(value)}, needs to be a string")
        return ""
    if not value.strip() or len(value.splitlines()) != 1:
        problems.append(f"{key} is {_shown(value)}, needs to be one line of text")
        return ""
    return value


def _string_list(table: Mapping[str, object], key: str, problems: list[str]) -> tuple[str, ...]:
    if key not in table:
        return ()
    value = table[key]
    if not isinstance(value, list):
        problems.append(f"{key} is {_shown(value)}, needs to be a list of strings")
        return ()
    names = tuple(item for item in value if isinstance(item, str) and item.strip())
    if len(names) != len(value):
        problems.append(f"{key} is {_shown(value)}, needs to be a list of strings")
        return ()
    if len(set(names)) != len(names):
        problems.append(f"{key} is {_shown(value)}, needs to name each entry once")
    if not names:
        problems.append(f"{key} is empty, needs at least one entry")
    return names


def _positive_int(table: Mapping[str, object], key: str, problems: list[str]) -> int:
    if key not in table:
        return 0
    value = table[key]
    if not _is_int(value):
        problems.append(f"{key} is {_shown(value)}, needs to be a whole number")
        return 0
    if not 0 < value <= _INT_MAX:
        problems.append(f"{key} is {_shown(value)}, needs to be above 0 and below 2^63")
        return 0
    return value


def _positive_float(table: Mapping[str, object], key: str, problems: list[str]) -> float:
    if key not in table:
        return 0.0
    value = table[key]
    if not (_is_int(value) or isinstance(value, float)):
        problems.append(f"{key} is {_shown(value)}, needs to be a number")
        return 0.0
    # Written so that nan fails too; the upper bound keeps float() from overflowing.
    if not 0 < value <= _INT_MAX:
        problems.append(f"{key} is {_shown(value)}, needs to be above 0 and below 2^63")
        return 0.0
    return float(value)


def _sources(table: Mapping[str, object], problems: list[str]) -> dict[str, str]:
    if "sources" not in table:
        return {}
    value = table["sources"]
    if not isinstance(value, dict):
        problems.append(f"sources is {_shown(value)}, needs to be a table")
        return {}
    problems += [f"unknown key {key!r} in sources" for key in value if key not in _SOURCE_ALLOWED]
    sources: dict[str, str] = {}
    for key in _SOURCE_ALLOWED:
        source = value.get(key)
        if source is None:
            if key in _SOURCE_REQUIRED:
                problems.append(f"no source for {key}")
        elif not isinstance(source, str) or not source.strip():
            problems.append(f"source for {key} is {_shown(source)}, needs to be a sentence")
        else:
            sources[key] = source
    return sources
