"""Measures this machine, above all the bandwidth of its memory, and writes its device profile."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import StageProgress, no_progress
from edge_dtm.core.machine import Room, board, cache_bytes, meminfo, room, usable_cores
from edge_dtm.device.bandwidth import (
    MEASURED_TYPES,
    SAME_SPEED,
    Bandwidth,
    measure,
    size_to_measure,
    thread_counts,
)
from edge_dtm.device.cpu import Build, Cpu, read_cpu, repacked_types
from edge_dtm.device.first_decode import first_decode_in_child
from edge_dtm.formats.profile import SCHEMA_VERSION, DeviceProfile, load_profile
from edge_dtm.report.numbers import plural

# Whose choices (context, wanted speed, share, KV type) are taken over, with their sources.
CHOICES_FROM = "raspberrypi"
_CHOSEN = ("n_ctx", "wanted_tokens_per_s", "max_share_of_f16", "kv_type")

_ISA_NAMES = {"FP16_VA": "fp16", "MATMUL_INT8": "i8mm"}  # as in the packaged profiles


@dataclass(frozen=True)
class MachineFacts:
    """What the system says of this machine. board: empty without a device tree."""

    board: str
    cpu: Cpu
    build: Build
    ram_bytes: int
    room: Room
    cores: int


def detect(
    name: str, root: Path = Path("/"), progress: StageProgress = no_progress
) -> DeviceProfile:
    """Measure this machine, which takes about a minute, and return its profile.

    name: the profile's, such as default_name's. root: where proc and sys are.
    EdgeDtmError where Linux' /proc is missing, llama.cpp
    cannot run, or memory or disk do not suffice for measuring.
    """
    total = meminfo(root).get("MemTotal")
    if not total:
        raise EdgeDtmError(
            "profiles detect reads /proc/meminfo, which is not there: write the profile by hand "
            "(docs/add-a-profile.md)"
        )
    facts = MachineFacts(
        build=first_decode_in_child(),
        board=board(root),
        cpu=read_cpu(root),
        ram_bytes=total,
        room=room(root),
        cores=usable_cores(root),
    )
    place = Path(tempfile.gettempdir())
    free_disk = shutil.disk_usage(place).free
    size = size_to_measure(cache_bytes(root), facts.room.free_bytes, free_disk, place)
    bandwidth = measure(size, thread_counts(facts.cores), progress)
    return profile_of(name, facts, bandwidth, datetime.date.today().isoformat())


def default_name(board_name: str, cpu: Cpu) -> str:
    """`raspberry-pi-5-model-b-rev-1.0` of a board, else of the CPU."""
    return re.sub(r"[^a-z0-9.]+", "-", (board_name or cpu.name).lower()).strip("-.") or "device"


def check_name(name: str) -> str:
    """The name itself. EdgeDtmError when it could not be part of a file's name everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise EdgeDtmError(
            f"{name!r} is no name for a profile: take letters, digits, dots and hyphens"
        )
    return name


def profile_of(name: str, facts: MachineFacts, measured: Bandwidth, date: str) -> DeviceProfile:
    """The profile, with a sentence on how for every number. date: ISO 8601."""
    from edge_dtm.formats.ggml_types import ALLOWED_TYPES

    choices = load_profile(CHOICES_FROM)
    cpu, room = facts.cpu, facts.room
    repacked = repacked_types(facts.build.features)
    fast = tuple(t for t in ALLOWED_TYPES if t in repacked)
    isa = tuple(_ISA_NAMES.get(f, f.lower()) for f in sorted(cpu.features) if f != "ARM_FMA")
    return DeviceProfile(
        schema_version=SCHEMA_VERSION,
        name=name,
        description=f"{facts.board or cpu.name}, {facts.ram_bytes / 1e9:.1f} GB, "
        + plural(facts.cores, "core")
        + (f" ({cpu.name})" if facts.board and cpu.name != cpu.machine else "")
        + f", CPU only, detected on {date}",
        ram_bytes=facts.ram_bytes,
        reserve_bytes=max(facts.ram_bytes - room.free_bytes, 1),
        effective_bandwidth_bytes_per_s=measured.bytes_per_s,
        cores=facts.cores,
        threads=measured.threads,
        isa_features=isa or (cpu.machine.lower(),),
        fast_types=fast or MEASURED_TYPES,
        **{key: getattr(choices, key) for key in _CHOSEN},
        sources=_sources(facts, measured, date, bool(fast))
        | {key: choices.sources[key] for key in _CHOSEN if key in choices.sources},
    )


def _sources(facts: MachineFacts, measured: Bandwidth, date: str, repacks: bool) -> dict[str, str]:
    """A sentence on how each measured number came about."""
    build, room = facts.build, facts.room
    llama = f"llama-cpp-python {build.version}"
    compiled = ", ".join(sorted(build.features)) or "unknown features"
    speeds = "; ".join(f"{t} {rate}" for t, rate in measured.by_type.items())
    sweep = ", ".join(f"{r.threads}: {r.bytes_per_s / 1e9:.2f}e9" for r in measured.sweep)
    first = next(iter(measured.by_type))
    here = f"Measured on this machine on {date}"
    return {
        "ram_bytes": f"MemTotal of /proc/meminfo on this machine on {date}: what the kernel "
        "manages, without what the firmware keeps.",
        "reserve_bytes": f"{here}: ram_bytes minus what a process may still take, which "
        f"{room.limit} limited to {room.free_bytes} bytes; detect again when other programs run.",
        "effective_bandwidth_bytes_per_s": f"{here}: tokens per second times file size of "
        f"decoding in {llama} (compiled with {compiled}) with {plural(measured.threads, 'thread')} "
        f"and models of random weights of {measured.model_bytes / 1e6:.0f} MB, in bytes/s: "
        f"{speeds}; the slower one is taken.",
        "cores": f"Physical cores that the process could use on {date}, by the kernel's topology "
        "and the limit of the control group.",
        "threads": f"{here}: the fewest threads that decode {first} within "
        f"{1 - SAME_SPEED:.0%} of the best, in bytes/s by threads: {sweep}.".replace("%", " %"),
        "isa_features": f"What the CPU ({facts.cpu.name}) reports to the kernel.",
        "fast_types": f"ggml_repack_get_optimal_repack_type of llama.cpp "
        f"(ggml/src/ggml-cpu/repack.cpp) for what {llama} was compiled with on this machine."
        if repacks
        else f"{llama} as it is compiled here repacks no type: the ones that were measured.",
    }


def to_toml(profile: DeviceProfile) -> str:
    """The text of a profile file; load_profile reads the same profile from it."""
    values = {f.name: getattr(profile, f.name) for f in fields(profile) if f.name != "sources"}
    return "\n".join([*_toml_lines(values), "", "[sources]", *_toml_lines(profile.sources), ""])


def _toml_lines(table: Mapping[str, object]) -> list[str]:
    # JSON's strings, numbers and lists are TOML's, but for DEL, which TOML wants escaped.
    return [
        f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
        for key, value in table.items()
    ]
