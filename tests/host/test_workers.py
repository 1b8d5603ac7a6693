"""Work in processes: the same results as without, errors, kills, and what memory allows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import Room
from edge_dtm.host.blocks import workers
from edge_dtm.host.blocks.workers import in_workers, worker_count


def _product(context: int, task: int) -> tuple[float, int, int]:
    matrix = torch.randn((300, 300), generator=torch.Generator().manual_seed(task))
    total = float((matrix @ matrix.T).sum()) * context
    return total, torch.get_num_threads(), os.getpid()


def _refuse(_: Any, task: int) -> int:
    if task == 3:
        raise EdgeDtmError("three is not finite")
    return task


def _die(_: Any, task: int) -> int:
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_processes_give_the_same_results_as_none() -> None:
    here = {task: r[:2] for task, r in in_workers(_product, 3, range(6), 1)}
    apart = dict(in_workers(_product, 3, range(6), 2))
    assert {task: r[:2] for task, r in apart.items()} == here
    assert {r[1] for r in apart.values()} == {1}
    assert os.getpid() not in {r[2] for r in apart.values()}


def test_threads_of_the_caller_are_as_before() -> None:
    before = torch.get_num_threads()
    list(in_workers(_product, 1, range(2), 1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_a_task_is_raised_here(count: int) -> None:
    done = []
    with pytest.raises(EdgeDtmError, match="three is not finite"):
        for task, _ in in_workers(_refuse, None, range(4), count):
            done.append(task)
    assert 3 not in done


def test_a_killed_process_is_an_error_in_words() -> None:
    with pytest.raises(EdgeDtmError, match="2 worker processes was killed.*memory"):
        list(in_workers(_die, None, range(6), 2))


def _sleep(_: Any, seconds: int) -> int:
    time.sleep(seconds)
    return seconds


def test_work_nobody_waits_for_is_ended() -> None:
    """As after Ctrl-C: it would otherwise be waited for."""
    found = in_workers(_sleep, None, [0, 3600, 3600], 2)
    assert next(found)[0] == 0
    found.close()  # type: ignore[attr-defined]


def test_no_more_workers_than_memory_cores_and_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(workers, "room", lambda: Room(10 * 2**30, "a test"))
    assert worker_count(100, 2**30) == 8
    assert worker_count(3, 2**30) == 3
    assert worker_count(100, 4 * 2**30) == 2
    assert worker_count(100, 2**40) == 1
    monkeypatch.setattr(workers, "room", lambda: Room(2**62, "nothing"))
    assert worker_count(100, 2**40) == 8


SCRIPT = """
import os, sys, time
from edge_dtm.host.blocks.workers import in_workers
sys.path.insert(0, {folder!r})
from sleeper import sleep
if __name__ == "__main__":
    for task, pid in in_workers(sleep, None, [0, 0, 600, 600], 2):
        print(pid, flush=True)
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import os, time\n\ndef sleep(_, seconds):\n    time.sleep(seconds)\n    return os.getpid()\n"
    )
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path)))
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, str(tmp_path)])},
    ) as process:
        assert process.stdout is not None
        pids = {int(process.stdout.readline()) for _ in range(2)}
        assert all(_alive(pid) for pid in pids)
        process.kill()
        for _ in range(200):
            if not any(_alive(pid) for pid in pids):
                break
            time.sleep(0.1)
    assert not any(_alive(pid) for pid in pids)
