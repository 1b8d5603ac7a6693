"""What Linux says of this machine in /proc and /sys, and what this process may take of it.

`root` is the folder that stands for /.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import resource
import sys
from collections.abc import Iterator, Sequence
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


def meminfo(root: Path = Path("/")) -> dict[str, int]:
    """/proc/meminfo, in bytes; empty where it cannot be read."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    return {name: 1024 * int(kib) for name, kib in lines}


def room(root: Path = Path("/")) -> Room:
    """The tightest of free memory, the control group's limit and this process's own (ulimit -v).

    Infinite room where the system tells nothing.
    """
    rooms = [Room(2**62, "nothing that can be read")]
    if (available := meminfo(root).get("MemAvailable")) is not None:
        rooms.append(Room(available, "free memory"))
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


def total_bytes(root: Path = Path("/")) -> int:
    """Memory of the machine or of the control group, whichever is less, free or not: what a plan of
    the work may go by, since it does not change from run to run."""
    total = re.search(r"^MemTotal:\s+(\d+)", read_text(root / "proc/meminfo"), re.MULTILINE)
    sizes = [int(total[1]) * 1024 if total else 2**62]
    for folder, version_1 in control_groups(root, "memory"):
        limit = read_text(folder / f"memory.{'limit_in_bytes' if version_1 else 'max'}").strip()
        if limit.isdigit():
            sizes.append(int(limit))
    return min(sizes)


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


def default_threads(root: Path = Path("/")) -> int:
    """CPUs this process may use, by its affinity and the CPU time that its control group allows.

    root: where proc and sys are.
    """
    quotas = [
        quota
        for folder, version_1 in control_groups(root, "cpu")
        if (quota := _cpu_quota(folder, version_1)) is not None
    ]
    return max(1, min([len(usable_cpus()), *map(math.ceil, quotas)]))


def _cpu_quota(folder: Path, version_1: bool) -> float | None:
    """CPUs' worth of time that a control group allows; None where it sets no limit."""
    if version_1:
        quota, period = (read_text(folder / f"cpu.cfs_{n}_us").strip() for n in ("quota", "period"))
    else:
        quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")
    if not (quota.isdigit() and period.isdigit()):
        return None
    return int(quota) / max(int(period), 1)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    # On Linux ru_maxrss survives exec: a small child of a large parent would look large.
    peak = re.search(r"^VmHWM:\s+(\d+)", read_text(Path("/proc/self/status")), re.MULTILINE)
    if peak:
        return int(peak[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest if sys.platform == "darwin" else largest * 1024)


def cpu_quota(root: Path) -> float | None:
    """CPUs that the control group allows, the least of it and those above; None without limit."""
    quotas = []
    for folder, version_1 in control_groups(root, "cpu"):
        if version_1:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [read_text(folder / name).strip() for name in names]
        else:
            words = read_text(folder / "cpu.max").split()
        # "max" or -1 is no limit.
        if words and all(word.isdigit() for word in words):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def cpu_capacities(root: Path, cpus: Sequence[int]) -> list[int]:
    """The kernel's cpu_capacity (1024 is the fastest) of each CPU, empty where it has none."""
    return [int(text) for text in _of_each_cpu(root, cpus, "cpu_capacity") if text.isdigit()]


def physical_cores(root: Path, cpus: Sequence[int]) -> int:
    """Cores among these CPUs, 0 where the kernel tells nothing."""
    return len(set(_of_each_cpu(root, cpus, "topology/thread_siblings_list")))


def _of_each_cpu(root: Path, cpus: Sequence[int], name: str) -> list[str]:
    """The CPUs' files of that name, empty unless all of them have it."""
    folder = root / "sys/devices/system/cpu"
    texts = [read_text(folder / f"cpu{n}" / name).strip() for n in cpus]
    return texts if all(texts) else []


def file_system_of(place: Path, mounts: str) -> str:
    """The type of the file system that place is on. mounts: the text of /proc/mounts."""
    entries = re.findall(r"^\S+ (\S+) (\S+)", mounts, re.M)
    types = {Path(point.replace("\\040", " ")): name for point, name in entries}
    return next((types[p] for p in (place, *place.parents) if p in types), "")


def cache_bytes(root: Path) -> int:
    """All last-level caches together, 0 where the kernel tells nothing."""
    sizes: dict[tuple[int, str], int] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        names = ("level", "size", "shared_cpu_list")
        level, size, shared = (read_text(folder / name).strip() for name in names)
        if level.isdigit() and size.endswith("K"):
            sizes[int(level), shared] = 1024 * int(size.removesuffix("K"))
    last_level = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last_level)


def usable_cores(root: Path) -> int:
    """Physical cores that this process may use and its control group allows."""
    cpus = usable_cpus()
    count = physical_cores(root, cpus) or len(cpus)
    quota = cpu_quota(root)
    return count if quota is None else max(min(count, int(quota)), 1)


def board(root: Path) -> str:
    """The board's name in the device tree, empty on a machine without one."""
    return " ".join(read_text(root / "proc/device-tree/model").replace("\0", " ").split())
