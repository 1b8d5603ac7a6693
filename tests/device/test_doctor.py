"""What is wrong with a machine: each check on a machine that is made up, and the command here."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_dtm.cli import main
from edge_dtm.core import machine
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import Room
from edge_dtm.device import checks
from edge_dtm.device import doctor as module
from edge_dtm.device.checks import (
    Finding,
    cores,
    disk,
    fits,
    governor,
    kernels,
    page_size,
    swap,
    throttling,
    types,
    user_space,
    versions,
)
from edge_dtm.device.cpu import ARM_BITS, X86_FLAGS, Build, Cpu
from edge_dtm.device.doctor import errors, examine, matrices_of, to_json
from edge_dtm.device.linux import cpu_capacities, cpu_quota, physical_cores
from edge_dtm.formats.archive import pack
from edge_dtm.llamacpp.gguf_header import TensorInfo
from edge_dtm.llamacpp.memory import Need

ROOT = Path(__file__).resolve().parents[2]
PI5_FEATURES = frozenset({"NEON", "ARM_FMA", "FP16_VA", "DOTPROD"})
PI5 = Cpu("aarch64", "Cortex-A76", PI5_FEATURES, frozenset(ARM_BITS))
PI4 = Cpu("aarch64", "Cortex-A72", frozenset({"NEON", "ARM_FMA"}), frozenset(ARM_BITS))
NATIVE = Build(PI5_FEATURES | {"REPACK", "OPENMP"}, "0.3.36")
GENERIC = Build(frozenset({"NEON", "ARM_FMA", "REPACK"}), "0.3.36")


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where edge-dtm is not installed


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def matrix(type_name: str, rows: int, size_bytes: int) -> TensorInfo:
    return TensorInfo("m", (32, rows), type_name, 0, size_bytes)


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# --- llama.cpp against the CPU -----------------------------------------------------------------


def test_a_native_build_is_fine() -> None:
    finding = only(kernels(NATIVE, PI5))
    assert finding.level == "ok" and "Cortex-A76" in finding.what and not finding.command


def test_a_ready_made_wheel_is_slow_on_a_pi_5() -> None:
    finding = only(kernels(GENERIC, PI5))
    assert finding.level == "warning"
    assert "FP16_VA, DOTPROD" in finding.what and "Cortex-A76" in finding.what
    assert "--no-binary llama-cpp-python llama-cpp-python==0.3.36" in finding.command
    # On a Pi 4 there is nothing to gain.
    assert levels(kernels(GENERIC, PI4)) == ["ok"]


def test_a_build_for_another_board_is_an_error() -> None:
    finding = only(kernels(NATIVE, PI4))
    assert finding.level == "error"
    assert "DOTPROD, FP16_VA" in finding.what and "Cortex-A72" in finding.what
    assert finding.command.startswith("CMAKE_ARGS=") and "CMAKE_ARGS" not in finding.what


def test_a_build_without_repacking() -> None:
    finding = only(kernels(Build(PI5_FEATURES, "0.3.36"), PI5))
    assert finding.level == "warning" and "REPACK" in finding.what
    assert "-DGGML_CPU_REPACK=ON" in shlex.split(finding.command)[0]


def test_a_build_that_says_nothing() -> None:
    assert levels(kernels(Build(frozenset()), PI5)) == ["warning"]


@pytest.mark.parametrize(
    ("version", "level"),
    [("0.3.36", "ok"), ("0.3.30", "ok"), ("1.0.0", "ok"), ("0.3.9", "warning"), ("", "ok")],
)
def test_versions(version: str, level: str) -> None:
    finding = only(versions(Build(frozenset(), version)))
    assert finding.level == level and sys.version.split()[0] in finding.what


def test_the_least_version_is_the_one_that_is_installed_at_least() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f"llama-cpp-python>={'.'.join(map(str, checks.LEAST_LLAMA_CPP_PYTHON))}" in text


# --- types ---------------------------------------------------------------------------------------


def test_types_that_this_build_or_no_build_repacks() -> None:
    model = [
        matrix("Q4_K", 2048, 600),
        matrix("Q5_0", 2048, 300),
        matrix("Q6_K", 49, 50),  # rows that do not divide by 8
        matrix("F16", 512, 50),
    ]
    slow, never = types(model, GENERIC, PI5)
    assert slow.level == "warning" and "Q4_K (0.0 MB, 60 %)" in slow.what
    assert "Q5_0" not in slow.what and "Q6_K" not in slow.what
    assert never.level == "note" and "Q5_0 (0.0 MB, 30 %), Q6_K (0.0 MB, 5 %)" in never.what
    assert "F16" not in never.what
    assert only(types(model, NATIVE, PI5)) == never


def test_the_types_it_proposes_are_ones_that_compress_takes() -> None:
    from edge_dtm.formats.ggml_types import ALLOWED_TYPES

    command = only(types([matrix("Q5_0", 8, 1)], NATIVE, PI5)).command
    words = shlex.split(command)
    proposed = words[words.index("--types") + 1].split(",")
    assert set(proposed) == {"F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL"}
    assert set(proposed) <= set(ALLOWED_TYPES)


def test_a_model_of_repacked_types_is_fine() -> None:
    model = [matrix("Q8_0", 64, 10), matrix("Q4_0", 4, 10), matrix("F32", 5, 10)]
    assert levels(types(model, NATIVE, PI5)) == ["ok"]
    # Nothing is repacked on a Pi 4, which is its limit and not the build's.
    assert levels(types(model, GENERIC, PI4)) == ["note"]
    assert types([matrix("F16", 4, 10)], NATIVE, PI5) == []


def test_x86_repacks_fewer() -> None:
    features = frozenset({"AVX", "AVX2", "FMA", "F16C"})
    x86 = Cpu("x86_64", "laptop", features, frozenset(X86_FLAGS))
    finding = only(
        types([matrix("Q8_0", 8, 1), matrix("Q4_K", 8, 1)], Build(features | {"REPACK"}), x86)
    )
    assert "Q8_0" in finding.what and "Q4_K" not in finding.what


def test_matrices_are_those_that_are_read_whole(tiny_gguf: Path, tmp_path: Path) -> None:
    sizes = {
        t.name: int(t.n_bytes) for t in gguf.GGUFReader(tiny_gguf).tensors if len(t.shape) == 2
    }
    found = matrices_of(tiny_gguf)
    assert sum(m.size_bytes for m in found) == sum(sizes.values()) - sizes["token_embd.weight"]
    assert {m.type for m in found} == {"F32"}

    writer = gguf.GGUFWriter(tmp_path / "tied.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((7, 32), dtype=np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tied,) = matrices_of(tmp_path / "tied.gguf")
    assert (tied.type, tied.shape, tied.size_bytes) == ("F16", (32, 7), 448)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "limit", "level", "command"),
    [
        (200, "free memory", "ok", ""),
        (110, "free memory", "warning", "ps "),
        (99, "free memory", "error", "ps "),
        (99, "the memory limit of the control group", "error", "cat /proc/self/cgroup"),
        (99, "the address space of this process (ulimit -v)", "error", "ulimit -v unlimited"),
    ],
)
def test_memory(free: int, limit: str, level: str, command: str) -> None:
    finding = only(fits(Need(60 * 10**6, 30 * 10**6, 10 * 10**6), Room(free * 10**6, limit)))
    assert finding.level == level and finding.command.startswith(command)
    assert bool(command) == bool(finding.command)
    assert "100.0 MB" in finding.why and f"{free}.0 MB" in finding.why and limit in finding.why


def test_the_limits_have_the_words_that_memory_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/box\n")
    for name, text in (("max", "1000\n"), ("current", "900\n"), ("stat", "active_file 0\n")):
        write(tmp_path, f"sys/fs/cgroup/box/memory.{name}", text)
    room = machine.room(tmp_path)
    assert room.free_bytes == 100 and only(fits(Need(90, 9, 2), room)).command.startswith("cat")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (50, 50))
    assert only(fits(Need(90, 9, 2), machine.room(tmp_path))).command.startswith("ulimit")


@pytest.mark.parametrize(
    ("total", "free", "count"), [(0, 0, 0), (100, 100, 0), (200, 160, 0), (200, 100, 1)]
)
def test_swap(total: int, free: int, count: int) -> None:
    text = f"MemTotal: 1000 kB\nMemFree: 7 kB\nSwapTotal: {total} kB\nSwapFree: {free} kB\n"
    found = swap(text)
    assert levels(found) == ["warning"] * count
    assert swap("") == []


def test_disk(tmp_path: Path) -> None:
    assert disk(100, 1000, tmp_path, "ext4") == []
    assert only(disk(100, 99, tmp_path, "ext4")).level == "error"
    memory = only(disk(100, 1000, tmp_path, "tmpfs"))
    assert memory.level == "warning" and memory.command.startswith("TMPDIR=/var/tmp ")


# --- CPUs ----------------------------------------------------------------------------------------


def make_cpus(
    root: Path, siblings: list[str], capacities: list[int] | None = None, governor: str = ""
) -> None:
    for n, text in enumerate(siblings):
        folder = f"sys/devices/system/cpu/cpu{n}"
        write(root, f"{folder}/topology/thread_siblings_list", text + "\n")
        if capacities:
            write(root, f"{folder}/cpu_capacity", f"{capacities[n]}\n")
        if governor:
            write(root, f"{folder}/cpufreq/scaling_governor", governor + "\n")


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "usable_cpus", lambda: list(range(8)))


@pytest.mark.usefixtures("eight")
def test_equal_cores(tmp_path: Path) -> None:
    assert levels(cores(tmp_path, 8)) == ["ok"]  # where the kernel tells nothing
    make_cpus(tmp_path, [str(n) for n in range(8)], [1024] * 8)
    assert levels(cores(tmp_path, 8)) == ["ok"]


@pytest.mark.usefixtures("eight")
def test_fast_and_slow_cores(tmp_path: Path) -> None:
    make_cpus(tmp_path, [str(n) for n in range(8)], [414] * 4 + [1024] * 4)  # RK3588
    finding = only(cores(tmp_path, 8))
    assert finding.level == "note" and "4 of 8 CPUs" in finding.what
    assert finding.command.endswith("--threads 4")
    assert cpu_capacities(tmp_path, [0, 4]) == [414, 1024]
    assert cpu_capacities(tmp_path, [0, 99]) == []


@pytest.mark.usefixtures("eight")
def test_hyper_threads(tmp_path: Path) -> None:
    make_cpus(tmp_path, [f"{n % 4},{n % 4 + 4}" for n in range(8)])
    finding = only(cores(tmp_path, 8))
    assert finding.level == "note" and finding.command.endswith("--threads 4")
    assert physical_cores(tmp_path, [0, 4]) == 1 and physical_cores(tmp_path, [0, 99]) == 0


@pytest.mark.usefixtures("eight")
def test_a_quota_of_the_control_group(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path, "sys/fs/cgroup/a/b/cpu.max", "max 100000\n")
    assert cpu_quota(tmp_path) is None
    write(tmp_path, "sys/fs/cgroup/a/cpu.max", "150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    finding = only(cores(tmp_path, 8))
    assert finding.level == "warning" and "1.5 of 8 CPUs" in finding.what
    assert finding.command.endswith("--threads 1")


def test_governors(tmp_path: Path) -> None:
    assert governor(tmp_path) == []
    make_cpus(tmp_path, ["0", "1"], governor="ondemand")
    assert governor(tmp_path) == []
    make_cpus(tmp_path, ["0", "1"], governor="powersave")
    finding = only(governor(tmp_path))
    assert finding.level == "warning" and "powersave" in finding.what
    assert "tee" in finding.command and "scaling_governor" in finding.command
    for n in range(2):
        write(tmp_path, f"sys/devices/system/cpu/cpu{n}/cpufreq/scaling_driver", "intel_pstate\n")
    assert governor(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "level", "words"),
    [
        ("throttled=0x0\n", "ok", "neither"),
        ("throttled=0x50005\n", "warning", "voltage is too low; the CPU is throttled"),
        ("throttled=0x80000\n", "note", "since the start: the soft temperature limit"),
        ("throttled=0x50000", "note", "voltage is too low; the CPU is throttled"),
    ],
)
def test_throttling(text: str, level: str, words: str) -> None:
    finding = only(throttling(text))
    assert finding.level == level and words in finding.what


def test_no_raspberry_pi_says_nothing() -> None:
    assert throttling("") == throttling("VCHI initialization failed\n") == []


def test_user_space_and_pages() -> None:
    assert user_space("aarch64", 8) == []
    old = only(user_space("aarch64", 4))
    assert old.level == "error" and "32 bits" in old.what and "64-bit system" in old.why
    assert only(user_space("armv7l", 4)).level == "error"
    assert page_size(4096) == []
    assert only(page_size(16384)).level == "note" and "16 KiB" in only(page_size(16384)).what


# --- all together --------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pi 5 with a native build, so that no child is started."""
    monkeypatch.setattr(module, "read_cpu", lambda root: PI5)
    monkeypatch.setattr(module, "build_in_child", lambda: NATIVE)
    monkeypatch.setattr(module, "first_decode_in_child", lambda settings: NATIVE)


