"""What this process may still take of memory, and how freed buffers go back to the system."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# mallopt(3), malloc.h
_M_MMAP_THRESHOLD = -3


_LARGE_BYTES = 2**20


@dataclass(frozen=True)
class Room:
    """Bytes this process may still take, and what sets that limit, in words."""

    free_bytes: int
    limit: str


def room(root: Path = Path("/")) -> Room:
    """The tightest of free memory, the control group's limit and this process's own (ulimit -v).

    root: where proc and sys are. Infinite room where the system tells nothing.
    """
    rooms = [Room(2**62, "nothing that can be read")]
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                rooms.append(Room(int(line.split()[1]) * 1024, "free memory"))
    except (OSError, ValueError, IndexError):
        pass
    rooms += _cgroup_rooms(root)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        try:
            pages = int((root / "proc/self/statm").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            pages = 0
        taken = pages * os.sysconf("SC_PAGE_SIZE")
        rooms.append(Room(max(soft - taken, 0), "the address space of this process (ulimit -v)"))
    return min(rooms, key=lambda r: r.free_bytes)


def control_groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's control group and those above it, and whether they are version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            yield place, bool(controllers)
            if place == base:
                break


def _cgroup_rooms(root: Path) -> list[Room]:
    rooms = []
    for folder, version_1 in control_groups(root, "memory"):
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if version_1
            else ("memory.max", "memory.current")
        )
        try:
            limit = (folder / names[0]).read_text().strip()
            used = int((folder / names[1]).read_text())
        except (OSError, ValueError):
            continue
        used -= _page_cache_bytes(folder / "memory.stat")
        if limit.isdigit() and int(limit) < 2**60:
            free = max(int(limit) - used, 0)
            rooms.append(Room(free, "the memory limit of the control group"))
    return rooms


def _page_cache_bytes(path: Path) -> int:
    """It counts as used but gives way. Version 1 has the groups below in the total only, version 2
    in the plain figures."""
    try:
        stat = dict(item.split() for item in path.read_text().splitlines())
        return sum(
            int(stat.get(f"total_{name}", stat.get(name, 0)))
            for name in ("inactive_file", "active_file")
        )
    except (OSError, ValueError):
        return 0


def return_freed_buffers() -> bool:
    """Have large buffers go back to the system as soon as they are freed; False where malloc has no
    such setting (it is glibc's).

    By itself glibc counts a buffer as large only above the largest that was ever freed, up to 32
    MiB, and keeps what is smaller. llama.cpp takes a larger buffer of logits when a call wants more
    of them, and the smaller one would stay: 15 MB more at the peak of verify on SmolLM2. It is a
    setting of the whole process, and one that makes torch slower, hence for the device's commands.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES))
    except (OSError, TypeError, AttributeError):
        return False


def default_threads() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(len(os.sched_getaffinity(0)), 1)
    return os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    try:
        # On Linux ru_maxrss survives exec: a small child of a large parent would look large.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
