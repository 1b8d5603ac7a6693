"""What this process may still take of memory, and how freed buffers go back to the system."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 2**20  # mallopt(3), malloc.h


@dataclass(frozen=True)
class Room:
    """Bytes this process may still take, and what sets that limit, in words."""

    free_bytes: int
    limit: str


def read_text(path: Path) -> str:
    """A file of proc or sys, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def room(root: Path = Path("/")) -> Room:
    """The tightest of free memory, the control group's limit and this process's own (ulimit -v).

    root: where proc and sys are. Infinite room where the system tells nothing.
    """
    rooms = [Room(2**62, "nothing that can be read")]
    available = re.search(r"^MemAvailable:\s+(\d+)", read_text(root / "proc/meminfo"), re.MULTILINE)
    if available:
        rooms.append(Room(int(available[1]) * 1024, "free memory"))
    for folder, version_1 in control_groups(root, "memory"):
        free = _free_in_group(folder, version_1)
        if free is not None:
            rooms.append(Room(free, "the memory limit of the control group"))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        pages = int(read_text(root / "proc/self/statm").partition(" ")[0] or 0)
        free = max(soft - pages * os.sysconf("SC_PAGE_SIZE"), 0)
        rooms.append(Room(free, "the address space of this process (ulimit -v)"))
    return min(rooms, key=lambda r: r.free_bytes)


def control_groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's control group and those above it, and whether they are version 1."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            yield place, bool(controllers)
            if place == base:
                break


def _free_in_group(folder: Path, version_1: bool) -> int | None:
    """Bytes left of a control group's limit; None where it has none."""
    names = ("limit_in_bytes", "usage_in_bytes") if version_1 else ("max", "current")
    limit, used = (read_text(folder / f"memory.{name}").strip() for name in names)
    if not (limit.isdigit() and used.isdigit()) or int(limit) >= 2**60:
        return None
    # The page cache counts as used but gives way. Version 1 has the groups below in the total
    # only, version 2 in the plain figures.
    lines = re.findall(r"^(\w+) (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
    stat = {name: int(count) for name, count in lines}
    cache = ("inactive_file", "active_file")
    cache_bytes = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in cache)
    return max(int(limit) - int(used) + cache_bytes, 0)


def return_freed_buffers() -> bool:
    """Have large buffers go back to the system as soon as they are freed; False without glibc.

    By itself glibc counts a buffer as large only above the largest that was ever freed, and keeps
    what is smaller: 15 MB more at the peak of verify on SmolLM2, whose buffers of logits grow. It
    is a setting of the whole process that makes torch slower, hence for the device's commands.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES))
    except (OSError, TypeError, AttributeError):
        return False


def usable_cpus() -> list[int]:
    """Numbers of the CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def default_threads() -> int:
    """CPUs this process may use."""
    return len(usable_cpus())


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    # On Linux ru_maxrss survives exec: a small child of a large parent would look large.
    peak = re.search(r"^VmHWM:\s+(\d+)", read_text(Path("/proc/self/status")), re.MULTILINE)
    if peak:
        return int(peak[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest if sys.platform == "darwin" else largest * 1024)
