"""What the CPU has against what llama.cpp was built with, by made-up and real machines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures.boards import NATIVE, PI4, PI5, UNKNOWN
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.device import cpu as module
from edge_dtm.device.cpu import (
    ARM_BITS,
    X86_FLAGS,
    Build,
    Cpu,
    arm_features,
    cpu_name,
    missing_on_cpu,
    parse_system_info,
    read_cpu,
    rebuild_command,
    repacked_types,
    unused_by_build,
    x86_features,
)

# As printed by llama.cpp on this kind of machine.
X86_INFO = (
    "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | "
    "LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | "
)
# AT_HWCAP and AT_HWCAP2 as QEMU 10 gives them to a program on these CPUs.
HWCAPS = {
    "cortex-a72": (0x8FB, 0),
    "cortex-a76": (0x119FFB, 0),
    "neoverse-v1": (0xCFFFFFFB, 0x17201),
}


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


def test_arm_features_of_boards() -> None:
    assert arm_features(*HWCAPS["cortex-a72"]) == PI4.features
    assert arm_features(*HWCAPS["cortex-a76"]) == PI5.features
    assert arm_features(*HWCAPS["neoverse-v1"]) == PI5.features | {"SVE", "MATMUL_INT8", "BF16"}
    assert "FP16_VA" not in arm_features(1 << 10 | 1 << 1, 0)  # half of it is none


def test_x86_flags() -> None:
    flags = "fpu sse2 pni ssse3 avx avx2 fma f16c bmi2 avx512f avx512cd avx512bw avx512dq"
    features = x86_features(flags.split())
    assert {"AVX2", "FMA", "F16C"} <= features and "AVX512" not in features
    assert "AVX512" in x86_features([*flags.split(), "avx512vl"])


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


def test_a_32_bit_python_knows_no_arm_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    # There the bits mean something else.
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(module.struct, "calcsize", lambda _: 4)
    monkeypatch.setattr(module, "_auxiliary", lambda _: -1)
    monkeypatch.setattr(module, "read_text", lambda _: "")
    assert read_cpu().known == frozenset()
    monkeypatch.setattr(module.struct, "calcsize", lambda _: 8)
    assert read_cpu().features == frozenset(ARM_BITS)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc and musl")
def test_getauxval_gives_the_page_size() -> None:
    assert module._auxiliary(6) == os.sysconf("SC_PAGE_SIZE")  # AT_PAGESZ


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
