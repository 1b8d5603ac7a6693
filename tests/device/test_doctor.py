"""What is wrong with a machine: each check on a machine that is made up, and the command here."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from fixtures.boards import GENERIC, NATIVE, PI4, PI5, put

from edge_dtm.cli import main
from edge_dtm.core import machine
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import Room
from edge_dtm.device import checks
from edge_dtm.device import doctor as module
from edge_dtm.device.checks import Finding
from edge_dtm.device.cpu import X86_FLAGS, Build, Cpu
from edge_dtm.device.doctor import errors, examine, matrices_of
from edge_dtm.formats.archive import pack
from edge_dtm.formats.ggml_types import ALLOWED_TYPES
from edge_dtm.llamacpp.gguf_header import Need, TensorInfo
from edge_dtm.llamacpp.probe_model import finish

AVX2 = frozenset({"AVX", "AVX2", "FMA", "F16C"})
LAPTOP = Cpu("x86_64", "laptop", AVX2, frozenset(X86_FLAGS))


def matrix(type_name: str, rows: int, size_bytes: int) -> TensorInfo:
    return TensorInfo("m", (32, rows), type_name, 0, size_bytes)


def levels(findings: Iterable[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


# --- llama.cpp against the CPU -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "cpu", "level", "what", "command"),
    [
        (NATIVE, PI5, "ok", "Cortex-A76", ""),
        # A ready-made wheel; on a Pi 4 there is nothing to gain.
        (GENERIC, PI5, "warning", "FP16_VA, DOTPROD", "llama-cpp-python==0.3.36"),
        (GENERIC, PI4, "ok", "Cortex-A72", ""),
        (Build(PI5.features), PI5, "warning", "REPACK", "-DGGML_CPU_REPACK=ON"),
        (Build(frozenset()), PI5, "warning", "does not say", "-DGGML_NATIVE=ON"),
    ],
)
def test_kernels(build: Build, cpu: Cpu, level: str, what: str, command: str) -> None:
    finding = only(checks.kernels(build, cpu))
    assert finding.level == level and what in finding.what
    assert command in finding.command and bool(command) == bool(finding.command)


# --- types ---------------------------------------------------------------------------------------


def test_types_that_this_build_or_no_build_repacks() -> None:
    model = [
        matrix("Q4_K", 2048, 600),
        matrix("Q5_0", 2048, 300),
        matrix("Q6_K", 49, 50),  # rows that do not divide by 8
        matrix("F16", 512, 50),
    ]
    slow, never = checks.types(model, GENERIC, PI5)
    assert slow.level == "warning" and "no Q4_K (0.0 MB, 60 %)" in slow.what
    assert "Q5_0" not in slow.what and "Q6_K" not in slow.what
    assert never.level == "note"
    assert never.what.endswith("for Q5_0 (0.0 MB, 30 %), Q6_K (0.0 MB, 5 %)")
    assert only(checks.types(model, NATIVE, PI5)) == never
    words = shlex.split(never.command)
    proposed = words[words.index("--types") + 1].split(",")
    assert set(proposed) == {"F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL"}
    assert set(proposed) <= set(ALLOWED_TYPES)


@pytest.mark.parametrize(
    ("names", "build", "cpu", "expected"),
    [
        (["Q8_0", "Q4_0", "F32"], NATIVE, PI5, ["ok"]),
        # Nothing is repacked on a Pi 4, which is its limit and not the build's.
        (["Q8_0", "Q4_0"], GENERIC, PI4, ["note"]),
        (["F16"], NATIVE, PI5, []),
        (["Q4_K"], Build(AVX2 | {"REPACK"}), LAPTOP, ["ok"]),
        (["Q8_0"], Build(AVX2 | {"REPACK"}), LAPTOP, ["note"]),
    ],
)
def test_types_of_a_model(names: list[str], build: Build, cpu: Cpu, expected: list[str]) -> None:
    assert levels(checks.types([matrix(name, 64, 10) for name in names], build, cpu)) == expected


def test_matrices_are_those_that_are_read_whole(tiny_gguf: Path, tmp_path: Path) -> None:
    sizes = {
        t.name: int(t.n_bytes) for t in gguf.GGUFReader(tiny_gguf).tensors if len(t.shape) == 2
    }
    matrices = matrices_of(tiny_gguf)
    assert sum(m.size_bytes for m in matrices) == sum(sizes.values()) - sizes["token_embd.weight"]
    assert {m.type for m in matrices} == {"F32"}

    writer = gguf.GGUFWriter(tmp_path / "tied.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((7, 32), dtype=np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(32, dtype=np.float32))
    finish(writer)
    (tied,) = matrices_of(tmp_path / "tied.gguf")
    assert (tied.type, tied.shape, tied.size_bytes) == ("F16", (32, 7), 448)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "limit", "level", "command"),
    [
        (200, "free memory", "ok", ""),
        (110, "free memory", "warning", "ps "),
        (99, "free memory", "error", "ps "),
    ],
)
def test_memory(free: int, limit: str, level: str, command: str) -> None:
    need = Need(60 * 10**6, 30 * 10**6, 10 * 10**6)
    finding = only(checks.fits(need, Room(free * 10**6, limit)))
    assert finding.level == level and finding.command.startswith(command)
    assert bool(command) == bool(finding.command)
    assert "100.0 MB" in finding.why and f"{free}.0 MB" in finding.why and limit in finding.why


def test_each_limit_of_memory_has_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/box")
    for name, text in (("max", 1000), ("current", 900), ("stat", "active_file 0")):
        put(tmp_path, f"sys/fs/cgroup/box/memory.{name}", text)
    room = machine.room(tmp_path)
    assert room.free_bytes == 100
    assert only(checks.fits(Need(90, 9, 2), room)).command == "cat /proc/self/cgroup"
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (50, 50))
    room = machine.room(tmp_path)
    assert only(checks.fits(Need(90, 9, 2), room)).command == "ulimit -v unlimited"


@pytest.mark.parametrize(
    ("total", "free", "expected"),
    [(0, 0, []), (100, 100, []), (200, 160, []), (200, 100, ["warning"])],
)
def test_swap(total: int, free: int, expected: list[str]) -> None:
    meminfo = {"MemTotal": 1000, "MemFree": 7, "SwapTotal": total, "SwapFree": free}
    assert levels(checks.swap(meminfo)) == expected
    assert levels(checks.swap({})) == []


def test_disk(tmp_path: Path) -> None:
    assert levels(checks.disk(100, 1000, tmp_path, "ext4")) == []
    assert only(checks.disk(100, 99, tmp_path, "ext4")).level == "error"
    memory = only(checks.disk(100, 1000, tmp_path, "tmpfs"))
    assert memory.level == "warning" and memory.command.startswith("TMPDIR=/var/tmp ")


# --- CPUs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("siblings", "capacities", "quota", "level", "what", "threads"),
    [
        ("{n}", None, "max 100000", "ok", "threads by default: 8", ""),
        (None, None, None, "ok", "threads by default: 8", ""),  # where the kernel tells nothing
        ("{n}", [1024] * 8, None, "ok", "threads by default: 8", ""),
        ("{n}", [414] * 4 + [1024] * 4, None, "note", "4 of 8 CPUs are fast", "4"),  # RK3588
        ("{half},{n}", None, None, "note", "8 CPUs are 4 cores", "4"),
        ("{n}", None, "150000 100000", "warning", "1.5 of 8 CPUs", "1"),
    ],
)
def test_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    siblings: str | None,
    capacities: list[int] | None,
    quota: str | None,
    level: str,
    what: str,
    threads: str,
) -> None:
    monkeypatch.setattr(checks, "usable_cpus", lambda: list(range(8)))
    for n in range(8):
        folder = f"sys/devices/system/cpu/cpu{n}"
        if siblings:
            text = siblings.format(n=n if siblings == "{n}" else n % 4 + 4, half=n % 4)
            put(tmp_path, f"{folder}/topology/thread_siblings_list", text + "")
        if capacities:
            put(tmp_path, f"{folder}/cpu_capacity", capacities[n])
    if quota:
        put(tmp_path, "proc/self/cgroup", "0::/a/b")
        put(tmp_path, "sys/fs/cgroup/a/cpu.max", quota + "")
    finding = only(checks.cores(tmp_path, 8))
    assert finding.level == level and what in finding.what
    assert finding.command.partition("--threads ")[2] == threads


def test_governors(tmp_path: Path) -> None:
    folder = "sys/devices/system/cpu/cpu1/cpufreq"
    assert levels(checks.governor(tmp_path)) == []
    put(tmp_path, f"{folder}/scaling_governor", "ondemand")
    assert levels(checks.governor(tmp_path)) == []
    put(tmp_path, f"{folder}/scaling_governor", "powersave")
    finding = only(checks.governor(tmp_path))
    assert finding.level == "warning" and "powersave" in finding.what
    assert "tee" in finding.command and "scaling_governor" in finding.command
    put(tmp_path, f"{folder}/scaling_driver", "intel_pstate")
    assert levels(checks.governor(tmp_path)) == []


@pytest.mark.parametrize(
    ("text", "level", "words"),
    [
        ("throttled=0x0\n", "ok", "neither"),
        ("throttled=0x50005\n", "warning", "voltage is too low; the CPU is throttled"),
        ("throttled=0x80000\n", "note", "since the start: the soft temperature limit"),
    ],
)
def test_throttling(text: str, level: str, words: str) -> None:
    finding = only(checks.throttling(text))
    assert finding.level == level and words in finding.what
    assert levels(checks.throttling("VCHI initialization failed\n")) == []


def test_user_space() -> None:
    assert levels(checks.user_space("aarch64", 8)) == []
    assert only(checks.user_space("armv7l", 4)).level == "error"


# --- all together --------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pi 5 with a native build, so that no child is started."""
    monkeypatch.setattr(module, "read_cpu", lambda root: PI5)
    monkeypatch.setattr(module, "try_first_decode", lambda: (NATIVE, ""))


