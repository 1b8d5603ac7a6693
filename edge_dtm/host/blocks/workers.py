"""One function over many tasks, on all cores: in processes, since Python threads that make many
small steps get in each other's way.

Processes come from a clean server process (a fork of one that has already used torch may hang),
and end with the process that asked for them however that ends.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import default_threads, total_bytes
from edge_dtm.host.threads import torch_threads

SMALL_WEIGHTS = 10_000_000  # below that, starting processes takes as long as the work
OWN_BYTES = 2 * 10**9  # what the process that asks needs itself
_context: Any = None
Results = Iterator[tuple[Any, Any]]


@dataclass(frozen=True)
class Crew:
    """How many processes work, and on how many threads each."""

    processes: int
    threads: int


def crew(weights: int, task_bytes: int, wanted: int | None, device: torch.device) -> Crew:
    """Who works on so many weights: as many processes as there are cores, `wanted` or as fit the
    memory of the machine, free or not, so that the next run has as many. A GPU takes its work from
    one. EdgeDtmError when those that are wanted do not fit."""
    cores = default_threads()
    if device.type != "cpu":
        return Crew(1, cores)
    fitting = max(1, (total_bytes() - OWN_BYTES) // task_bytes)
    if wanted is not None and wanted > min(cores, fitting):
        raise EdgeDtmError(
            f"--workers {wanted}: {cores} CPUs may be used, and the memory holds {fitting} of "
            f"{task_bytes / 1e9:.1f} GB each; leave --workers out or ask for fewer"
        )
    if weights <= SMALL_WEIGHTS:
        return Crew(1, 1)
    count = wanted or min(cores, fitting)
    return Crew(count, max(1, cores // count))


def _start(context: Any, threads: int) -> None:
    global _context
    _context = context
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    parent = mp.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    wait([sentinel])
    os._exit(1)


def _call(function: Callable[[Any, Any], Any], task: Any) -> Any:
    return function(_context, task)


class Workers:
    """Runs function(context, task) for tasks; `workers` makes one."""

    def __init__(self, context: Any, crew: Crew, pool: ProcessPoolExecutor | None) -> None:
        self.context, self.crew, self._pool = context, crew, pool

    def run(self, function: Callable[[Any, Any], Any], tasks: Sequence[Any]) -> Results:
        """(task, result) of every task, as they become known.

        function and tasks are picklable. EdgeDtmError when a process is killed; what a function
        raises is raised here.
        """
        if self._pool is None:
            with torch_threads(self.crew.threads):
                for task in tasks:
                    yield task, function(self.context, task)
            return
        try:
            waiting = {self._pool.submit(_call, function, task): task for task in tasks}
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool:
            raise EdgeDtmError(
                f"one of {self.crew.processes} worker processes was killed, probably for want of memory: "
                "close other programs, or ask for fewer --workers, and run again; what was measured "
                "is kept"
            ) from None


@contextmanager
def workers(context: Any, crew: Crew) -> Iterator[Workers]:
    """Processes that have the context, which is picklable and sent once. For one no process is
    started."""
    if crew.processes == 1:
        yield Workers(context, crew, None)
        return
    kinds = mp.get_all_start_methods()
    method = mp.get_context("forkserver" if "forkserver" in kinds else "spawn")
    if "forkserver" in kinds:
        method.set_forkserver_preload([__name__, "edge_dtm.host.blocks.block_jobs"])
    before = set(mp.active_children())
    pool = ProcessPoolExecutor(crew.processes, method, _start, (context, crew.threads))
    done = False
    try:
        yield Workers(context, crew, pool)
        done = True
    finally:
        if not done:  # nobody wants what is still being worked on
            for process in set(mp.active_children()) - before:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
