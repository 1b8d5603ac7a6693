"""What this CPU can do against what llama.cpp was compiled for, found out before it crashes.

llama.cpp fixes its instruction sets when it is compiled. A build for a newer CPU loads and then
dies of SIGILL in its first decode; a build for an older one runs, several times slower. Features
have the names of `llama_print_system_info` (ggml/src/ggml-cpu/ggml-cpu.cpp of llama.cpp).
"""

from __future__ import annotations

import platform
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from edge_dtm.core.machine import read_text
from edge_dtm.formats.ggml_types import TYPES

# Feature of llama.cpp's build: the flags of /proc/cpuinfo it needs. AVX512 is compiled with all
# five (GGML_AVX512 in ggml/src/ggml-cpu/CMakeLists.txt).
X86_FLAGS: dict[str, tuple[str, ...]] = {
    "SSE3": ("pni",),
    "SSSE3": ("ssse3",),
    "AVX": ("avx",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX2": ("avx2",),
    "F16C": ("f16c",),
    "FMA": ("fma",),
    "BMI2": ("bmi2",),
    "AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "AVX512_VBMI": ("avx512vbmi",),
    "AVX512_VNNI": ("avx512_vnni",),
    "AVX512_BF16": ("avx512_bf16",),
    "AMX_INT8": ("amx_tile", "amx_int8"),
}
# Fused multiply-add is part of Armv8's Advanced SIMD. Both kinds of FP16 are asked for, as llama.cpp
# does.
ARM_FLAGS: dict[str, tuple[str, ...]] = {
    "NEON": ("asimd",),
    "ARM_FMA": ("asimd",),
    "FP16_VA": ("fphp", "asimdhp"),
    "DOTPROD": ("asimddp",),
    "SVE": ("sve",),
    "SVE2": ("sve2",),
    "MATMUL_INT8": ("i8mm",),
    "BF16": ("bf16",),
    "SME": ("sme",),
    "SME2": ("sme2",),
}
# What makes decoding or prompts clearly faster in llama.cpp's kernels; a build without one of these
# that the CPU has is worth another build.
FAST_FEATURES = (
    "AVX", "AVX2", "F16C", "FMA", "AVX_VNNI", "AVX512", "AVX512_VNNI",
    "NEON", "FP16_VA", "DOTPROD", "MATMUL_INT8",
)  # fmt: skip

# Main ID Register part numbers of Arm Ltd. (implementer 0x41), which /proc/cpuinfo has instead of
# a name; the list of util-linux' lscpu.
_ARM_PARTS = {
    0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57",
    0xD08: "Cortex-A72", 0xD09: "Cortex-A73", 0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710",
    0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4B: "Cortex-A78C", 0xD4D: "Cortex-A715",
    0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520", 0xD81: "Cortex-A720",
    0xD82: "Cortex-X4", 0xD84: "Neoverse-V3", 0xD85: "Cortex-X925", 0xD87: "Cortex-A725",
}  # fmt: skip


@dataclass(frozen=True)
class Cpu:
    """machine: as `uname -m` says; name: for people. features: of known, those the CPU has.

    known is empty where nothing can be told, so that nothing is then called missing.
    """

    machine: str
    name: str
    features: frozenset[str]
    known: frozenset[str]


@dataclass(frozen=True)
class Build:
    """What llama.cpp's CPU backend was compiled with; features is empty when it says nothing.

    version: of llama-cpp-python, empty when unknown.
    """

    features: frozenset[str]
    version: str = ""


def parse_system_info(text: str, version: str = "") -> Build:
    """The CPU's part of llama_print_system_info's "CPU : NEON = 1 | DOTPROD = 1 | "; other
    backends have parts of their own in front or behind."""
    features, backend = set(), ""
    for item in text.split("|"):
        # The name of a backend stands in front of its first feature.
        *head, feature = item.split(":")
        backend = head[-1].strip() if head else backend
        name, _, value = feature.partition("=")
        if backend == "CPU" and value.strip() not in ("", "0"):
            features.add(name.strip())
    return Build(frozenset(features), version)


def cpu_name(cpuinfo: str) -> str:
    """The CPU's name from the text of /proc/cpuinfo, all kinds of cores, empty when it has none."""
    # On ARM a `model name` says no more than "ARMv8 Processor rev 3 (v8l)".
    names = [
        _ARM_PARTS[int(part, 16)]
        for implementer, part in re.findall(
            r"^CPU implementer\s*:\s*(\w+)$.*?^CPU part\s*:\s*(\w+)$", cpuinfo, re.M | re.S
        )
        if implementer == "0x41" and int(part, 16) in _ARM_PARTS
    ] or re.findall(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    return " and ".join(dict.fromkeys(" ".join(name.split()) for name in names))


def read_cpu(root: Path = Path("/")) -> Cpu:
    """This machine's. root: where proc is."""
    machine = platform.machine()
    cpuinfo = read_text(root / "proc/cpuinfo")
    arm = machine == "aarch64"
    line = re.search(rf"^{'Features' if arm else 'flags'}\s*:\s*(.+)$", cpuinfo, re.M)
    flags = set(line[1].split()) if line else set()
    table = (ARM_FLAGS if arm else X86_FLAGS) if line else {}
    features = frozenset(name for name, needed in table.items() if flags.issuperset(needed))
    return Cpu(machine, cpu_name(cpuinfo) or machine, features, frozenset(table))


def missing_on_cpu(build: Build, cpu: Cpu) -> list[str]:
    """Features that the build uses and the CPU lacks, sorted: a crash is near."""
    return sorted((build.features & cpu.known) - cpu.features)


def unused_by_build(build: Build, cpu: Cpu) -> list[str]:
    """FAST_FEATURES that the CPU has and the build does not use."""
    return [n for n in FAST_FEATURES if n in cpu.features - build.features]


def repacked_types(features: Collection[str]) -> dict[str, int]:
    """GGML types that a build with these features stores in another layout with faster kernels.

    Each with the number that a matrix's rows must divide by. Without REPACK only AMX,
    which has a layout of its own.
    """
    used = set(features)
    if "REPACK" not in used:
        used &= {"AMX_INT8"}
    if "NEON" not in used:
        used -= {"DOTPROD", "MATMUL_INT8"}
    return {t.name: rows for t in TYPES.values() for feature, rows in t.repacked if feature in used}


def rebuild_command(version: str = "", *options: str) -> str:
    """A shell command that compiles llama-cpp-python for the machine it is run on.

    options: more of CMake's, such as -DGGML_CPU_REPACK=ON. Without --no-cache-dir pip would take a
    wheel that it compiled before, with other flags.
    """
    package = f"llama-cpp-python=={version}" if version else "llama-cpp-python"
    return (
        f'CMAKE_ARGS="{" ".join(("-DGGML_NATIVE=ON", *options))}" pip install --force-reinstall '
        f"--no-cache-dir --no-deps --no-binary llama-cpp-python {package}"
    )
