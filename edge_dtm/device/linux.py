"""What Linux says of this machine in /proc and /sys. `root` is the folder that stands for /."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from edge_dtm.core.machine import control_groups, read_text


def program_output(words: Sequence[str]) -> str:
    """What a program of the system prints, empty when it is not there or fails."""
    try:
        return subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


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
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def cpu_capacities(root: Path, cpus: Sequence[int]) -> list[int]:
    """The kernel's cpu_capacity (1024 is the fastest) of each CPU, empty where it has none."""
    folder = root / "sys/devices/system/cpu"
    texts = [read_text(folder / f"cpu{n}/cpu_capacity").strip() for n in cpus]
    return [int(t) for t in texts] if texts and all(t.isdigit() for t in texts) else []


def physical_cores(root: Path, cpus: Sequence[int]) -> int:
    """Cores among these CPUs, 0 where the kernel tells nothing."""
    folder = root / "sys/devices/system/cpu"
    siblings = [read_text(folder / f"cpu{n}/topology/thread_siblings_list").strip() for n in cpus]
    return len(set(siblings)) if siblings and all(siblings) else 0


def usable_cpus() -> list[int]:
    """Numbers of the CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def file_system_of(place: Path, mounts: str) -> str:
    """The type of the file system that place is on. mounts: the text of /proc/mounts."""
    best, name = -1, ""
    for line in mounts.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        point = Path(words[1].replace("\\040", " "))
        if place.is_relative_to(point) and len(point.parts) >= best:
            best, name = len(point.parts), words[2]
    return name


def cache_bytes(root: Path) -> int:
    """All last-level caches together, 0 where the kernel tells nothing."""
    sizes: dict[tuple[int, str], int] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, size = read_text(folder / "level").strip(), read_text(folder / "size").strip()
        number = re.fullmatch(r"(\d+)([KMG]?)", size)
        if level.isdigit() and number:
            factor = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[number[2]]
            shared = read_text(folder / "shared_cpu_list").strip()
            sizes[int(level), shared] = int(number[1]) * factor
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


def total_bytes(meminfo: str) -> int:
    """MemTotal of the text of /proc/meminfo, 0 without one."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    return 1024 * int(total[1]) if total else 0


def usable_cores(root: Path) -> int:
    """Physical cores that this process may use and its control group allows."""
    cpus = usable_cpus()
    count = physical_cores(root, cpus) or len(cpus)
    quota = cpu_quota(root)
    return count if quota is None else max(min(count, int(quota)), 1)


def board(root: Path) -> str:
    """The board's name in the device tree, empty on a machine without one."""
    return " ".join(read_text(root / "proc/device-tree/model").replace("\0", " ").split())
