"""Memory before loading: the need against arithmetic and llama.cpp's own log, the room on made-up
roots of a file system."""

import json
import platform
import re
import resource
import subprocess
import sys

import numpy as np
import pytest

from edge_dtm.core import machine
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import Room, room
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp import gguf_header
from edge_dtm.llamacpp.gguf_header import need, require_memory
from edge_dtm.llamacpp.llama import LOG_VARIABLE
from edge_dtm.llamacpp.probe_model import LlamaShape, finish, llama_writer
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


def write_gguf(path, key_length=None):
    shape = LlamaShape(256, layers=3, heads=8, kv_heads=2, ffn=64, vocab=48, context_tokens=64)
    writer = llama_writer(path, shape)
    if key_length is not None:
        writer.add_key_length(key_length)
    writer.add_tensor("token_embd.weight", np.zeros((48, 256), dtype=np.float16))
    finish(writer)
    return path


def test_the_head_size_is_stated_or_follows_from_the_width(tmp_path):
    follows = need(write_gguf(tmp_path / "a.gguf"), ONE, 256)
    stated = need(write_gguf(tmp_path / "b.gguf", key_length=64), ONE, 256)
    assert follows.kv_bytes == 2 * 2 * 256 * 3 * 2 * 32
    assert stated.kv_bytes == 2 * follows.kv_bytes


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


def group(base, names, limit, used, stat):
    files = {names[0]: f"{limit}\n", names[1]: f"{used}\n", "stat": stat}
    return {f"{base}/memory.{name}": text for name, text in files.items() if text is not None}


def group_v2(folder, limit, used, stat="anon 5\nfile 9\ninactive_file 0\nactive_file 0\n"):
    return group(f"sys/fs/cgroup/{folder}", ("max", "current"), limit, used, stat)


def group_v1(folder, limit, used, stat=""):
    names = ("limit_in_bytes", "usage_in_bytes")
    return group(f"sys/fs/cgroup/memory/{folder}", names, limit, used, stat)


V1 = "5:cpu,cpuacct:/other\n4:memory:/pod/box\n1:name=systemd:/\n0::/\n"
V2 = "0::/pod/box\n"
NO_LIMIT_V1 = 9223372036854771712  # what version 1 says for none


def test_free_memory_is_what_is_available(root):
    write(root, **meminfo(1000))
    assert room(root) == Room(1000 * 1024, "free memory")


@pytest.mark.parametrize("text", ["", "MemAvailable: much kB\n", "MemFree: 5 kB\n"])
def test_what_cannot_be_read_limits_nothing(root, text):
    assert room(root).limit == "nothing that can be read"
    write(root, **{"proc/meminfo": text, "proc/self/cgroup": "garbage\n1:memory\n\n"})
    assert room(root).limit == "nothing that can be read" and room(root).free_bytes > 10**15


# inactive_file of version 1 leaves out the groups below, which usage_in_bytes counts.
CACHE_V1 = "inactive_file 0\nactive_file 0\ntotal_inactive_file 300\ntotal_active_file 200\n"
CACHE_V2 = "anon 100\nfile 500\ninactive_file 300\nactive_file 200\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        # The group's own limit, and one of a group above it, whichever leaves less.
        (V2, group_v2("pod/box", 5000, 1000) | group_v2("pod", 9000, 2000), 4000),
        (V2, group_v2("pod/box", 5000, 1000) | group_v2("pod", 9000, 8500), 500),
        (V2, group_v2("pod/box", "max", 1000) | group_v2("pod", 9000, 2000), 7000),
        (V1, group_v1("pod/box", 5000, 1000) | group_v1("pod", NO_LIMIT_V1, 2000), 4000),
        (V1, group_v1("pod/box", NO_LIMIT_V1, 1000) | group_v1("pod", 9000, 2000), 7000),
        # In a container the path is the host's, and the folder the container's.
        (V2, group_v2("", 3000, 1000), 2000),
        (V1, group_v1("", 3000, 1000), 2000),
        # More used than allowed is no negative room.
        (V2, group_v2("pod", 1000, 4000), 0),
        # The page cache gives way; without statistics it counts as used.
        (V2, group_v2("pod/box", 1000, 600, CACHE_V2), 900),
        (V1, group_v1("pod", 1000, 900, CACHE_V1), 600),
        (V2, group_v2("pod/box", 1000, 600, None), 400),
    ],
)
def test_the_limit_of_a_control_group(root, cgroup, files, free):
    write(root, **meminfo(10**6), **{"proc/self/cgroup": cgroup}, **files)
    assert room(root) == Room(free, "the memory limit of the control group")


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        (V2, group_v2("pod/b", 5, 0)),  # somebody else's
        (V1, group_v1("other", 5, 0)),  # of another controller
        (V1, group_v1("pod/box", NO_LIMIT_V1, 5)),
    ],
)
def test_what_is_no_limit_of_this_process(root, cgroup, files):
    write(root, **meminfo(10), **{"proc/self/cgroup": cgroup}, **files)
    assert room(root) == Room(10 * 1024, "free memory")


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
    least = need(tiny_gguf, MANY, 256).total_bytes
    monkeypatch.setattr(gguf_header, "room", lambda: Room(least, "x"))
    require_memory(tiny_gguf, MANY, 256)
    monkeypatch.setattr(gguf_header, "room", lambda: Room(least - 1, "the limit"))
    with pytest.raises(EdgeDtmError, match=r"gguf .*the limit"):
        require_memory(tiny_gguf, MANY, 256)


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
