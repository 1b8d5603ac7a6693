"""The doctor's checks: functions of text, numbers or a folder that stands for /, to findings."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from edge_dtm.core import machine
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import read_text
from edge_dtm.device.cpu import Build, Cpu, rebuild_command, repacked_types, unused_by_build
from edge_dtm.device.first_decode import require_runnable
from edge_dtm.device.linux import (
    cpu_capacities,
    cpu_quota,
    physical_cores,
    usable_cpus,
)
from edge_dtm.device.sensors import throttled
from edge_dtm.llamacpp import memory
from edge_dtm.llamacpp.gguf_header import TensorInfo

LEAST_LLAMA_CPP_PYTHON = (0, 3, 30)  # as in pyproject.toml
TIGHT_SHARE = 0.8  # of the free memory; beyond it the page cache of anything else is lost
SWAPPED_SHARE = 0.05  # of the memory

Level = Literal["ok", "note", "warning", "error"]

# Their "powersave" is a governor that raises the frequency when there is work.
_SELF_GOVERNED = ("intel_pstate", "amd-pstate", "amd-pstate-epp", "intel_cpufreq")
_GOVERNOR_COMMAND = (
    "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
)


@dataclass(frozen=True)
class Finding:
    """One thing found. command: what mends it, or empty."""

    level: Level
    what: str
    why: str
    command: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def user_space(machine: str, pointer_bytes: int) -> list[Finding]:
    """Whether Python, and so llama.cpp, is a 64-bit program."""
    if pointer_bytes >= 8:
        return []
    why = "a model must fit 2 to 3 GB of addresses, and llama.cpp has no fast kernels here"
    if machine in ("aarch64", "x86_64"):
        why += "; the kernel has 64 bits, the system around it has not"
    return [
        Finding(
            "error",
            f"Python is a program of {8 * pointer_bytes} bits on {machine}",
            f"{why}: install a 64-bit system",
            "getconf LONG_BIT",
        )
    ]


def page_size(page_bytes: int) -> list[Finding]:
    """A kernel with pages other than 4 KiB, such as that of the Raspberry Pi 5."""
    if page_bytes == 4096:
        return []
    return [
        Finding(
            "note",
            f"the kernel's pages have {page_bytes // 1024} KiB",
            "llama.cpp runs; a library that was linked for pages of 4 KiB does not load ("
            "on a Raspberry Pi 5, kernel=kernel8.img in /boot/firmware/config.txt brings 4 KiB)",
            "getconf PAGESIZE",
        )
    ]


def versions(build: Build) -> list[Finding]:
    """Of Python, edge-dtm and llama-cpp-python."""
    from edge_dtm import __version__

    text = (
        f"edge-dtm {__version__}, Python {platform.python_version()}, llama-cpp-python "
        f"{build.version or 'of unknown version'}"
    )
    numbers = tuple(int(n) for n in re.findall(r"\d+", build.version)[:3])
    if numbers and numbers < LEAST_LLAMA_CPP_PYTHON:
        least = ".".join(map(str, LEAST_LLAMA_CPP_PYTHON))
        return [
            Finding(
                "warning",
                text,
                f"edge-dtm is tested with llama-cpp-python {least} and newer",
                rebuild_command(),
            )
        ]
    return [Finding("ok", text, f"on {platform.platform()}")]


def kernels(build: Build, cpu: Cpu) -> list[Finding]:
    """What llama.cpp was compiled with against what the CPU has."""
    command = rebuild_command(build.version)
    if not build.features:
        return [
            Finding(
                "warning",
                "llama.cpp does not say what it was compiled with",
                "so a build that is slow or wrong for this CPU cannot be told from a good one",
                command,
            )
        ]
    try:
        require_runnable(build, cpu)
    except EdgeDtmError as error:
        text = str(error).partition(": rebuild it here")[0]
        why = "its first decode would die of an illegal instruction: rebuild it here"
        return [Finding("error", text, why, command)]
    findings = []
    if unused := unused_by_build(build, cpu):
        findings.append(
            Finding(
                "warning",
                f"llama.cpp does not use {', '.join(unused)}, which this CPU ({cpu.name}) has",
                "it was compiled for an older CPU, as ready-made wheels are; compiled here it "
                "decodes and reads prompts faster",
                command,
            )
        )
    if not build.repacks:
        findings.append(
            Finding(
                "warning",
                "llama.cpp was compiled without REPACK",
                "weights keep their layout in the file, for which there are slower kernels",
                rebuild_command(build.version, "-DGGML_CPU_REPACK=ON"),
            )
        )
    if not findings:
        used = ", ".join(sorted(build.features & cpu.known)) or "no known feature"
        findings.append(
            Finding("ok", f"llama.cpp fits this CPU ({cpu.name})", f"compiled with {used}")
        )
    return findings


def types(matrices: Sequence[TensorInfo], build: Build, cpu: Cpu) -> list[Finding]:
    """Which quantized types of a model have repacked kernels here, by bytes."""
    from edge_dtm.formats.ggml_types import ALLOWED_TYPES, facts

    quantized = [m for m in matrices if facts(m.type).quantized]
    total = sum(m.size_bytes for m in matrices)
    here = repacked_types(build.features)
    possible = repacked_types(cpu.features | {"REPACK"}) if cpu.known else here

    def without(table: dict[str, int]) -> dict[str, int]:
        """Bytes by type of what is not repacked."""
        out: dict[str, int] = {}
        for m in quantized:
            if m.type not in table or m.shape[1] % table[m.type]:
                out[m.type] = out.get(m.type, 0) + m.size_bytes
        return out

    never, now = without(possible), without(here)
    slow = {name: size - never.get(name, 0) for name, size in now.items()}
    slow = {name: size for name, size in slow.items() if size > 0}
    findings: list[Finding] = []
    if slow:
        findings.append(
            Finding(
                "warning",
                f"this build repacks no {_shares(slow, total)}",
                "this CPU has faster kernels for these types, which the build leaves out",
                rebuild_command(build.version),
            )
        )
    if never:
        known = [name for name in possible if name in ALLOWED_TYPES]
        findings.append(
            Finding(
                "note",
                f"llama.cpp has no repacked kernel on this CPU for {_shares(never, total)}",
                "these matrices run with the plain kernels: right, but slower, above all in prompts"
                + (f"; {', '.join(known)} have one where the rows divide by 8" if known else ""),
                f"edge-dtm compress MODEL_DIR --types F16,{','.join(known)} -o bundle"
                if known
                else "",
            )
        )
    if not findings and quantized:
        names = ", ".join(sorted({m.type for m in quantized}))
        findings.append(
            Finding(
                "ok", f"the model's types run with repacked kernels ({names})", "the faster ones"
            )
        )
    return findings


def fits(needed: memory.Need, there: machine.Room) -> list[Finding]:
    """File, KV cache and buffers against what this process may still take."""
    total = needed.total_bytes
    text = (
        f"the model needs about {_mb(total)} (file {_mb(needed.file_bytes)}, KV cache "
        f"{_mb(needed.kv_bytes)}, buffers {_mb(needed.buffer_bytes)}), {there.limit} leaves "
        f"{_mb(there.free_bytes)}"
    )
    if total <= TIGHT_SHARE * there.free_bytes:
        return [Finding("ok", "the model fits into memory", text)]
    if "ulimit" in there.limit:
        command = "ulimit -v unlimited"
    elif "control group" in there.limit:
        command = "cat /proc/self/cgroup"
    else:
        command = "ps -eo rss,comm --sort=-rss | head"
    if total <= there.free_bytes:
        return [Finding("warning", "the model barely fits into memory", text, command)]
    why = (
        f"{text}: stop other programs, raise the limit (docker run --memory, systemd's MemoryMax) "
        "or compress with a smaller --max-bytes"
    )
    return [Finding("error", "the model does not fit into memory", why, command)]


def swap(meminfo: str) -> list[Finding]:
    """Whether memory was short already. meminfo: the text of /proc/meminfo."""
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.M)}
    used = 1024 * (kib.get("SwapTotal", 0) - kib.get("SwapFree", 0))
    if used <= SWAPPED_SHARE * 1024 * kib.get("MemTotal", 0) or not used:
        return []
    return [
        Finding(
            "warning",
            f"{_mb(used)} are swapped out",
            "memory was short, and decoding is as slow as the disk where weights do not stay in "
            "memory: stop what fills it, then empty the swap",
            "sudo swapoff -a && sudo swapon -a",
        )
    ]


def cores(root: Path, threads: int) -> list[Finding]:
    """Whether as many threads as usable CPUs, which is the default, are a good number here."""
    usable = usable_cpus()
    quota = cpu_quota(root)
    advice = "edge-dtm verify BUNDLE --threads {}"
    findings = []
    if quota is not None and quota < threads:
        count = max(int(quota), 1)
        findings.append(
            Finding(
                "warning",
                f"the control group allows {quota:.3g} of {_cpus(threads)}",
                "more threads than that wait for each other at every matrix",
                advice.format(count),
            )
        )
    capacity = cpu_capacities(root, usable)
    fast = sum(c >= 0.8 * max(capacity) for c in capacity) if capacity else 0
    physical = physical_cores(root, usable)
    if capacity and fast < len(capacity):
        findings.append(
            Finding(
                "note",
                f"{fast} of {_cpus(len(capacity))} are fast (big.LITTLE)",
                "each matrix waits for the slowest thread, so that the fast ones alone may be "
                "faster: compare with --threads",
                advice.format(fast),
            )
        )
    elif physical and physical < threads:
        findings.append(
            Finding(
                "note",
                f"{threads} CPUs are {physical} cores with several threads each",
                "decoding waits for memory, which a second thread on a core hardly speeds up",
                advice.format(physical),
            )
        )
    if not findings:
        findings.append(
            Finding("ok", f"decoding by default uses {_cpus(threads)}", "as many threads as CPUs")
        )
    return findings


def governor(root: Path) -> list[Finding]:
    """The policy that sets the CPU's frequency."""
    slow = set()
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"):
        name = read_text(folder / "scaling_governor").strip()
        driver = read_text(folder / "scaling_driver").strip()
        if name in ("powersave", "conservative") and driver not in _SELF_GOVERNED:
            slow.add(name)
    return [
        Finding(
            "warning",
            f"the CPU's frequency governor is {name}",
            "the frequency stays low or rises late, so that speeds are those of a slower board",
            _GOVERNOR_COMMAND,
        )
        for name in sorted(slow)
    ]


