"""One function over many tasks, on all cores: in processes, since Python threads that make many
small steps get in each other's way.

Processes come from a clean server process (a fork of one that has already used torch may hang),
end with the process that asked for them however that ends, and use one thread each, so that a
result does not depend on how many there are.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import default_threads, room
from edge_dtm.host.threads import one_torch_thread

_context: Any = None


def worker_count(tasks: int, bytes_each: int) -> int:
    """As many as there are tasks and cores that this process may use, and as fit the memory; at
    least one."""
    count = min(default_threads(), tasks)
    return max(1, min(count, room().free_bytes // max(bytes_each, 1)))


def _start(context: Any) -> None:
    global _context
    import torch

    _context = context
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    parent = mp.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    wait([sentinel])
    os._exit(1)


def _call(function: Callable[[Any, Any], Any], task: Any) -> Any:
    return function(_context, task)


def in_workers(
    function: Callable[[Any, Any], Any], context: Any, tasks: Sequence[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    """(task, function(context, task)) of every task, as they become known.

    function, context and tasks are picklable; the context is sent once. With one worker no process
    is started. EdgeDtmError when a process is killed; what a function raises is raised here.
    """
    if workers == 1:
        with one_torch_thread():
            for task in tasks:
                yield task, function(context, task)
        return
    kinds = mp.get_all_start_methods()
    method = mp.get_context("forkserver" if "forkserver" in kinds else "spawn")
    if "forkserver" in kinds:
        method.set_forkserver_preload([__name__, function.__module__])
    before = set(mp.active_children())
    pool = ProcessPoolExecutor(workers, method, _start, (context,))
    done = False
    try:
        waiting = {pool.submit(_call, function, task): task for task in tasks}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
        done = True
    except BrokenProcessPool:
        raise EdgeDtmError(
            f"one of {workers} worker processes was killed, probably for want of memory: close "
            "other programs and run again; what was measured is kept"
        ) from None
    finally:
        if not done:  # nobody wants what is still being worked on
            for process in set(mp.active_children()) - before:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
