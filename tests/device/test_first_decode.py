"""A first decode in a child that may crash."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.device import child
from edge_dtm.device import first_decode as module
from edge_dtm.device.cpu import X86_FLAGS, Build, Cpu, parse_system_info, rebuild_command
from edge_dtm.device.first_decode import build_in_child, first_decode_in_child, require_runnable
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp.llama import runtime_info

ROOT = Path(__file__).resolve().parents[2]
X86_INFO = "CPU : SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | REPACK = 1 | "


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where edge-dtm is not installed


def test_a_build_of_another_board() -> None:
    build = Build(frozenset({"NEON", "DOTPROD", "MATMUL_INT8"}), "0.3.36")
    neon = frozenset({"NEON"})
    require_runnable(build, Cpu("aarch64", "Cortex-A710", build.features, build.features))
    with pytest.raises(EdgeDtmError) as caught:
        require_runnable(build, Cpu("aarch64", "Cortex-A72", neon, build.features))
    for words in ("DOTPROD, MATMUL_INT8", "Cortex-A72", rebuild_command("0.3.36")):
        assert words in str(caught.value)


def test_a_child_decodes_and_says_what_llama_is(tiny_gguf: Path) -> None:
    build = first_decode_in_child(RunSettings(threads=1), tiny_gguf)
    info = runtime_info()
    assert build == parse_system_info(info["system_info"], info["llama_cpp_python"])
    assert build.features and build == build_in_child()


def test_a_broken_model_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EdgeDtmError, match="m.gguf is not GGUF version 3") as caught:
        first_decode_in_child(RunSettings(threads=1), path)
    assert "\n" not in str(caught.value) and "error:" not in str(caught.value)


def _instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Run other code in the child, in a real process."""
    script = tmp_path / "child.py"
    script.write_text(code)
    real = subprocess.run
    monkeypatch.setattr(
        child.subprocess, "run", lambda words, **more: real([sys.executable, script], **more)
    )


ANSWER = f"print('noise'); print({json.dumps({'system_info': X86_INFO, 'version': '0.3.36'})!r}, flush=True)\n"
NOT_RUN_HERE = Cpu("x86_64", "old CPU", frozenset({"SSE3"}), frozenset(X86_FLAGS))


@pytest.mark.parametrize("number", ["SIGILL", "SIGSEGV", "SIGBUS", "SIGABRT"])
@pytest.mark.parametrize("by_shell", [False, True])
def test_a_child_that_a_signal_kills(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: str, by_shell: bool
) -> None:
    monkeypatch.setattr(module, "read_cpu", lambda: Cpu("m", "this CPU", frozenset(), frozenset()))
    value = int(getattr(signal, number))
    death = f"sys.exit({128 + value})" if by_shell else f"os.kill(os.getpid(), {value})"
    limit = "import os, sys, resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
    _instead(monkeypatch, tmp_path, limit + ANSWER + death)
    with pytest.raises(EdgeDtmError) as caught:
        first_decode_in_child(RunSettings(threads=1))
    text = str(caught.value)
    assert text.startswith(
        f"llama.cpp died of {number} in its first decode on this machine (this CPU)"
    )
    assert text.endswith(rebuild_command("0.3.36")) and "\n" not in text
    _instead(monkeypatch, tmp_path, limit + death)
    with pytest.raises(EdgeDtmError, match=f"died of {number} when it was loaded"):
        build_in_child()


def test_missing_features_are_named_before_the_death(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "read_cpu", lambda: NOT_RUN_HERE)
    _instead(
        monkeypatch,
        tmp_path,
        "import os, signal\n" + ANSWER + "os.kill(os.getpid(), signal.SIGILL)",
    )
    with pytest.raises(EdgeDtmError, match=r"built with AVX, AVX2, BMI2, F16C, FMA, SSSE3, which"):
        first_decode_in_child(RunSettings(threads=1))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (ANSWER + "sys.exit('error: no such thing: do this')", "no such thing: do this"),
        (
            ANSWER + "raise MemoryError('much')",
            r"failed in its first decode \(MemoryError: much\): re",
        ),
        ("sys.exit(7)", r"failed when it was loaded \(exit status 7\): rebuild it here"),
        ("", "answered nothing"),
        (ANSWER, "answered nothing"),
        (ANSWER + "os.kill(os.getpid(), 9)", "was ended in its first decode by SIGKILL"),
        (ANSWER + "os.kill(os.getpid(), 15)", "was ended in its first decode by SIGTERM"),
        ("import time; time.sleep(60)", "did not finish its first decode within 0.5 s"),
    ],
)
def test_other_ends_of_a_child(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, words: str
) -> None:
    monkeypatch.setattr(module, "read_cpu", lambda: Cpu("m", "this CPU", frozenset(), frozenset()))
    _instead(monkeypatch, tmp_path, "import os, sys\n" + code)
    timeout_s = 0.5 if "sleep" in code else 60
    with pytest.raises(EdgeDtmError, match=words) as caught:
        first_decode_in_child(RunSettings(threads=1), timeout_s=timeout_s)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ("raise ImportError('no llama')", "pip install llama-cpp-python"),
        (
            "raise RuntimeError('Failed to load\\nshared library')",
            "cannot be loaded .Failed to load sh",
        ),
        ("import os; os.kill(os.getpid(), 4)", "died of SIGILL when it was loaded"),
    ],
)
def test_a_llama_cpp_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, planted: str, words: str
) -> None:
    (tmp_path / "llama_cpp.py").write_text(planted + "\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with pytest.raises(EdgeDtmError, match=words) as caught:
        build_in_child()
    assert "\n" not in str(caught.value)
