"""tools/arm_device: emulated ARM devices, and what edge-dtm says on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import arm_device as device
import pytest
from fixtures import tiny_bundle

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.metrics import compare
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import Reference
from edge_dtm.formats.thresholds import thresholds_from, tolerance_of_kernels

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "arm_device"
# CI makes one device only: each is a build of llama.cpp of its own.
DEVICES = tuple(os.environ.get("EDGE_DTM_ARM_DEVICES", "pi4,pi5,i8mm").split(","))
Run = Callable[..., "subprocess.CompletedProcess[str]"]
# The blocks of all of these fit the tiny model's rows; together most kernels of ggml's.
TYPES = ("Q8_0", "Q6_K", "Q4_K", "Q4_0", "Q5_K", "IQ4_NL", "Q5_0", "Q4_1", "F16")


# --- the command line and the making of a device ---------------------------------------------


@pytest.mark.parametrize(
    ("line", "cpu", "arch", "command"),
    [
        ("pi4", "cortex-a72", "armv8-a", []),
        ("pi5 -- edge-dtm verify b --json x", "cortex-a76", "armv8.2-a+dotprod+fp16",
         ["edge-dtm", "verify", "b", "--json", "x"]),
        ("i8mm --cpu cortex-a72 -- python -- x", "cortex-a72", "armv8.6-a+dotprod+fp16+i8mm",
         ["python", "--", "x"]),
        ("pi4 --build pi5", "cortex-a72", "armv8.2-a+dotprod+fp16", []),
        ("pi5 --features armv8.2-a+dotprod", "cortex-a76", "armv8.2-a+dotprod", []),
    ],
)  # fmt: skip
def test_command_line(line: str, cpu: str, arch: str, command: list[str]) -> None:
    assert device.parse(line.split()) == (cpu, arch, command)


@pytest.mark.parametrize(
    "line",
    ["", "pi3", "pi4 -- ls", "pi4 --build pi5 --features armv8-a", "pi4 --features a;b", "pi4 x"],
)
def test_wrong_usage(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        device.parse(line.split())
    assert exit_info.value.code == 2
    assert "arm_device" in capsys.readouterr().err


def _program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_missing_compiler_is_one_line(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    # As if the source had been fetched already.
    (cache / "arm" / device.pinned("llama-cpp-python") / "source").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "arm_device.py", "pi4"],
        env={"PATH": str(tmp_path), "EDGE_DTM_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("Making")]
    assert errors == [
        "error: aarch64-linux-gnu-g++ was not found: apt-get install g++-aarch64-linux-gnu"
    ]


def test_a_part_is_whole_or_not_there(tmp_path: Path) -> None:
    maker = device.Maker(tmp_path)

    def half(new: Path) -> None:
        (new / "first").touch()
        raise EdgeDtmError("cut off")

    def all_of_it(new: Path) -> None:
        assert not list(new.iterdir())
        (new / "second").touch()

    with pytest.raises(EdgeDtmError):
        maker.once(tmp_path / "part", "a part", half)
    assert not (tmp_path / "part").exists()
    maker.once(tmp_path / "part", "a part", all_of_it)
    assert maker.once(tmp_path / "part", "a part", half) == tmp_path / "part"
    assert [p.name for p in (tmp_path / "part").iterdir()] == ["second"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_step_names_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(EdgeDtmError, match=f"sh failed with exit status 3: see the end of {log}"):
        device.call(["sh", "-c", "echo why; exit 3"], log)
    assert "why" in log.read_text()


def test_requirements_leave_out_the_binding_itself() -> None:
    pyproject = {"dependencies": ["numpy", "llama-cpp-python>=0.3.30", "click>=8.1"]}
    assert device.requirements(pyproject, {"dependencies": ["jinja2>=2", "numpy"]}) == [
        "click>=8.1", "jinja2>=2", "numpy"
    ]  # fmt: skip


def test_the_version_is_that_of_the_constraints() -> None:
    assert f"llama_cpp_python=={device.pinned('llama-cpp-python')}\n" in (
        ROOT / "constraints.txt"
    ).read_text(encoding="utf-8")
    with pytest.raises(EdgeDtmError, match="no version of no-such-package"):
        device.pinned("no-such-package")


def test_the_mirror_is_that_of_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _program(
        tmp_path, "apt-get", "echo 'Ubuntu|Ubuntu|http://a/u'; echo 'Debian|Debian|http://b/d'"
    )
    assert device.debian_mirror() == "http://b/d"
    _program(tmp_path, "apt-get", "echo 'Debian|Debian-Security|http://b/s'")
    with pytest.raises(EdgeDtmError, match="no Debian mirror"):
        device.debian_mirror()


def test_installed_qemu_where_debians_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    _program(programs, "dpkg", "echo amd64")
    _program(programs, "apt-get", "exit 1")
    maker = device.Maker(tmp_path / "made")
    found = _program(programs, "qemu-aarch64", "echo qemu-aarch64 version 9.2.1")
    assert maker.qemu() == found
    _program(programs, "qemu-aarch64", "echo qemu-aarch64 version 7.2.17")
    with pytest.raises(EdgeDtmError, match="no Debian mirror"):
        maker.qemu()


def test_children_of_the_device_start_through_the_launcher(tmp_path: Path) -> None:
    # This machine's Python under a QEMU that only understands -0.
    qemu = _program(tmp_path, "qemu", "")
    qemu.write_text(
        "#!/usr/bin/env python3\nimport os, sys\nat = sys.argv.index('-0')\n"
        "name, program, *rest = sys.argv[at + 1 :]\n"
        "assert sys.argv[1:at] == ['-cpu', 'max', '-L', os.path.dirname(os.path.dirname("
        "os.path.dirname(program)))]\nos.execv(program, [name, *rest])\n"
    )
    root = tmp_path / "root with a space"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin" / device.PYTHON).symlink_to(Path(sys.executable).resolve())
    launchers = tmp_path / "launchers"
    device.write_launchers(launchers, qemu, "max", root)
    code = "import subprocess, sys; print(sys.executable, *sys.argv[1:])"
    child = f"{code}; subprocess.run([sys.executable, '-c', {code!r}, 'child'])"
    done = subprocess.run(
        [launchers / "python", "-c", child, "a b"], capture_output=True, text=True, check=True
    )
    python = str(launchers / "python")
    assert sorted(done.stdout.splitlines()) == [f"{python} a b", f"{python} child"]


def test_environment_is_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/of/the/host")
    monkeypatch.setenv("PYTHONSTARTUP", "/of/the/host")
    found = device.environment(*(tmp_path / n for n in ("root", "wheels", "source", "lib")))
    assert not [k for k, v in found.items() if v == "/of/the/host"]
    assert found["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert found["LLAMA_CPP_LIB_PATH"] == str(tmp_path / "lib")
    assert found["OMP_NUM_THREADS"] == "1"


# --- on the devices ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mixed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle of many types, with the thresholds that compress would set."""
    folder = tiny_bundle.make_bundle(tmp_path_factory.mktemp("arm") / "bundle", TYPES)
    reference = Reference.load(folder / "reference.npz")
    host = Record.load(folder / "host.npz")
    ids, lengths = reference.generated_ids, reference.generated_lengths
    thresholds = thresholds_from(
        compare(ids, host.ids, lengths, reference.margins),
        tolerance_of_kernels(ids, host.top_ids, host.top_logits, lengths),
        True,
    )
    tiny_bundle.seal(folder, thresholds=thresholds)
    return folder


