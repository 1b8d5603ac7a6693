"""The doctor's checks: from text, numbers or a folder that stands for / to findings."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_dtm.core.machine import (
    Room,
    cpu_capacities,
    cpu_quota,
    physical_cores,
    read_text,
    usable_cpus,
)
from edge_dtm.device.cpu import Build, Cpu, rebuild_command, repacked_types, unused_by_build
from edge_dtm.device.sensors import throttled
from edge_dtm.llamacpp.gguf_header import MORE_MEMORY, Need, TensorInfo
from edge_dtm.report.numbers import megabytes

TIGHT_SHARE = 0.8  # of the free memory; beyond it the page cache of anything else is lost
SWAPPED_SHARE = 0.05  # of the memory

# Their "powersave" is a governor that raises the frequency when there is work.
_SELF_GOVERNED = ("intel_pstate", "amd-pstate", "amd-pstate-epp", "intel_cpufreq")
_GOVERNOR_COMMAND = (
    "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
)


@dataclass(frozen=True)
class Finding:
    """One result of a check. command: what mends it, or empty."""

    level: Literal["ok", "note", "warning", "error"]
    what: str
    why: str
    command: str = ""


Findings = Iterator[Finding]


def user_space(machine: str, pointer_bytes: int) -> Findings:
    """Whether Python, and so llama.cpp, is a 64-bit program."""
    if pointer_bytes < 8:
        yield Finding(
            "error",
            f"Python is a program of {8 * pointer_bytes} bits on {machine}",
            "it has 2 to 3 GB of addresses and no fast kernels: install a 64-bit system",
            "getconf LONG_BIT",
        )


def versions(build: Build) -> Findings:
    """Of Python, edge-dtm and llama-cpp-python."""
    from edge_dtm import __version__

    yield Finding(
        "ok",
        f"edge-dtm {__version__}, Python {platform.python_version()}, llama-cpp-python "
        f"{build.version}",
        f"on {platform.platform()}",
    )


def kernels(build: Build, cpu: Cpu) -> Findings:
    """Whether llama.cpp, which can run here, uses what the CPU has."""
    if not build.features:
        yield Finding(
            "warning",
            "llama.cpp does not say what it was compiled with",
            "so a build that is slow or wrong for this CPU cannot be told from a good one",
            rebuild_command(build.version),
        )
        return
    unused, repacks = unused_by_build(build, cpu), "REPACK" in build.features
    if unused:
        yield Finding(
            "warning",
            f"llama.cpp does not use {', '.join(unused)}, which this CPU ({cpu.name}) has",
            "it was compiled for an older CPU, as wheels are; compiled here it is faster",
            rebuild_command(build.version),
        )
    if not repacks:
        yield Finding(
            "warning",
            "llama.cpp was compiled without REPACK",
            "weights keep their layout in the file, for which there are slower kernels",
            rebuild_command(build.version, "-DGGML_CPU_REPACK=ON"),
        )
    if not unused and repacks:
        used = ", ".join(sorted(build.features & cpu.known)) or "no known feature"
        yield Finding("ok", f"llama.cpp fits this CPU ({cpu.name})", f"compiled with {used}")


def types(matrices: Sequence[TensorInfo], build: Build, cpu: Cpu) -> Findings:
    """Which quantized types of a model have repacked kernels here, by bytes."""
    from edge_dtm.formats.ggml_types import ALLOWED_TYPES, facts

    quantized = [m for m in matrices if facts(m.type).quantized]
    total = sum(m.size_bytes for m in matrices)
    here = repacked_types(build.features)
    possible = repacked_types(cpu.features | {"REPACK"}) if cpu.known else here
    slow: dict[str, int] = {}
    never: dict[str, int] = {}
    for m in quantized:
        repacked, repackable = (
            m.type in table and m.shape[1] % table[m.type] == 0 for table in (here, possible)
        )
        if not repacked:
            sizes = slow if repackable else never
            sizes[m.type] = sizes.get(m.type, 0) + m.size_bytes
    if slow:
        yield Finding(
            "warning",
            f"this build repacks no {_shares(slow, total)}",
            "this CPU has faster kernels for these types, which the build leaves out",
            rebuild_command(build.version),
        )
    if never:
        known = [name for name in possible if name in ALLOWED_TYPES]
        yield Finding(
            "note",
            f"llama.cpp has no repacked kernel on this CPU for {_shares(never, total)}",
            "these matrices run with the plain kernels: right, but slower, above all in prompts"
            + (f"; {', '.join(known)} have one where the rows divide by 8" if known else ""),
            f"edge-dtm compress MODEL_DIR --types F16,{','.join(known)} -o bundle" if known else "",
        )
    if quantized and not slow and not never:
        names = ", ".join(sorted({m.type for m in quantized}))
        yield Finding("ok", "the model's types run with the faster, repacked kernels", names)


def fits(needed: Need, there: Room) -> Findings:
    """File, KV cache and buffers against what this process may still take."""
    total = needed.total_bytes
    text = f"it {needed.beside(there)}"
    commands = {"ulimit": "ulimit -v unlimited", "control group": "cat /proc/self/cgroup"}
    command = next(
        (command for words, command in commands.items() if words in there.limit),
        "ps -eo rss,comm --sort=-rss | head",
    )
    if total <= TIGHT_SHARE * there.free_bytes:
        yield Finding("ok", "the model fits into memory", text)
    elif total <= there.free_bytes:
        yield Finding("warning", "the model barely fits into memory", text, command)
    else:
        text += f": {MORE_MEMORY}"
        yield Finding("error", "the model does not fit into memory", text, command)


def swap(meminfo: Mapping[str, int]) -> Findings:
    """Whether memory was short already. meminfo: in bytes."""
    used = meminfo.get("SwapTotal", 0) - meminfo.get("SwapFree", 0)
    if used > SWAPPED_SHARE * meminfo.get("MemTotal", 0):
        yield Finding(
            "warning",
            f"{megabytes(used)} are swapped out",
            "memory was short: stop what fills it, then empty the swap",
            "sudo swapoff -a && sudo swapon -a",
        )


def cores(root: Path, threads: int) -> Findings:
    """Whether as many threads as usable CPUs, which is the default, are a good number here."""
    usable = usable_cpus()
    quota = cpu_quota(root) or threads
    capacity = cpu_capacities(root, usable)
    fast = sum(c >= 0.8 * max(capacity) for c in capacity)
    physical = physical_cores(root, usable) or threads
    advice = "edge-dtm verify BUNDLE --threads {}"
    if quota < threads:
        yield Finding(
            "warning",
            f"the control group allows {quota:.3g} of {threads} CPUs",
            "more threads than that wait for each other at every matrix",
            advice.format(max(int(quota), 1)),
        )
    if fast < len(capacity):
        yield Finding(
            "note",
            f"{fast} of {len(capacity)} CPUs are fast (big.LITTLE)",
            "each matrix waits for the slowest thread: compare with --threads",
            advice.format(fast),
        )
    elif physical < threads:
        yield Finding(
            "note",
            f"{threads} CPUs are {physical} cores with several threads each",
            "decoding waits for memory, which a second thread on a core hardly speeds up",
            advice.format(physical),
        )
    elif quota >= threads:
        yield Finding("ok", f"threads by default: {threads}", "as many as CPUs")


def governor(root: Path) -> Findings:
    """The policy that sets the CPU's frequency."""
    slow = set()
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"):
        name = read_text(folder / "scaling_governor").strip()
        driver = read_text(folder / "scaling_driver").strip()
        if name in ("powersave", "conservative") and driver not in _SELF_GOVERNED:
            slow.add(name)
    for name in sorted(slow):
        yield Finding(
            "warning",
            f"the CPU's frequency governor is {name}",
            "the frequency stays low or rises late, so that speeds are those of a slower board",
            _GOVERNOR_COMMAND,
        )


