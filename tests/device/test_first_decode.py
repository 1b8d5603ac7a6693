"""A first decode in a child that may crash."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.device import first_decode as module
from edge_dtm.device.cpu import X86_FLAGS, Cpu, parse_system_info, rebuild_command
from edge_dtm.device.first_decode import first_decode_in_child, try_first_decode
from edge_dtm.llamacpp.llama import runtime_info

ROOT = Path(__file__).resolve().parents[2]
X86_INFO = "CPU : SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | REPACK = 1 | "


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where edge-dtm is not installed


def test_a_child_decodes_and_says_what_llama_is() -> None:
    info = runtime_info()
    build = parse_system_info(info["system_info"], info["llama_cpp_python"])
    assert build.features and try_first_decode() == (build, "")


def _instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Run other code in the child, in a real process."""
    script = tmp_path / "child.py"
    script.write_text(code)
    real = subprocess.run
    monkeypatch.setattr(
        module.subprocess, "run", lambda words, **more: real([sys.executable, script], **more)
    )


ANSWER = f"print('noise'); print({json.dumps({'system_info': X86_INFO, 'version': '0.3.36'})!r}, flush=True)\n"
OLD_CPU = Cpu("x86_64", "old CPU", frozenset({"SSE3"}), frozenset(X86_FLAGS))
THIS_CPU = Cpu("m", "this CPU", frozenset(), frozenset())
LIMIT = "import os, sys, resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"


@pytest.mark.parametrize("by_shell", [False, True])
@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGABRT"])
def test_a_child_that_a_signal_kills(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, by_shell: bool
) -> None:
    monkeypatch.setattr(module, "read_cpu", lambda: THIS_CPU)
    number = int(getattr(signal, name))
    death = f"sys.exit({128 + number})" if by_shell else f"os.kill(os.getpid(), {number})"
    _instead(monkeypatch, tmp_path, LIMIT + ANSWER + death)
    build, text = try_first_decode()
    assert build == parse_system_info(X86_INFO, "0.3.36")
    assert text.startswith(f"llama.cpp died of {name} in its first decode on this machine (this")
    assert text.endswith(rebuild_command("0.3.36")) and "\n" not in text
    _instead(monkeypatch, tmp_path, LIMIT + death)
    with pytest.raises(EdgeDtmError, match=f"died of {name} when it was loaded"):
        first_decode_in_child()


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 4)"])
def test_missing_features_are_named_before_the_death(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str
) -> None:
    monkeypatch.setattr(module, "read_cpu", lambda: OLD_CPU)
    _instead(monkeypatch, tmp_path, LIMIT + ANSWER + end)
    with pytest.raises(EdgeDtmError, match=r"built with AVX, AVX2, BMI2, F16C, FMA, SSSE3, which"):
        first_decode_in_child()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (ANSWER + "sys.exit('error: no such thing: do this')", "no such thing: do this"),
        (ANSWER + "raise MemoryError('much')", r"failed in its first decode \(MemoryError: much"),
        ("sys.exit(7)", r"failed when it was loaded \(exit status 7\): rebuild it here"),
        ("", r"failed when it was loaded \(exit status 0\)"),
        (ANSWER + "os.kill(os.getpid(), 9)", "was ended in its first decode by SIGKILL"),
        ("import time; time.sleep(60)", "did not finish its first decode within 0.5 s"),
    ],
)
def test_other_ends_of_a_child(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, words: str
) -> None:
    monkeypatch.setattr(module, "read_cpu", lambda: THIS_CPU)
    monkeypatch.setattr(module, "CHILD_TIMEOUT_S", 0.5 if "sleep" in code else 60)
    _instead(monkeypatch, tmp_path, "import os, sys\n" + code)
    with pytest.raises(EdgeDtmError, match=words) as caught:
        first_decode_in_child()
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ("raise ImportError('no llama')", "cannot be loaded .no llama"),
        ("raise RuntimeError('no\\nlibrary')", "cannot be loaded .no library"),
        ("import os; os.kill(os.getpid(), 4)", "died of SIGILL when it was loaded"),
    ],
)
def test_a_llama_cpp_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, planted: str, words: str
) -> None:
    (tmp_path / "llama_cpp.py").write_text(planted + "\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with pytest.raises(EdgeDtmError, match=words) as caught:
        first_decode_in_child()
    assert "\n" not in str(caught.value)