@pytest.fixture(scope="session")
def on_device() -> Run:
    if os.environ.get("EDGE_DTM_ARM") != "1" and not shutil.which("aarch64-linux-gnu-g++"):
        pytest.skip(
            "emulated devices: no aarch64-linux-gnu-g++ and EDGE_DTM_ARM is not 1 "
            "(docs/emulated-devices.md)"
        )

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(w) for w in (TOOL, *words)],
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def _need(name: str) -> None:
    if name not in DEVICES:
        pytest.skip(f"EDGE_DTM_ARM_DEVICES has no {name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_healthy_device_passes(
    name: str, on_device: Run, mixed_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "verdict.json"
    done = on_device(name, "--", "edge-dtm", "verify", mixed_bundle, "--json", out)
    assert done.returncode == 0, done.stderr + done.stdout
    verdict = json.loads(out.read_text())
    assert verdict["passed"] is True
    assert verdict["runtime"]["machine"] == "aarch64"
    info = verdict["runtime"]["system_info"]
    assert ("DOTPROD = 1" in info) == (name != "pi4")
    assert ("MATMUL_INT8 = 1" in info) == (name == "i8mm")


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_doctor_finds_nothing_wrong(name: str, on_device: Run, mixed_bundle: Path) -> None:
    done = on_device(name, "--", "edge-dtm", "doctor", mixed_bundle)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "doctor"])
@pytest.mark.parametrize(("name", "feature"), [("pi5", "DOTPROD"), ("i8mm", "MATMUL_INT8")])
def test_build_for_another_cpu_is_refused(
    command: str, name: str, feature: str, on_device: Run, mixed_bundle: Path
) -> None:
    _need(name)
    done = on_device(name, "--cpu", "cortex-a72", "--", "edge-dtm", command, mixed_bundle)
    assert done.returncode == 1, done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert feature in lines[0]


@pytest.mark.slow
def test_slower_build_than_the_cpu_allows_is_told(on_device: Run) -> None:
    _need("pi4")
    done = on_device("pi5", "--build", "pi4", "--", "edge-dtm", "doctor")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "DOTPROD" in done.stdout