@pytest.mark.usefixtures("healthy")
def test_the_worst_comes_first(tmp_path: Path, tiny_gguf: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 50 kB\nSwapTotal: 90 kB\n")
    asked: list[list[str]] = []

    def program(words: Any) -> str:
        asked.append(list(words))
        return "throttled=0x10000"

    found = examine(tiny_gguf, root=tmp_path, program=program)
    assert asked == [["vcgencmd", "get_throttled"]]
    assert levels(found) == sorted(levels(found), key=["error", "warning", "note", "ok"].index)
    assert [f.level for f in found][:3] == ["error", "warning", "note"]
    assert "does not fit" in only(errors(found)).what


@pytest.mark.usefixtures("healthy")
def test_n_ctx_counts(tmp_path: Path, tiny_gguf: Path) -> None:
    def kv(n_ctx: int) -> str:
        return next(f.why for f in examine(tiny_gguf, n_ctx, tmp_path) if "KV cache" in f.why)

    # 2 layers x K and V x 2 heads x 64 x 2 bytes a token.
    assert "KV cache 1.0 MB" in kv(1000) and "KV cache 10.5 MB" in kv(10000)


@pytest.mark.usefixtures("healthy")
def test_a_packed_bundle(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "b.edge"
    pack(tiny_bundle, packed)
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    assert any("fits into memory" in f.what for f in examine(packed, root=tmp_path))
    assert examine(packed, root=tmp_path) == examine(tiny_bundle, root=tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".edge-dtm")]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10))
    found = examine(packed, root=tmp_path)
    assert "no room" in only(errors(found)).what and not any("memory" in f.what for f in found)


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none", None, "does not exist"),
        ("m.gguf", b"junk", "no GGUF file"),
        ("m.gguf", b"", "no GGUF file"),
        ("m.bin", b"GGUF" + bytes(50), "not GGUF version 3"),
        ("b.edge", b"junk" * 9, "no packed bundle"),
    ],
)
def test_no_bundle(tmp_path: Path, name: str, data: bytes | None, words: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(EdgeDtmError, match=words):
        examine(tmp_path / name, root=tmp_path)


def test_a_build_that_cannot_be_loaded_or_decode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> Build:
        raise EdgeDtmError("it died: rebuild it here: CMAKE_ARGS=x pip install y")

    monkeypatch.setattr(module, "read_cpu", lambda root: PI5)
    monkeypatch.setattr(module, "build_in_child", fail)
    finding = only(errors(examine(root=tmp_path)))
    assert (finding.why, finding.command) == ("it died", "CMAKE_ARGS=x pip install y")
    assert "cannot be loaded" in finding.what
    monkeypatch.setattr(module, "build_in_child", lambda: NATIVE)
    monkeypatch.setattr(module, "first_decode_in_child", fail)
    assert "cannot decode" in only(errors(examine(root=tmp_path))).what
    # What is known to crash is not tried.
    monkeypatch.setattr(module, "read_cpu", lambda root: PI4)
    assert "was built with" in only(errors(examine(root=tmp_path))).what


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_on_this_machine(tiny_bundle: Path, tmp_path: Path) -> None:
    result = run(tiny_bundle, "--json", tmp_path / "d.json")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "d.json").read_text())
    assert data["passed"] and data["kind"] == "edge-dtm doctor"
    assert {f["level"] for f in data["findings"]} <= {"ok", "note", "warning"}
    for finding in data["findings"]:
        assert finding["what"] in result.stdout and finding["why"] in result.stdout
        assert finding["command"] in result.stdout


@pytest.mark.usefixtures("healthy")
def test_an_error_is_the_last_line_and_the_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "read_cpu", lambda root: PI4)
    result = run("--json", tmp_path / "d.json")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: llama.cpp was built with DOTPROD, FP16_VA, which this CPU")
    assert "$ CMAKE_ARGS=" in result.stdout
    # A command stands on one line however long it is.
    assert any(x.endswith("llama-cpp-python==0.3.36") for x in result.stdout.splitlines())
    assert not json.loads((tmp_path / "d.json").read_text())["passed"]


def test_json_is_checked_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "examine", lambda *_: pytest.fail("examined"))
    result = run("--json", tmp_path / "none" / "d.json")
    assert result.exit_code == 1 and "cannot be written" in result.stderr


def test_the_json_of_findings() -> None:
    data = to_json([Finding("error", "a", "b", "c")], PI4)
    assert json.loads(json.dumps(data))["findings"] == [
        {"level": "error", "what": "a", "why": "b", "command": "c"}
    ]
    assert not data["passed"] and data["cpu"]["features"] == ["ARM_FMA", "NEON"]
