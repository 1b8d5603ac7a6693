"""Memory before loading: the need against arithmetic and llama.cpp's own log, the room on made-up
roots of a file system."""

import json
import platform
import re
import resource
import subprocess
import sys

import gguf
import numpy as np
import pytest

from edge_dtm.core import machine
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import Room, room
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp import memory
from edge_dtm.llamacpp.llama import LOG_VARIABLE
from edge_dtm.llamacpp.memory import need, require_memory
from edge_dtm.llamacpp.runner import LlamaRunner

VOCABULARY = 303
ONE = RunSettings(threads=1, batch_tokens=64, parallel_sequences=1)
MANY = RunSettings(threads=1, batch_tokens=64)


# --- need -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_type", "bytes_of_32"),
    [("F16", 32 * 2), ("F32", 32 * 4), ("Q8_0", 32 + 2), ("Q4_0", 16 + 2)],
)
def test_need_of_a_model_whose_layers_are_alike(tiny_gguf, kv_type, bytes_of_32):
    settings = RunSettings(threads=1, batch_tokens=64, parallel_sequences=1, kv_type=kv_type)
    needed = need(tiny_gguf, settings, context_tokens=256)
    # Keys and values of two layers, with two heads of 64 values each.
    per_token = 2 * 2 * 64 * 2 // 32 * bytes_of_32
    assert needed.kv_bytes == 256 * per_token
    assert needed.file_bytes == len(tiny_gguf.read_bytes())
    assert needed.total_bytes == needed.file_bytes + needed.kv_bytes + needed.buffer_bytes


@pytest.mark.parametrize("settings", [ONE, MANY], ids=["one sequence", "many sequences"])
@pytest.mark.parametrize("context", [256, 300, 512])
def test_need_is_what_llama_cpp_allocates(tiny_gguf, settings, context, monkeypatch, capsys):
    """llama.cpp rounds the cells up to a multiple of 256."""
    monkeypatch.setenv(LOG_VARIABLE, "1")
    with LlamaRunner(tiny_gguf, settings, context):
        pass
    log = capsys.readouterr().err

    def logged(name):
        found = re.findall(rf"{name} buffer size\s*=\s*([0-9.]+) MiB", log)
        assert found, log[-2000:]
        return sum(map(float, found)) * 2**20

    needed, rounding = need(tiny_gguf, settings, context), 0.005 * 2**20
    assert abs(needed.kv_bytes - logged("KV")) <= rounding
    assert needed.buffer_bytes >= logged("output") + logged("compute") - 2 * rounding
    assert needed.buffer_bytes >= settings.logits_bytes(VOCABULARY)


