"""Many files damaged at random, each read by the code that reads the real ones.

A file has to be accepted, or refused with one printable line, within limits of time, memory and
disk, and nothing may be left behind. All else is a finding. The same seed gives the same inputs.
The inputs of a target run in a child process, which is started again after an input that kills it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from break_it.targets import DISK_LIMIT_BYTES, Target, targets
from edge_dtm.core.errors import EdgeDtmError

ROOT = Path(__file__).resolve().parents[2]
CPU_LIMIT_S, WALL_LIMIT_S = 5, 180  # the second for what waits and does not compute
MEMORY_LIMIT_BYTES = 384 * 2**20  # above what the process has before
MESSAGE_LIMIT = 1000  # characters; one line of a terminal is 100
EXAMPLES = 2  # inputs that are written of each kind of finding
ACCEPTED, REFUSED = "accepted", "refused"


@dataclass
class Result:
    """Counts of one target; slowest_ms: CPU time. findings: (index, what happened, in detail)."""

    name: str
    accepted: int = 0
    refused: int = 0
    slowest_ms: float = 0.0
    findings: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused + len(self.findings)


def input_bytes(target: Target, seed: int, index: int) -> bytes:
    return target.make(random.Random(f"{seed}/{target.name}/{index}"))


def outcome(target: Target, data: bytes, folder: Path) -> tuple[str, str]:
    """("accepted" or "refused" or what happened instead, details)."""
    try:
        target.read(data, folder)
        result = (ACCEPTED, "")
    except EdgeDtmError as error:
        result = (REFUSED, str(error))
        if not result[1].isprintable():
            result = ("a message that is not one printable line", ascii(result[1][:300]))
        elif len(result[1]) > MESSAGE_LIMIT:
            result = (f"a message above {MESSAGE_LIMIT} characters", ascii(result[1][:300]))
    except Exception as error:
        result = (f"{type(error).__name__} in {_place(error)}", ascii(str(error)[:300]))
    left = sorted(p.name for p in folder.iterdir() if p.name != "input")
    for name in left:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left and result[0] in (ACCEPTED, REFUSED):
        result = (f"{result[0]}, but {', '.join(left)} left behind", result[1])
    return result


def _place(error: BaseException) -> str:
    """The innermost line that is the project's own."""
    found, trace = "?", error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if ROOT in path.parents:
            found = f"{path.relative_to(ROOT)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


_OWN_FAILURE = 70  # EX_SOFTWARE of sysexits.h
_STATE = struct.Struct("<QQQd")  # index of the input at work, accepted, refused, slowest ms


def run(
    target: Target,
    count: int,
    seed: int,
    folder: Path,
    cpu_limit_s: float = CPU_LIMIT_S,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Result:
    """Inputs 0 to count - 1 in child processes; folder: an empty one to work in."""
    result = Result(target.name)
    state = mmap.mmap(-1, _STATE.size)
    start = 0
    while start < count:
        state[:] = _STATE.pack(start, 0, 0, 0.0)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            code = _OWN_FAILURE
            try:
                _limit(memory_limit_bytes)
                _child(target, start, count, seed, folder, state, writer, cpu_limit_s)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                # Not exit: what the parent registered is the parent's.
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader) as lines:
            result.findings += [(int(i), kind, words) for i, kind, words in map(json.loads, lines)]
        _, status = os.waitpid(child, 0)
        index, accepted, refused, slowest = _STATE.unpack(state[:])
        result.accepted += accepted
        result.refused += refused
        result.slowest_ms = max(result.slowest_ms, slowest)
        start = count
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _OWN_FAILURE:
            raise RuntimeError(f"{target.name}: the tool itself failed behind input {index}")
        if status:
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            words = {
                signal.SIGPROF: f"took more than {cpu_limit_s:g} s of CPU time",
                signal.SIGALRM: f"took more than {WALL_LIMIT_S} s",
                0: f"ended the process with status {os.waitstatus_to_exitcode(status)}",
            }
            died = f"died of {signal.Signals(number).name}" if number else ""
            result.findings.append((index, words.get(number, died), ""))
            start = index + 1
        for item in folder.iterdir():
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    return result


