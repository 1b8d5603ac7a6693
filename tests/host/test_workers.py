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
from edge_dtm.host.blocks import workers as module
from edge_dtm.host.blocks.workers import OWN_BYTES, SMALL_WEIGHTS, Crew, crew, workers


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


def _sleep(_: Any, seconds: int) -> int:
    time.sleep(seconds)
    return seconds


def test_processes_give_the_same_results_as_none() -> None:
    before = torch.get_num_threads()
    with workers(3, Crew(1, 1)) as none, workers(3, Crew(2, 1)) as two:
        here = {task: r[:2] for task, r in none.run(_product, range(6))}
        apart = dict(two.run(_product, range(6)))
        assert two.context == 3 and two.crew.processes == 2
        assert dict(two.run(_refuse, [1, 2])) == {1: 1, 2: 2}  # of the same processes
    assert {task: r[:2] for task, r in apart.items()} == here
    assert {r[1] for r in apart.values()} == {1}
    assert os.getpid() not in {r[2] for r in apart.values()}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_a_task_is_raised_here(count: int) -> None:
    done = []
    with (
        pytest.raises(EdgeDtmError, match="three is not finite"),
        workers(None, Crew(count, 1)) as pool,
    ):
        done += [task for task, _ in pool.run(_refuse, range(4))]
    assert 3 not in done


def test_a_killed_process_is_an_error_in_words() -> None:
    with (
        pytest.raises(EdgeDtmError, match="2 worker processes was killed.*memory"),
        workers(None, Crew(2, 1)) as pool,
    ):
        list(pool.run(_die, range(6)))


def test_work_nobody_waits_for_is_ended() -> None:
    """As after Ctrl-C: it would otherwise be waited for."""
    with pytest.raises(KeyboardInterrupt), workers(None, Crew(2, 1)) as pool:
        assert next(pool.run(_sleep, [0, 3600, 3600]))[0] == 0
        raise KeyboardInterrupt


def test_no_more_workers_than_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, large, gib = torch.device("cpu"), SMALL_WEIGHTS + 1, 2**30
    monkeypatch.setattr(module, "default_threads", lambda: 8)
    monkeypatch.setattr(module, "total_bytes", lambda: OWN_BYTES + 10 * gib)
    assert crew(large, gib, None, cpu) == Crew(8, 1)
    assert crew(large, 4 * gib, None, cpu) == Crew(2, 4)
    assert crew(large, 2**40, None, cpu) == Crew(1, 8)
    assert crew(large, gib, 3, cpu) == Crew(3, 2)
    assert crew(SMALL_WEIGHTS, gib, None, cpu) == Crew(1, 1)
    assert crew(large, gib, None, torch.device("cuda")) == Crew(1, 8)
    for wanted, size in ((9, gib), (3, 4 * gib)):
        with pytest.raises(EdgeDtmError, match=f"--workers {wanted}"):
            crew(large, size, wanted, cpu)


SCRIPT = """
import os, sys, time
from edge_dtm.host.blocks.workers import Crew, workers
sys.path.insert(0, {folder!r})
from sleeper import sleep
if __name__ == "__main__":
    with workers(None, Crew(2, 1)) as pool:
        for task, pid in pool.run(sleep, [0, 0, 600, 600]):
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