def throttling(text: str) -> Findings:
    """What a Raspberry Pi's firmware says: `throttled=0x50005`; nothing where it is silent."""
    state = throttled(text)
    if state is None:
        return
    now, since = state
    command = "vcgencmd get_throttled"
    mend = "take the board's own power supply and cable, and a cooler; it shows 0x0 when mended"
    if now:
        yield Finding("warning", "; ".join(now), mend, command)
    elif since:
        what = f"since the start: {'; '.join(since)}"
        yield Finding("note", what, f"{mend} and started anew", command)
    else:
        yield Finding("ok", "neither throttled nor short of power", "since the start")


def disk(packed_bytes: int, free_bytes: int, place: Path, file_system: str) -> Findings:
    """Whether a packed bundle can be unpacked into the temporary folder, place."""
    command = "TMPDIR=/var/tmp edge-dtm verify BUNDLE"
    if free_bytes < packed_bytes:
        why = f"{megabytes(free_bytes)} are free, unpacked it is larger than {megabytes(packed_bytes)}"
        yield Finding("error", f"{place} has no room to unpack the bundle", why, command)
    elif file_system == "tmpfs":
        why = "what is unpacked there takes memory from the model"
        yield Finding("warning", f"{place} is in memory (tmpfs)", why, command)


def _shares(sizes: dict[str, int], total: int) -> str:
    """`Q5_0 (12.1 MB, 11 %), IQ3_S (...)`, largest first."""
    return ", ".join(
        f"{name} ({megabytes(size)}, {100 * size / total:.0f} %)"
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
    )