def write_gguf(path, *, key_length=None, heads, kv_heads, layers, width, vocab=48):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    if key_length is not None:
        writer.add_key_length(key_length)
    writer.add_tensor("token_embd.weight", np.zeros((vocab, width), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_head_size_is_stated_or_follows_from_the_width(tmp_path):
    shape = {"heads": 8, "kv_heads": 2, "layers": 3, "width": 256}
    follows = write_gguf(tmp_path / "a.gguf", **shape)
    stated = write_gguf(tmp_path / "b.gguf", key_length=64, **shape)
    assert need(follows, ONE, 256).kv_bytes == 2 * 2 * 256 * 3 * 2 * 32
    assert need(stated, ONE, 256).kv_bytes == 2 * need(follows, ONE, 256).kv_bytes


def test_logits_follow_the_vocabulary(tmp_path):
    shape = {"heads": 8, "kv_heads": 2, "layers": 3, "width": 256}
    small = need(write_gguf(tmp_path / "a.gguf", vocab=48, **shape), ONE, 256)
    large = need(write_gguf(tmp_path / "b.gguf", vocab=4048, **shape), ONE, 256)
    assert large.buffer_bytes - small.buffer_bytes >= ONE.batch_tokens * 4000 * 4
    assert large.kv_bytes == small.kv_bytes


# --- room -----------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty root; this process has no limit of its own."""
    endless = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: endless)
    return tmp_path


def write(root, **files):
    """Text by the path below root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def meminfo(available_kib):
    return {
        "proc/meminfo": f"MemTotal: 9999 kB\nMemFree:  7 kB\nMemAvailable:  {available_kib} kB\n"
    }


def group_v2(folder, limit, used, stat="anon 5\nfile 9\ninactive_file 0\nactive_file 0\n"):
    base = f"sys/fs/cgroup/{folder}"
    return {
        f"{base}/memory.max": f"{limit}\n",
        f"{base}/memory.current": f"{used}\n",
        f"{base}/memory.stat": stat,
    }


def group_v1(folder, limit, used, stat=""):
    base = f"sys/fs/cgroup/memory/{folder}"
    return {
        f"{base}/memory.limit_in_bytes": f"{limit}\n",
        f"{base}/memory.usage_in_bytes": f"{used}\n",
        f"{base}/memory.stat": stat,
    }


V1 = "5:cpu,cpuacct:/other\n4:memory:/pod/box\n1:name=systemd:/\n0::/\n"
NO_LIMIT_V1 = 9223372036854771712  # what version 1 says for none


def test_free_memory_is_what_is_available(root):
    write(root, **meminfo(1000))
    assert room(root) == Room(1000 * 1024, "free memory")


@pytest.mark.parametrize(
    "text", ["", "MemAvailable:\n", "MemAvailable: much kB\n", "MemFree: 5 kB\n"]
)
def test_what_cannot_be_read_limits_nothing(root, text):
    assert room(root).limit == "nothing that can be read"
    write(root, **{"proc/meminfo": text, "proc/self/cgroup": "garbage\n1:memory\n\n"})
    found = room(root)
    assert found.limit == "nothing that can be read" and found.free_bytes > 10**15


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        # The group's own limit, and one of a group above it, whichever leaves less.
        ([("pod/box", 5000, 1000), ("pod", 9000, 2000), ("", "max", 9)], 4000),
        ([("pod/box", 5000, 1000), ("pod", 9000, 8500), ("", "max", 9)], 500),
        ([("pod/box", "max", 1000), ("pod", 9000, 2000)], 7000),
        # The root of a container that sees its own group as the root.
        ([("", 3000, 1000)], 2000),
        # More used than allowed is no negative room.
        ([("pod", 1000, 4000)], 0),
    ],
)
def test_the_groups_of_version_2(root, groups, free):
    write(root, **meminfo(10**6), **{"proc/self/cgroup": "0::/pod/box\n"})
    for folder, limit, used in groups:
        write(root, **group_v2(folder, limit, used))
    assert room(root) == Room(free, "the memory limit of the control group")


def test_a_group_of_somebody_else_does_not_count(root):
    write(root, **meminfo(10), **{"proc/self/cgroup": "0::/pod/box\n"}, **group_v2("pod/b", 5, 0))
    assert room(root) == Room(10 * 1024, "free memory")


def test_the_page_cache_gives_way(root):
    stat = "anon 100\nfile 500\ninactive_file 300\nactive_file 200\n"
    write(root, **{"proc/self/cgroup": "0::/box\n"}, **group_v2("box", 1000, 600, stat))
    assert room(root).free_bytes == 1000 - (600 - 500)


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        ([("pod/box", 5000, 1000), ("pod", NO_LIMIT_V1, 2000), ("", NO_LIMIT_V1, 3000)], 4000),
        ([("pod/box", NO_LIMIT_V1, 1000), ("pod", 9000, 2000)], 7000),
        # In a container the path is the host's, and the folder the container's.
        ([("", 3000, 1000)], 2000),
    ],
)
def test_the_groups_of_version_1(root, groups, free):
    write(root, **meminfo(10**6), **{"proc/self/cgroup": V1})
    for folder, limit, used in groups:
        write(root, **group_v1(folder, limit, used))
    # The group of another controller limits no memory.
    write(root, **group_v1("other", 1, 0), **group_v2("", "max", 9))
    assert room(root) == Room(free, "the memory limit of the control group")


def test_no_limit_of_version_1_is_not_read_as_one(root):
    write(root, **meminfo(10), **{"proc/self/cgroup": V1}, **group_v1("pod/box", NO_LIMIT_V1, 5))
    assert room(root) == Room(10 * 1024, "free memory")


def test_the_page_cache_of_groups_below_gives_way_in_version_1_too(root):
    """usage_in_bytes counts the groups below, inactive_file does not; total_inactive_file does."""
    stat = "inactive_file 0\nactive_file 0\ntotal_inactive_file 300\ntotal_active_file 200\n"
    write(root, **{"proc/self/cgroup": V1}, **group_v1("pod", 1000, 900, stat))
    assert room(root).free_bytes == 1000 - (900 - 500)


def test_a_limit_counts_without_its_statistics(root):
    """Not every sandbox has memory.stat; the cache then counts as used, which is on the safe side."""
    write(root, **meminfo(10**6), **{"proc/self/cgroup": "0::/box\n"}, **group_v2("box", 1000, 600))
    (root / "sys/fs/cgroup/box/memory.stat").unlink()
    assert room(root) == Room(400, "the memory limit of the control group")


def test_the_tightest_of_all_counts(root, monkeypatch):
    write(root, **meminfo(100), **{"proc/self/cgroup": "0::/box\n"}, **group_v2("box", 90_000, 5))
    assert room(root).limit == "the memory limit of the control group"
    write(root, **{"proc/self/statm": "3 2 1 0 0 0 0\n"})
    limit = 3 * resource.getpagesize() + 1234
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    assert room(root) == Room(1234, "the address space of this process (ulimit -v)")
    write(root, **meminfo(1))
    assert room(root) == Room(1024, "free memory")


# --- require_memory -------------------------------------------------------------------------


def test_too_little_memory(tiny_gguf, monkeypatch):
    place = Room(
        need(tiny_gguf, MANY, 256).total_bytes - 1, "the memory limit of the control group"
    )
    monkeypatch.setattr(memory, "room", lambda: place)
    with pytest.raises(EdgeDtmError, match=rf"model\.gguf .*{place.limit}"):
        require_memory(tiny_gguf, MANY, 256)


def test_just_enough_memory_is_enough(tiny_gguf, monkeypatch):
    monkeypatch.setattr(memory, "room", lambda: Room(need(tiny_gguf, MANY, 256).total_bytes, "x"))
    require_memory(tiny_gguf, MANY, 256)


LIMITED = """
import json, resource, sys
from pathlib import Path
import gguf
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import room
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp import ggml
from edge_dtm.llamacpp.memory import require_memory
path, settings = Path(sys.argv[1]), RunSettings(threads=1, batch_tokens=64)
require_memory(path, settings, 256)
taken = next(
    int(line.split()[1]) * 1024
    for line in Path("/proc/self/status").read_text().splitlines()
    if line.startswith("VmSize:")
)
resource.setrlimit(resource.RLIMIT_AS, (taken + 32_000_000, resource.RLIM_INFINITY))
found = room()
try:
    require_memory(path, settings, 256)
    message = None
except EdgeDtmError as error:
    message = str(error)
print(json.dumps([found.free_bytes, found.limit, message]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_address_space_of_a_real_process_is_a_limit(tiny_gguf):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tiny_gguf)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    free_bytes, limit, message = json.loads(done.stdout)
    assert limit == "the address space of this process (ulimit -v)"
    assert 24_000_000 < free_bytes <= 32_000_000
    assert message is not None and message.startswith("too little memory") and limit in message


FREED = """
import json, sys
import numpy as np
from edge_dtm.core.machine import return_freed_buffers

def resident_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))

done = return_freed_buffers() if sys.argv[1] == "with" else None
np.ones(3 * 2**20)  # 24 MiB, freed at once: from here on glibc takes less than that from its heap
before = resident_bytes()
buffers = [np.ones(2 * 2**20 + i) for i in range(4)]  # 16 MiB each
last = np.ones(50_000)  # lies behind them, where they are in the heap
del buffers[:]
print(json.dumps([done, resident_bytes() - before]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_buffers_go_back_to_the_system():
    def grown(how):
        done = subprocess.run(
            [sys.executable, "-c", FREED, how], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    done, with_it = grown("with")
    assert done is True and with_it < 4 * 2**20
    assert grown("without")[1] > 60 * 2**20  # else this test shows nothing