@pytest.mark.usefixtures("healthy")
def test_the_worst_comes_first(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 50 kB\nSwapTotal: 90 kB")
    monkeypatch.setattr(module, "vcgencmd", lambda what: "throttled=0x10000")
    findings = examine(tiny_gguf, 2048, tmp_path)
    assert levels(findings) == ["error", "warning", "note", "ok", "ok", "ok", "ok"]
    assert "does not fit" in only(errors(findings)).what


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
    findings = examine(packed, 2048, tmp_path)
    assert any("fits into memory" in f.what for f in findings)
    assert findings == examine(tiny_bundle, 2048, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".edge-dtm")]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10))
    findings = examine(packed, 2048, tmp_path)
    assert "no room" in only(errors(findings)).what
    assert not any("memory" in f.what for f in findings)


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("m.gguf", b"junk", "no GGUF file"),
        ("m.gguf", b"", "no GGUF file"),
        ("m.bin", b"GGUF" + bytes(50), "not GGUF version 3"),
        ("b.edge", b"junk" * 9, r"b\.edge is"),
    ],
)
def test_no_bundle(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(EdgeDtmError, match=words):
        examine(tmp_path / name, 2048, tmp_path)


@pytest.mark.parametrize("build", [None, NATIVE])
def test_a_build_that_cannot_be_loaded_or_decode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_gguf: Path, build: Build | None
) -> None:
    refusal = "it died: rebuild it here: CMAKE_ARGS=x pip install y"
    monkeypatch.setattr(module, "try_first_decode", lambda: (build, refusal))
    findings = examine(tiny_gguf, 2048, tmp_path)
    finding = only(errors(findings))
    assert (finding.what, finding.command) == ("it died", "CMAKE_ARGS=x pip install y")
    assert not any("decodes" in f.what or "fits this CPU" in f.what for f in findings)


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
        assert all(finding[key] in result.stdout for key in ("what", "why", "command"))


def test_an_error_is_the_last_line_and_the_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = f"CMAKE_ARGS={'x' * 300} pip install y"
    refusal = f"llama.cpp was built with DOTPROD: rebuild it here: {command}"
    monkeypatch.setattr(module, "try_first_decode", lambda: (NATIVE, refusal))
    result = run("--json", tmp_path / "d.json")
    assert result.exit_code == 1
    assert result.stderr == "error: llama.cpp was built with DOTPROD: see above what mends it\n"
    # A command stands on one line however long it is.
    assert f"        $ {command}" in result.stdout.splitlines()
    data = json.loads((tmp_path / "d.json").read_text())
    assert not data["passed"] and data["findings"][0]["command"] == command
