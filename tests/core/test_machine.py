"""What /proc and /sys say, by made-up files."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.boards import put

from edge_dtm.core import machine as module
from edge_dtm.core.machine import (
    cache_bytes,
    cpu_quota,
    file_system_of,
    meminfo,
    usable_cores,
)


def test_caches(tmp_path: Path) -> None:
    assert cache_bytes(tmp_path) == 0
    for n in range(4):
        caches = {
            0: ("1", "32K", f"{n}"),
            2: ("2", "1024K", f"{n}"),
            3: ("3", "8192K", f"{n // 2}"),
        }
        for index, (level, size, shared) in caches.items():
            folder = f"sys/devices/system/cpu/cpu{n}/cache/index{index}"
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                put(tmp_path, f"{folder}/{name}", text + "")
    assert cache_bytes(tmp_path) == 2 * 8 * 2**20  # two chips with a cache each


def test_cores_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_cpus", lambda: [0, 1, 2, 3])
    assert usable_cores(tmp_path) == 4
    for n in range(4):
        put(tmp_path, f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list", f"{n % 2}")
    assert usable_cores(tmp_path) == 2
    put(tmp_path, "proc/self/cgroup", "0::/")
    put(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000")
    assert usable_cores(tmp_path) == 1


def test_memory_of_the_machine(tmp_path: Path) -> None:
    assert meminfo(tmp_path) == {}
    put(tmp_path, "proc/meminfo", "MemTotal:        8245032 kB\nHugePages_Total: 3\nX: much kB")
    assert meminfo(tmp_path) == {"MemTotal": 8245032 * 1024}


def test_file_systems() -> None:
    mounts = (
        "/dev/root / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/sda /mnt/a\\040b xfs rw 0 0\nbad\n"
    )
    assert file_system_of(Path("/tmp/x"), mounts) == "tmpfs"
    assert file_system_of(Path("/tmpfoo"), mounts) == "ext4"
    assert file_system_of(Path("/mnt/a b/c"), mounts) == "xfs"
    assert file_system_of(Path("/mnt"), "") == ""


def test_quotas(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "4:memory:/x\n3:cpu,cpuacct:/x\n0::/a/b")
    put(tmp_path, "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1")
    put(tmp_path, "sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000")
    put(tmp_path, "sys/fs/cgroup/a/b/cpu.max", "max 100000")
    assert cpu_quota(tmp_path) is None
    put(tmp_path, "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "200000")
    assert cpu_quota(tmp_path) == 2
    put(tmp_path, "sys/fs/cgroup/a/cpu.max", "150000 100000")
    assert cpu_quota(tmp_path) == 1.5
    assert cpu_quota(tmp_path / "none") is None
