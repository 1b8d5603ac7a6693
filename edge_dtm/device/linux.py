"""What Linux says of this machine in /proc and /sys. `root` is the folder that stands for /."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edge_dtm.core.machine import control_groups, read_text, usable_cpus


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
