"""Runs the command line, and says what its errors look like."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from edge_dtm.cli import EXIT_ERROR, main

EXIT_USAGE = 2  # click's own


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def assert_error(result: Result, *words: str, progress: bool = False) -> None:
    """One line that starts with `error:` and names the offender.

    progress: other lines may stand before it.
    """
    assert result.exit_code == EXIT_ERROR, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: "), result.stderr
    assert sum("error:" in line for line in lines) == 1
    assert progress or len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[-1], lines[-1]


def assert_usage(result: Result, *words: str) -> None:
    """click's own line on wrong usage, which names the option."""
    assert result.exit_code == EXIT_USAGE, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and all(word in last for word in words), last
