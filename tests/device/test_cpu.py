"""What the CPU has against what llama.cpp was built with, by made-up and real machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures.boards import NATIVE, PI4, PI5, UNKNOWN, put
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.device import cpu as module
from edge_dtm.device.cpu import (
    ARM_FLAGS,
    X86_FLAGS,
    Build,
    Cpu,
    cpu_name,
    missing_on_cpu,
    parse_system_info,
    read_cpu,
    rebuild_command,
    repacked_types,
    unused_by_build,
)

# As printed by llama.cpp on this kind of machine.
X86_INFO = (
    "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | "
    "LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | "
)
X86_FEATURES = frozenset({"SSE3", "SSSE3", "AVX", "AVX2", "F16C", "FMA", "BMI2"})
# The flags of these CPUs that QEMU 10 shows a program.
A72 = "fp asimd aes pmull sha1 sha2 crc32 cpuid"
A76 = f"{A72} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
V1 = f"{A76} jscvt fcma sha3 sm3 sm4 sha512 sve asimdfhm dit svei8mm svebf16 i8mm bf16 rng"
X86 = "fpu sse2 pni ssse3 avx avx2 fma f16c bmi2 avx512f avx512cd avx512bw avx512dq"


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("CPU : AVX = 1 | AVX512 = 0 | REPACK = 1 | ", {"AVX", "REPACK"}),
        ("CUDA : ARCHS = 890 | F16 = 1 | CPU : NEON = 1 | SVE_CNT = 32 | ", {"NEON", "SVE_CNT"}),
        ("CPU : AVX = 1 | Metal : EMBED_LIBRARY = 1 | ", {"AVX"}),
        *((text, set()) for text in ("", "CPU : ", "nothing", " | | ", "CPU : X = | ")),
    ],
)
def test_system_info(text: str, features: set[str]) -> None:
    assert parse_system_info(text, "0.3.36") == Build(frozenset(features), "0.3.36")


@pytest.mark.parametrize(
    ("machine", "line", "features"),
    [
        ("aarch64", f"Features\t: {A72}", PI4.features),
        ("aarch64", f"Features\t: {A76}", PI5.features),
        ("aarch64", f"Features\t: {V1}", PI5.features | {"SVE", "MATMUL_INT8", "BF16"}),
        ("aarch64", f"Features\t: {A72} fphp", PI4.features),  # half of it is none
        ("x86_64", f"flags\t\t: {X86}", X86_FEATURES),
        ("x86_64", f"flags\t\t: {X86} avx512vl", X86_FEATURES | {"AVX512"}),
    ],
)
def test_features(
    machine: str, line: str, features: frozenset[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    put(tmp_path, "proc/cpuinfo", f"processor\t: 0\n{line}\n")
    cpu = read_cpu(tmp_path)
    assert cpu.features == features
    assert cpu.known == frozenset(ARM_FLAGS if machine == "aarch64" else X86_FLAGS)


def test_names_of_cpus() -> None:
    arm = "processor\t: 0\nmodel name\t: ARMv8 Processor rev 3 (v8l)\nCPU implementer\t: 0x41\n"
    arm += "CPU variant\t: 0x0\nCPU part\t: {}\n\n"
    assert cpu_name(arm.format("0xd08") * 4) == "Cortex-A72"
    assert (
        cpu_name(arm.format("0xd05") * 4 + arm.format("0xd0b") * 4) == "Cortex-A55 and Cortex-A76"
    )
    assert cpu_name(arm.format("0xfff")) == "ARMv8 Processor rev 3 (v8l)"
    assert cpu_name("model name\t: Intel(R)  Core(TM) i7\n" * 2) == "Intel(R) Core(TM) i7"
    assert cpu_name("") == ""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_this_cpu_as_the_kernel_has_it() -> None:
    cpu = read_cpu()
    flags = Path("/proc/cpuinfo").read_text().split()
    name, flag = ("DOTPROD", "asimddp") if cpu.machine == "aarch64" else ("AVX2", "avx2")
    assert cpu.name and cpu.known and (name in cpu.features) == (flag in flags)


def test_a_machine_that_tells_nothing_lacks_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "riscv64")
    cpu = read_cpu(tmp_path)
    assert cpu == UNKNOWN
    assert missing_on_cpu(parse_system_info(X86_INFO), cpu) == []


@given(
    st.frozensets(st.sampled_from([*X86_FLAGS, "REPACK", "OPENMP"])),
    st.frozensets(st.sampled_from(list(X86_FLAGS))),
)
def test_missing_and_unused(build: frozenset[str], features: frozenset[str]) -> None:
    cpu = Cpu("x86_64", "some CPU", features, frozenset(X86_FLAGS))
    missing, unused = missing_on_cpu(Build(build), cpu), unused_by_build(Build(build), cpu)
    assert all(n in build and n not in features and n in X86_FLAGS for n in missing)
    assert {n for n in build if n in X86_FLAGS} - set(missing) <= features
    assert not set(unused) & build and set(unused) <= features


def test_the_command_is_one_that_a_shell_and_pip_take() -> None:
    command = rebuild_command("0.3.36", "-DGGML_CPU_REPACK=ON")
    shown = command.replace("pip install", "printenv CMAKE_ARGS #")
    printed = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    assert printed.stdout == "-DGGML_NATIVE=ON -DGGML_CPU_REPACK=ON\n"
    assert command.endswith(" llama-cpp-python==0.3.36")
    assert rebuild_command().endswith(" llama-cpp-python")


def test_repacked_types_as_in_the_packaged_profiles() -> None:
    from edge_dtm.formats.profile import load_profile

    laptop = parse_system_info(X86_INFO)
    for name, build in (("raspberrypi", NATIVE), ("laptop-avx2", laptop)):
        table = repacked_types(build.features)
        # Profiles leave out MXFP4, which edge-dtm does not make.
        assert set(table) - {"MXFP4"} == set(load_profile(name).fast_types)
    assert repacked_types({"NEON", "ARM_FMA", "REPACK"}) == {}
    assert repacked_types({"NEON", "DOTPROD"}) == {}
    assert repacked_types({"AVX2", "AVX512", "REPACK"})["Q2_K"] == 8
    assert repacked_types({"NEON", "MATMUL_INT8", "REPACK"}).keys() == {
        "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"
    }  # fmt: skip
    assert "Q4_1" in repacked_types({"AMX_INT8"})