def _limit(memory_limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # a test runner's; the parent says what happened
    # A write beyond it is then an error like that of a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK_LIMIT_BYTES, DISK_LIMIT_BYTES))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + memory_limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # The default action, which ends the process, also ends what loops inside a C library.
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)


def _child(
    target: Target,
    start: int,
    count: int,
    seed: int,
    folder: Path,
    state: mmap.mmap,
    writer: int,
    cpu_limit_s: float,
) -> None:
    tempfile.tempdir = str(folder)
    # numpy's, about numbers that a file made up.
    warnings.simplefilter("ignore")
    accepted = refused = 0
    slowest = 0.0
    for index in range(start, count):
        data = input_bytes(target, seed, index)
        state[:] = _STATE.pack(index, accepted, refused, slowest)
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        signal.setitimer(signal.ITIMER_REAL, WALL_LIMIT_S)
        before = time.process_time()
        kind, words = outcome(target, data, folder)
        slowest = max(slowest, 1000 * (time.process_time() - before))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        accepted += kind == ACCEPTED
        refused += kind == REFUSED
        if kind not in (ACCEPTED, REFUSED):
            os.write(writer, (json.dumps([index, kind, words]) + "\n").encode())
    state[:] = _STATE.pack(count, accepted, refused, slowest)


def shares(found: Sequence[Target], inputs: int) -> list[int]:
    """How many inputs each target gets: by its share, inputs or a few more in all."""
    total = sum(t.share for t in found)
    return [-int(-inputs * t.share // total) for t in found]


def report(results: Sequence[Result]) -> list[str]:
    """A Markdown table."""
    out = ["| target | inputs | accepted | refused | findings | slowest, CPU ms |"]
    out.append("|---|---:|---:|---:|---:|---:|")
    total = Result("all")
    for r in results:
        total.accepted += r.accepted
        total.refused += r.refused
        total.findings += r.findings
        total.slowest_ms = max(total.slowest_ms, r.slowest_ms)
    for r in (*results, total):
        out.append(
            f"| {r.name} | {r.inputs:,} | {r.accepted:,} | {r.refused:,} | {len(r.findings):,} | "
            f"{r.slowest_ms:.0f} |"
        )
    return out


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in name).replace("--", "-")


def replay(path: Path) -> int:
    """Read again an input that an earlier run wrote. Returns the exit status."""
    with _work_folder() as (known, folder):
        name = path.name.rpartition("-")[0]
        target = next((t for t in known if _slug(t.name) == name), None)
        if target is None:
            names = ", ".join(_slug(t.name) for t in known)
            raise EdgeDtmError(f"{path} names no target: one of {names}, then -NUMBER.bin")
        kind, words = outcome(target, path.read_bytes(), folder)
    print(f"{kind}: {words}" if words else kind)
    return int(kind not in (ACCEPTED, REFUSED))


def run_all(inputs: int, seed: int, out: Path) -> int:
    """Try all targets, print a table, write examples of findings to out. Returns the exit status."""
    results = []
    with _work_folder() as (known, folder):
        for target, count in zip(known, shares(known, inputs), strict=True):
            result = run(target, count, seed, folder)
            results.append(result)
            for kind, times in Counter(kind for _, kind, _ in result.findings).most_common():
                examples = [(i, words) for i, k, words in result.findings if k == kind]
                for index, words in examples[:EXAMPLES]:
                    out.mkdir(parents=True, exist_ok=True)
                    path = out / f"{_slug(target.name)}-{index}.bin"
                    path.write_bytes(input_bytes(target, seed, index))
                    print(f"{path}: {kind}: {words}", file=sys.stderr, flush=True)
                print(f"{target.name}: {times} times: {kind}", file=sys.stderr, flush=True)
    print("\n".join(report(results)))
    return int(any(r.findings for r in results))


@contextlib.contextmanager
def _work_folder() -> Iterator[tuple[list[Target], Path]]:
    """All targets, and an empty folder to read inputs in; in memory where that is possible."""
    memory_files = Path("/dev/shm")
    place = memory_files if os.access(memory_files, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="edge-dtm-fuzz-", dir=place) as name:
        folder = Path(name) / "run"
        folder.mkdir()
        yield targets(Path(name)), folder
