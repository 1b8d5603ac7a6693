"""All faults are tried for real, and the tool that does it can fail."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from break_it import faults

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_fault_ends_as_expected(tmp_path: Path) -> None:
    page = tmp_path / "faults.md"
    words = ["table", "--flips", "3", "--cuts", "3", "--out", page]
    program = [sys.executable, ROOT / "tools/break_it", *words]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) > 35
    assert all(row in page.read_text() for row in rows)
    codes = {re.split(r"(?<!\\)\|", row)[3].strip() for row in rows[1:]}
    assert codes >= {"0", "1", "3", "1 or 0", "-9, then 0"}
    assert str(tmp_path.parent.parent) not in page.read_text(), "no path of this machine"


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "expected", "problem"),
    [
        (1, (), ("error: x",), 1, None),
        (0, ("PASS x",), (), 0, None),
        (3, ("diagnosis", "FAIL x"), ("progress",), 3, None),
        (0, (), ("error: x",), 1, "exit code 0 instead of 1"),
        (-6, (), ("terminate called",), 1, "exit code -6"),
        (1, (), ("no word",), 1, "0 error lines"),
        (1, (), ("error: x", "error: y"), 1, "2 error lines"),
        (1, (), ("Traceback (most recent call last):", "error: x"), 1, "a traceback"),
        (0, (), ("error: x",), 0, "1 error lines"),
        (3, ("PASS x",), (), 3, "no FAIL line"),
        (3, ("", "FAIL x"), (), 3, "no diagnosis"),
        (3, ("FAIL x",), (), 3, "no diagnosis"),
    ],
)
def test_an_expectation_that_is_not_met_is_told(
    code: int,
    stdout: tuple[str, ...],
    stderr: tuple[str, ...],
    expected: int,
    problem: str | None,
) -> None:
    problems = faults.Seen(code, stdout, stderr).problems(expected)
    if problem is None:
        assert problems == []
    else:
        assert any(problem in p for p in problems)


def test_the_exit_status_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [faults.Row("a", "error: x", "1", "nothing")]
    monkeypatch.setattr(faults, "try_all", lambda work, flips, cuts: iter(rows))
    assert faults.run(1, 3, tmp_path / "a.md") == 0
    assert "| a | `error: x` | 1 | nothing |" in (tmp_path / "a.md").read_text()
    rows.append(faults.Row("b", "|", "0", "", ["wrong"]))
    assert faults.run(1, 3, None) == 1


def test_the_page_is_of_this_tool() -> None:
    """docs/faults.md is what the tool wrote: its text, and the faults that it tries."""
    page = (ROOT / "docs" / "faults.md").read_text()
    before, after = faults.PAGE.split("{table}")
    assert page.startswith(before)
    assert page.endswith(after)
    assert sum(line.startswith("| ") for line in page.splitlines()) > 40
