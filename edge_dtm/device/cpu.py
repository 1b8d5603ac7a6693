"""What this CPU can do against what llama.cpp was compiled for, found out before it crashes.

llama.cpp fixes its instruction sets when it is compiled. A build for a newer CPU loads and then
dies of SIGILL in its first decode; a build for an older one runs, several times slower. Features
have the names of `llama_print_system_info` (ggml/src/ggml-cpu/ggml-cpu.cpp of llama.cpp).

    python -m edge_dtm.device.cpu info
    python -m edge_dtm.device.cpu decode '{"threads": 4}' [MODEL.gguf]

are the child processes that this module starts, since a wrong build may crash when it is imported.
"""

from __future__ import annotations

import ctypes
import json
import platform
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.scratch import Scratch

if TYPE_CHECKING:
    from edge_dtm.formats.record import RunSettings

CHILD_TIMEOUT_S = 900.0  # a Pi needs seconds; an emulated one minutes

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
# Feature: (auxiliary vector entry, bits), of Linux' arch/arm64/include/uapi/asm/hwcap.h. Fused
# multiply-add is part of Armv8's Advanced SIMD. Both kinds of FP16 are asked for, as llama.cpp does.
AT_HWCAP, AT_HWCAP2 = 16, 26
ARM_BITS: dict[str, tuple[int, tuple[int, ...]]] = {
    "NEON": (AT_HWCAP, (1,)),
    "ARM_FMA": (AT_HWCAP, (1,)),
    "FP16_VA": (AT_HWCAP, (9, 10)),
    "DOTPROD": (AT_HWCAP, (20,)),
    "SVE": (AT_HWCAP, (22,)),
    "SVE2": (AT_HWCAP2, (1,)),
    "MATMUL_INT8": (AT_HWCAP2, (13,)),
    "BF16": (AT_HWCAP2, (14,)),
    "SME": (AT_HWCAP2, (23,)),
    "SME2": (AT_HWCAP2, (37,)),
}
# Feature: what `sysctl -a` calls it on a Mac; the words of machdep.cpu.*features on an Intel one.
MAC_ARM_KEYS = {
    "NEON": "hw.optional.AdvSIMD",
    "ARM_FMA": "hw.optional.AdvSIMD",
    "FP16_VA": "hw.optional.arm.FEAT_FP16",
    "DOTPROD": "hw.optional.arm.FEAT_DotProd",
    "MATMUL_INT8": "hw.optional.arm.FEAT_I8MM",
    "BF16": "hw.optional.arm.FEAT_BF16",
    "SVE": "hw.optional.arm.FEAT_SVE",
    "SME": "hw.optional.arm.FEAT_SME",
    "SME2": "hw.optional.arm.FEAT_SME2",
}
MAC_INTEL_WORDS = {
    "SSE3": ("SSE3",),
    "SSSE3": ("SSSE3",),
    "AVX": ("AVX1.0",),
    "AVX2": ("AVX2",),
    "F16C": ("F16C",),
    "FMA": ("FMA",),
    "BMI2": ("BMI2",),
    "AVX512": ("AVX512F", "AVX512CD", "AVX512VL", "AVX512DQ", "AVX512BW"),
    "AVX512_VBMI": ("AVX512VBMI",),
    "AVX512_VNNI": ("AVX512VNNI",),
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

# What a program does to itself, and what that says about llama.cpp.
_CRASHES = {
    "SIGILL": "it was built for another CPU",
    "SIGSEGV": "the build is broken, or was made for another machine",
    "SIGBUS": "a file or library cannot be read whole, or the build is broken",
    "SIGFPE": "the build is broken",
    "SIGTRAP": "the build is broken",
    "SIGABRT": "it gave up",
}


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

    @property
    def repacks(self) -> bool:
        """Whether weights may be stored in another layout, for which there are faster kernels."""
        return "REPACK" in self.features


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


def x86_features(flags: Collection[str]) -> frozenset[str]:
    """From the flags of /proc/cpuinfo."""
    return frozenset(name for name, needed in X86_FLAGS.items() if set(needed) <= set(flags))


def arm_features(hwcap: int, hwcap2: int) -> frozenset[str]:
    """From getauxval(AT_HWCAP) and getauxval(AT_HWCAP2) of 64-bit Linux."""
    words = {AT_HWCAP: hwcap, AT_HWCAP2: hwcap2}
    return frozenset(
        name
        for name, (entry, bits) in ARM_BITS.items()
        if all(words[entry] >> bit & 1 for bit in bits)
    )


def mac_features(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """(features, known) from the output of `sysctl -a` on a Mac; both empty when it says neither."""
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    keys = ("machdep.cpu.features", "machdep.cpu.leaf7_features")
    words = {word for key in keys for word in values.get(key, "").split()}
    if words:
        found = {name for name, needed in MAC_INTEL_WORDS.items() if set(needed) <= words}
        return frozenset(found), frozenset(MAC_INTEL_WORDS)
    if "hw.optional.AdvSIMD" in values or "hw.optional.arm.FEAT_DotProd" in values:
        # A key that this release of macOS does not know yet says nothing about the CPU.
        known = {name for name, key in MAC_ARM_KEYS.items() if key in values}
        found = {name for name in known if values[MAC_ARM_KEYS[name]].strip() == "1"}
        return frozenset(found), frozenset(known)
    return frozenset(), frozenset()


def cpu_name(cpuinfo: str) -> str:
    """The CPU's name from the text of /proc/cpuinfo, all kinds of cores, empty when it has none."""
    # On ARM a `model name` says no more than "ARMv8 Processor rev 3 (v8l)".
    found = [
        _ARM_PARTS[int(part, 16)]
        for implementer, part in re.findall(
            r"^CPU implementer\s*:\s*(\w+)$.*?^CPU part\s*:\s*(\w+)$", cpuinfo, re.M | re.S
        )
        if implementer == "0x41" and int(part, 16) in _ARM_PARTS
    ] or re.findall(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    return " and ".join(dict.fromkeys(" ".join(name.split()) for name in found))


def read_cpu(root: Path = Path("/")) -> Cpu:
    """This machine's. root: where proc is."""
    machine = platform.machine()
    cpuinfo = read_text(root / "proc/cpuinfo")
    features, known = frozenset[str](), frozenset[str]()
    if sys.platform == "darwin":
        text = program_output(["sysctl", "-a"])
        features, known = mac_features(text)
        brand = re.search(r"^machdep\.cpu\.brand_string: (.+)$", text, re.M)
        return Cpu(machine, brand[1].strip() if brand else machine, features, known)
    if machine == "aarch64" and struct.calcsize("P") == 8:
        words = _auxiliary(AT_HWCAP), _auxiliary(AT_HWCAP2)
        if words[0]:
            features, known = arm_features(*words), frozenset(ARM_BITS)
    elif found := re.search(r"^flags\s*:\s*(.+)$", cpuinfo, re.M):
        features, known = x86_features(found[1].split()), frozenset(X86_FLAGS)
    return Cpu(machine, cpu_name(cpuinfo) or machine, features, known)


def missing_on_cpu(build: Build, cpu: Cpu) -> list[str]:
    """Features that the build uses and the CPU lacks, sorted: a crash is near."""
    return sorted((build.features & cpu.known) - cpu.features)


def unused_by_build(build: Build, cpu: Cpu) -> list[str]:
    """FAST_FEATURES that the CPU has and the build does not use."""
    return [n for n in FAST_FEATURES if n in cpu.features - build.features]


def repacked_types(features: Collection[str]) -> dict[str, int]:
    """GGML types that a build with these features stores in another layout with faster kernels.

    Each with the number that a matrix's rows must divide by. Empty without REPACK. From
    ggml_repack_get_optimal_repack_type (ggml/src/ggml-cpu/repack.cpp); AMX has a layout of its own
    (qtype_has_amx_kernels, ggml/src/ggml-cpu/amx/common.h).
    """
    has = set(features)
    types: dict[str, int] = {}
    if "AMX_INT8" in has:
        amx = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
        types |= dict.fromkeys(amx, 32)  # two tiles of TILE_N rows
    if "REPACK" not in has:
        return types
    if "NEON" in has and has & {"DOTPROD", "MATMUL_INT8"}:
        types |= {"Q4_0": 4, "Q8_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8}
    if {"NEON", "DOTPROD"} <= has:
        types |= {"IQ4_NL": 4, "MXFP4": 4}
    if "AVX2" in has:
        types |= dict.fromkeys(("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"), 8)
    if "AVX512" in has:
        types |= {"Q2_K": 8}
    return types


def rebuild_command(version: str = "", *options: str) -> str:
    """A shell command that compiles llama-cpp-python for the machine it is run on.

    options: more of CMake's, such as -DGGML_CPU_REPACK=ON. Without --no-cache-dir pip would take a wheel it compiled before, with other flags.
    """
    package = f"llama-cpp-python=={version}" if version else "llama-cpp-python"
    return (
        f'CMAKE_ARGS="{" ".join(("-DGGML_NATIVE=ON", *options))}" pip install --force-reinstall '
        f"--no-cache-dir --no-deps --no-binary llama-cpp-python {package}"
    )


def require_runnable(build: Build | None = None, cpu: Cpu | None = None) -> None:
    """EdgeDtmError when llama.cpp was built with features that this CPU lacks.

    build: asked for in a child when None; cpu: this machine's when None.
    """
    build = build_in_child() if build is None else build
    cpu = read_cpu() if cpu is None else cpu
    if missing := missing_on_cpu(build, cpu):
        raise EdgeDtmError(
            f"llama.cpp was built with {_listed(missing)}, which this CPU ({cpu.name}) does not "
            f"have: rebuild it here: {rebuild_command(build.version)}"
        )


def build_in_child() -> Build:
    """What the installed llama.cpp says, asked in a child, which a wrong build may kill.

    EdgeDtmError when it cannot be imported or kills the child.
    """
    done = _run_child(["info"], CHILD_TIMEOUT_S)
    return _finished(done, _said(done.stdout))


def first_decode_in_child(
    settings: RunSettings, path: Path | None = None, timeout_s: float = CHILD_TIMEOUT_S
) -> Build:
    """Let a child decode for the first time, so that a build that crashes does not take us along.

    A prompt and single tokens, through the small model of `probe_model` as F16, Q8_0 and Q4_0,
    whose kernels are the ones that differ between builds, and through the GGUF at path if given.
    Returns what llama.cpp was built with. EdgeDtmError when features are missing on this CPU, and
    when the child dies of a signal, fails, or takes longer than timeout_s seconds.
    """
    words = ["decode", json.dumps(settings.to_json())]
    done = _run_child(words if path is None else [*words, str(path)], timeout_s)
    build = _said(done.stdout)
    if build is not None:
        # Before the death is looked at: it says why.
        require_runnable(build)
    return _finished(done, build)


def _run_child(words: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [sys.executable, "-m", "edge_dtm.device.cpu", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise EdgeDtmError(
            f"llama.cpp did not finish its first decode within {timeout_s:g} s: stop what keeps "
            f"the CPU busy, or rebuild it here: {rebuild_command()}"
        ) from None
    except OSError as error:
        raise EdgeDtmError(
            f"{sys.executable} could not be started for a first decode "
            f"({error.strerror or error}): activate the environment edge-dtm is installed in"
        ) from None


def _said(stdout: str) -> Build | None:
    """What the child said of its build before anything else, None when it did not come so far."""
    for answer in _json_lines(stdout):
        if "system_info" in answer:
            return parse_system_info(str(answer["system_info"]), str(answer.get("version", "")))
    return None


def _finished(done: subprocess.CompletedProcess[str], build: Build | None) -> Build:
    """The build of a child that did all it was asked. EdgeDtmError otherwise."""
    _require_alive(done.returncode, done.stderr, build)
    if build is None or not any(answer.get("done") for answer in _json_lines(done.stdout)):
        raise EdgeDtmError(
            "llama.cpp answered nothing in its first decode: rebuild it here: "
            + rebuild_command(build.version if build else "")
        )
    return build


def _require_alive(returncode: int, stderr: str, build: Build | None) -> None:
    """EdgeDtmError unless a child ended by itself and well."""
    if returncode == 0:
        return
    last = " ".join((stderr.strip().splitlines() or [""])[-1].split())
    if last.startswith("error: "):
        raise EdgeDtmError(last.removeprefix("error: "))
    when = "when it was loaded" if build is None else "in its first decode"
    rebuild = f"rebuild it here: {rebuild_command(build.version if build else '')}"
    # A shell between us and the child turns the signal into 128 and its number.
    number = -returncode if returncode < 0 else returncode - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        reason = last or f"exit status {returncode}"
        raise EdgeDtmError(f"llama.cpp failed {when} ({reason}): {rebuild}") from None
    if name not in _CRASHES:
        raise EdgeDtmError(
            f"llama.cpp was ended {when} by {name}, which comes from outside, or from the system "
            "when memory runs out: stop other programs and start again"
        )
    why = _CRASHES[name] + (f" ({last})" if last and name == "SIGABRT" else "")
    raise EdgeDtmError(
        f"llama.cpp died of {name} {when} on this machine ({read_cpu().name}): {why}; {rebuild}"
    )


def _json_lines(text: str) -> list[dict[str, Any]]:
    out = []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # what a library printed
        if isinstance(found, dict):
            out.append(found)
    return out


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def read_text(path: Path) -> str:
    """A file of proc or sys, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def program_output(words: Sequence[str]) -> str:
    """What a program of the system prints, empty when it is not there or fails."""
    try:
        return subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _auxiliary(entry: int) -> int:
    """getauxval of the C library, 0 where there is none."""
    try:
        function = ctypes.CDLL(None).getauxval
    except (AttributeError, OSError):
        return 0
    function.restype, function.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(function(entry))


def _child(words: Sequence[str]) -> None:
    """What the child does: say what llama.cpp is, then decode."""
    import resource

    # The crash is expected; nobody wants its core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from edge_dtm.formats.record import RunSettings
    from edge_dtm.llamacpp.gguf_header import check_gguf
    from edge_dtm.llamacpp.llama import runtime_info
    from edge_dtm.llamacpp.runner import LlamaRunner

    try:
        info = runtime_info()
    except ImportError as error:
        raise EdgeDtmError(
            f"llama-cpp-python cannot be imported ({error}): pip install llama-cpp-python"
        ) from None
    except (OSError, RuntimeError) as error:
        # How llama_cpp reports a shared library that is missing or for another machine.
        raise EdgeDtmError(
            f"llama-cpp-python cannot be loaded ({' '.join(str(error).split())}): rebuild it here: "
            + rebuild_command()
        ) from None
    said = {"system_info": info["system_info"], "version": info["llama_cpp_python"]}
    print(json.dumps(said), flush=True)
    if words[0] == "decode":
        # One sequence is fed, so that memory for more would be for nothing.
        settings = replace(RunSettings.from_json(json.loads(words[1])), parallel_sequences=1)

        def decode(path: Path) -> None:
            with LlamaRunner(path, settings, 32) as llama:
                llama.measure_speed(16, 2)

        with Scratch("edge-dtm", Path(tempfile.gettempdir())) as folder:
            for path in _small_models(folder):
                decode(path)
        for given in words[2:]:
            check_gguf(Path(given))
            decode(Path(given))
    print(json.dumps({"done": True}), flush=True)


def _small_models(folder: Path) -> list[Path]:
    """probe_model's GGUF as F16, Q8_0 and Q4_0."""
    from llama_cpp import llama_cpp as lib

    from edge_dtm.llamacpp import probe_model

    source = folder / "F16.gguf"
    probe_model.write(source)
    paths = [source]
    for name in ("Q8_0", "Q4_0"):
        params = lib.llama_model_quantize_default_params()
        params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{name}")
        params.nthread = 1
        target = folder / f"{name}.gguf"
        code = lib.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(params)
        )
        if code:
            raise EdgeDtmError(f"llama.cpp cannot quantize a small model to {name} (code {code})")
        paths.append(target)
    return paths


if __name__ == "__main__":
    try:
        _child(sys.argv[1:])
    except EdgeDtmError as failure:
        sys.exit(f"error: {failure}")
