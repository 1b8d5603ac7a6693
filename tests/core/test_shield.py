"""However the child ends, the program says so and exits as documented."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_words(body), capture_output=True, text=True, cwd=ROOT)


def _words(body: str) -> list[str]:
    text = f"""
    import ctypes, os, signal, sys, time
    from edge_dtm.core.supervisor import shielded

    def run():
        {body}

    shielded(run)
    """
    return [sys.executable, "-c", textwrap.dedent(text)]


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("print('done')", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("print('error: said', file=sys.stderr); sys.exit(1)", 1, "error: said"),
        ("os.kill(os.getpid(), signal.SIGABRT)", 1, "error: llama.cpp ended edge-dtm by SIGABRT"),
        ("ctypes.string_at(0)", 1, "error: llama.cpp ended edge-dtm by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "when memory runs out"),
        ("os._exit(1)", 1, "error: a library ended edge-dtm"),
        ("os._exit(0)", 1, "error: a library ended edge-dtm"),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        # A process that lives on must not be waited for.
        ("os.fork() or time.sleep(5); os._exit(1)", 1, "error: a library ended edge-dtm"),
    ],
)
def test_how_the_child_ends(body: str, code: int, words: str) -> None:
    if "fork" in body:
        body = "os.close(1); os.close(2) if not os.fork() else os._exit(1); time.sleep(3)"
    child = _run(body)
    assert child.returncode == code, child.stderr
    assert words in child.stderr
    assert sum(line.startswith("error: ") for line in child.stderr.splitlines()) == bool(words)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the child")
def test_the_child_does_not_outlive_a_killed_parent() -> None:
    body = "print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen(_words(body), stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        for _ in range(500):
            try:
                os.kill(child, 0)
            except ProcessLookupError:
                return
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":  # dead, and nobody has asked yet
                return
            time.sleep(0.01)
    raise AssertionError("it lives on")