def throttling(text: str) -> list[Finding]:
    """What a Raspberry Pi's firmware says: `throttled=0x50005`; nothing where it is silent."""
    try:
        now, since = throttled(text)
    except ValueError:
        return []
    mend = "take the board's own power supply and cable, and a cooler; it shows 0x0 when mended"
    if now:
        return [Finding("warning", "; ".join(now), mend, "vcgencmd get_throttled")]
    if since:
        what = f"since the start: {'; '.join(since)}"
        return [Finding("note", what, f"{mend} and started anew", "vcgencmd get_throttled")]
    return [Finding("ok", "neither throttled nor short of power", "since the start")]


def disk(packed_bytes: int, free_bytes: int, place: Path, file_system: str) -> list[Finding]:
    """Whether a packed bundle can be unpacked into the temporary folder, place."""
    command = "TMPDIR=/var/tmp edge-dtm verify BUNDLE"
    if free_bytes < packed_bytes:
        why = f"{_mb(free_bytes)} are free, unpacked it is larger than {_mb(packed_bytes)}"
        return [Finding("error", f"{place} has no room to unpack the bundle", why, command)]
    if file_system == "tmpfs":
        why = "what is unpacked there takes memory from the model"
        return [Finding("warning", f"{place} is in memory (tmpfs)", why, command)]
    return []


def _cpus(count: int) -> str:
    return "1 CPU" if count == 1 else f"{count} CPUs"


def _shares(sizes: dict[str, int], total: int) -> str:
    """`Q5_0 (12.1 MB, 11 %), IQ3_S (...)`, largest first."""
    return ", ".join(
        f"{name} ({_mb(size)}, {size / max(total, 1):.0%})".replace("%", " %")
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
    )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
