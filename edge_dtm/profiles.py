"""Device profiles: what a device can hold and read, and the byte budget that follows.

A profile is a TOML file whose every number names its source; ``docs/add-a-profile.md`` explains
the fields. Validation is strict because a mistyped key would otherwise fall back to nothing and
end in a model that does not fit the device.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Literal, TypeGuard

from edge_dtm.errors import EdgeDtmError

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
_BYTES_PER_MB = 1_000_000
# Keeps a message with a long faulty value readable.
_SHOWN_MAX = 80

Binding = Literal["ram", "speed", "share"]


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


@dataclass(frozen=True)
class ByteBudget:
    """The largest GGUF file a device should get, and the limits it comes from, all in bytes.

    Attributes:
        bytes: the budget, the smallest of the three limits.
        ram_limit_bytes: what fits in memory beside the system, the KV cache and the buffers.
        speed_limit_bytes: what can be read per token at the wanted speed.
        share_limit_bytes: the largest share of the F16 file.
        binding: which limit is the smallest; on a tie the first of ram, speed, share.
    """

    bytes: int
    ram_limit_bytes: int
    speed_limit_bytes: int
    share_limit_bytes: int
    binding: Binding

    def explain(self) -> str:
        """Return one line for people: the budget, the three limits in MB (1e6 bytes), which binds.

        Raises nothing.
        """
        label = {
            "ram": "memory",
            "speed": "the wanted speed",
            "share": "the largest share of the F16 file",
        }[self.binding]
        return (
            f"budget {_mb(self.bytes)}, set by {label} "
            f"(memory allows {_mb(self.ram_limit_bytes)}, "
            f"the wanted speed allows {_mb(self.speed_limit_bytes)}, "
            f"the largest share of the F16 file allows {_mb(self.share_limit_bytes)})"
        )


def profiles_dir() -> Path:
    """Return the folder with the packaged profiles.

    An installed wheel has it inside the package, a source checkout beside the package.

    Raises:
        EdgeDtmError: neither folder exists.
    """
    package = Path(__file__).resolve().parent
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


def byte_budget(
    profile: DeviceProfile,
    *,
    kv_bytes_per_token: int,
    compute_buffer_bytes: int,
    f16_file_bytes: int,
    n_ctx: int | None = None,
    wanted_tokens_per_s: float | None = None,
) -> ByteBudget:
    """Compute the largest GGUF file, in bytes, for a device.

    The budget is the smallest of three limits:

    * memory: ``ram - reserve - n_ctx * kv_bytes_per_token - compute_buffer``;
    * speed: ``bandwidth / wanted_tokens_per_s - kv_bytes_per_token * n_ctx / 2``. Decoding one
      token reads every weight and the filled part of the KV cache once, and memory bandwidth
      limits it (Pope et al. 2022, arXiv:2211.05102; roofline model: Williams et al. 2009,
      doi:10.1145/1498765.1498785). Half of ``n_ctx`` is the average fill while it grows from
      empty to full;
    * share: ``max_share_of_f16 * f16_file_bytes``, a choice of this project.

    Args:
        profile: the device.
        kv_bytes_per_token: KV cache of one token over all layers, bytes.
        compute_buffer_bytes: buffers of llama.cpp beside weights and KV cache, bytes.
        f16_file_bytes: size of the F16 GGUF file of the model, bytes.
        n_ctx: context length in tokens; the profile's when None.
        wanted_tokens_per_s: decoding speed in tokens per second; the profile's when None.

    Raises:
        EdgeDtmError: an argument out of range, or no room for any weights; with the numbers.
    """
    context_tokens = profile.n_ctx if n_ctx is None else n_ctx
    tokens_per_s = (
        profile.wanted_tokens_per_s if wanted_tokens_per_s is None else wanted_tokens_per_s
    )
    problems: list[str] = []
    if kv_bytes_per_token < 0:
        problems.append(f"kv_bytes_per_token is {kv_bytes_per_token}, needs to be 0 or more")
    if compute_buffer_bytes < 0:
        problems.append(f"compute_buffer_bytes is {compute_buffer_bytes}, needs to be 0 or more")
    if f16_file_bytes <= 0:
        problems.append(f"f16_file_bytes is {f16_file_bytes}, needs to be above 0")
    if context_tokens <= 0:
        problems.append(f"n_ctx is {context_tokens}, needs to be above 0")
    if not (math.isfinite(tokens_per_s) and tokens_per_s > 0):
        problems.append(f"wanted_tokens_per_s is {tokens_per_s}, needs to be above 0 and finite")
    if problems:
        raise EdgeDtmError(
            f"cannot compute a byte budget: {'; '.join(problems)}; correct these values"
        )

    kv_full_bytes = context_tokens * kv_bytes_per_token
    # Exact arithmetic: floats would round byte counts above 2**53 and could pass a limit by one.
    speed_bytes = Fraction(profile.effective_bandwidth_bytes_per_s) / Fraction(tokens_per_s)
    limits: dict[Binding, int] = {
        "ram": profile.ram_bytes - profile.reserve_bytes - kv_full_bytes - compute_buffer_bytes,
        "speed": math.floor(speed_bytes - Fraction(kv_full_bytes, 2)),
        "share": math.floor(Fraction(profile.max_share_of_f16) * f16_file_bytes),
    }
    binding = min(limits, key=lambda limit: limits[limit])
    if limits[binding] <= 0:
        remedies: dict[Binding, str] = {
            "ram": "lower n_ctx or take a profile of a device with more memory",
            "speed": "lower wanted_tokens_per_s or n_ctx",
            "share": "check f16_file_bytes, or raise max_share_of_f16 in the profile",
        }
        advice = "; ".join(remedies[limit] for limit in limits if limits[limit] <= 0)
        raise EdgeDtmError(
            f"no room for a model on {profile.name}: memory leaves {_mb(limits['ram'])} "
            f"(RAM {_mb(profile.ram_bytes)}, reserve {_mb(profile.reserve_bytes)}, "
            f"KV cache {_mb(kv_full_bytes)} for {context_tokens} tokens, "
            f"buffers {_mb(compute_buffer_bytes)}), "
            f"{tokens_per_s:g} tokens/s leave {_mb(limits['speed'])}, "
            f"the share of the F16 file leaves {_mb(limits['share'])}; {advice}"
        )
    return ByteBudget(
        bytes=limits[binding],
        ram_limit_bytes=limits["ram"],
        speed_limit_bytes=limits["speed"],
        share_limit_bytes=limits["share"],
        binding=binding,
    )


def estimate_decode_tokens_per_s(
    profile: DeviceProfile, file_bytes: int, kv_bytes_read: int = 0
) -> float:
    """Estimate the decoding speed in tokens per second: ``bandwidth / bytes read per token``.

    An estimate, not a measurement: it takes decoding as limited by memory bandwidth (Pope et al.
    2022, arXiv:2211.05102) and the whole file as read once per token. It is too low for a model
    with an untied embedding table, of which one row per token is read, and too high where the
    kernels of a type, and not the memory, set the pace.

    Args:
        profile: the device.
        file_bytes: size of the GGUF file, bytes.
        kv_bytes_read: bytes of KV cache read per token.

    Raises:
        EdgeDtmError: ``file_bytes`` not above 0 or ``kv_bytes_read`` below 0.
    """
    if file_bytes <= 0 or kv_bytes_read < 0:
        raise EdgeDtmError(
            f"cannot estimate the decoding speed of a file of {file_bytes} bytes with "
            f"{kv_bytes_read} bytes of KV cache read per token; "
            "give a file size above 0 and KV bytes of 0 or more"
        )
    return profile.effective_bandwidth_bytes_per_s / (file_bytes + kv_bytes_read)


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / _BYTES_PER_MB:,.1f} MB"


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
