"""Modules of ours as child processes, which may die or grow without the caller."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from edge_dtm.core.errors import EdgeDtmError


def run_child(
    module: str, words: Sequence[str], timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m module words`. subprocess.TimeoutExpired or OSError when it does not end or start."""
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=timeout_s,
    )


def json_lines(text: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects; others are what a library printed."""
    answers = []
    for line in text.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, dict):
            answers.append(answer)
    return answers


def last_line(text: str) -> str:
    return " ".join((text.strip().splitlines() or [""])[-1].split())


def child_main(main: Callable[[list[str]], None]) -> None:
    """What the child runs: an EdgeDtmError becomes its last line and exit status 1."""
    try:
        main(sys.argv[1:])
    except EdgeDtmError as error:
        sys.exit(f"error: {error}")
