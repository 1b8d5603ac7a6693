"""Measures this machine and writes its device profile.

The number that matters is the memory bandwidth that llama.cpp reaches while it decodes. It is
measured with llama.cpp: a model of random weights, far larger than the last-level cache, decodes
single tokens, and tokens per second times file size are bytes per second. This is the definition
that `edge_dtm.formats.profile` calculates with, and it holds the kernels' own speed as well as the
memory's. Plain reads of memory are measured beside it, as the upper bound.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import numpy as np

from edge_dtm.core import machine
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import write_whole
from edge_dtm.core.scratch import Scratch
from edge_dtm.device.cpu import (
    Build,
    Cpu,
    first_decode_in_child,
    read_cpu,
    read_text,
    repacked_types,
)
from edge_dtm.device.doctor import cpu_quota, physical_cores, usable_cpus
from edge_dtm.formats import ggml_types
from edge_dtm.formats.profile import SCHEMA_VERSION, DeviceProfile, load_profile
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp.runner import LlamaRunner

MODEL_BYTES = 256 * 10**6
CACHES = 4  # the measured bytes are at least as many times the last-level cache
REPEATS = 5
DECODE_TOKENS = 16
MEASURED_TYPES = ("Q4_0", "Q8_0")  # little and much memory for one multiplication
SAME_SPEED = 0.97  # of the best: then fewer threads do
# The matrices of TinyLlama 1.1B.
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 4, 256
# Whose choices (context, wanted speed, share, KV type) are taken over, with their sources.
CHOICES_FROM = "raspberrypi"

_ISA_NAMES = {"FP16_VA": "fp16", "MATMUL_INT8": "i8mm"}  # as in the packaged profiles

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rate:
    """Bytes per second with some number of threads; values: of each repetition."""

    threads: int
    values: tuple[float, ...]

    @property
    def bytes_per_s(self) -> float:
        return median(self.values)

    def __str__(self) -> str:
        return (
            f"{self.bytes_per_s / 1e9:.2f}e9 (median of {len(self.values)}, "
            f"{min(self.values) / 1e9:.2f} to {max(self.values) / 1e9:.2f})"
        )


@dataclass(frozen=True)
class Bandwidth:
    """What was measured: decoding by type with `threads` threads, the sweep that chose them (of the
    first type), plain reads, and the size of each model in bytes."""

    threads: int
    by_type: dict[str, Rate]
    sweep: tuple[Rate, ...]
    plain: Rate
    model_bytes: int

    @property
    def bytes_per_s(self) -> int:
        """The slower type's, so that a plan made with it is not too large."""
        return int(min(rate.bytes_per_s for rate in self.by_type.values()))


def detect(name: str, root: Path = Path("/"), progress: Progress | None = None) -> DeviceProfile:
    """Measure this machine, which takes about a minute, and return its profile.

    name: the profile's, such as default_name's. root: where proc and sys are.
    progress: called with stage, done, total. EdgeDtmError where Linux' /proc is missing, llama.cpp
    cannot run, or memory or disk do not suffice for measuring.
    """
    total = total_bytes(read_text(root / "proc/meminfo"))
    if not total:
        raise EdgeDtmError(
            "profiles detect reads /proc/meminfo, which is not there: write the profile by hand "
            "(docs/add-a-profile.md)"
        )
    build = first_decode_in_child(RunSettings(threads=1))
    there = machine.room(root)
    cpu = read_cpu(root)
    count = usable_cores(root)
    place = Path(tempfile.gettempdir())
    size = size_to_measure(
        cache_bytes(root), there.free_bytes, shutil.disk_usage(place).free, place
    )
    measured = measure(size, thread_counts(count), progress)
    return profile_of(
        name=check_name(name),
        board=board(root),
        cpu=cpu,
        build=build,
        ram_bytes=total,
        room=there,
        cores=count,
        measured=measured,
        date=datetime.date.today().isoformat(),
    )


def measure(
    model_bytes: int, threads: Sequence[int], progress: Progress | None = None
) -> Bandwidth:
    """Decode with models of about model_bytes; threads: the numbers to try, rising."""
    steps = len(threads) + len(MEASURED_TYPES)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress:
            progress("Decoding", done, steps)

    with Scratch("edge-dtm", Path(tempfile.gettempdir())) as folder:
        path = Path(folder) / "model.gguf"
        first, *others = MEASURED_TYPES
        write_model(path, first, model_bytes)
        sweep = []
        for count in threads:
            sweep.append(decoding_rate(path, count))
            advance()
        best = fewest_threads(sweep)
        by_type = {first: best}
        for name in others:
            write_model(path, name, model_bytes)
            by_type[name] = decoding_rate(path, best.threads)
            advance()
        size = path.stat().st_size
    plain = read_rate(model_bytes, best.threads)
    advance()
    return Bandwidth(best.threads, by_type, tuple(sweep), plain, size)


def fewest_threads(sweep: Sequence[Rate]) -> Rate:
    """The first of the rates, whose threads rise, that is as good as the best."""
    best = max(rate.bytes_per_s for rate in sweep)
    return next(rate for rate in sweep if rate.bytes_per_s >= SAME_SPEED * best)


def decoding_rate(path: Path, threads: int) -> Rate:
    """Bytes per second of decoding single tokens with the GGUF at path."""
    size = path.stat().st_size
    prompt = 4
    settings = RunSettings(threads=threads, parallel_sequences=1)
    with LlamaRunner(path, settings, prompt + DECODE_TOKENS) as llama:
        rates = [llama.measure_speed(prompt, DECODE_TOKENS)[1] for _ in range(REPEATS)]
    return Rate(threads, tuple(rate * size for rate in rates))


def read_rate(size_bytes: int, threads: int) -> Rate:
    """Bytes per second of the C library's memchr, each thread over a buffer of its own.

    memchr looks for a byte that is not there, so that it reads all of them and does little else.
    """
    memchr = ctypes.CDLL(None).memchr
    memchr.restype = ctypes.c_void_p
    memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    part = max(size_bytes // threads, 1)
    # Written to, because Linux maps all untouched pages to a single one.
    buffers = [np.full(part, 255, dtype=np.uint8) for _ in range(threads)]
    values = []
    for _ in range(REPEATS):
        start = threading.Barrier(threads + 1)

        def read(
            buffer: np.ndarray[tuple[int], np.dtype[np.uint8]], start: threading.Barrier
        ) -> None:
            start.wait()
            memchr(buffer.ctypes.data, 0, part)

        workers = [threading.Thread(target=read, args=(b, start)) for b in buffers]
        for worker in workers:
            worker.start()
        start.wait()
        began = time.perf_counter()
        for worker in workers:
            worker.join()
        values.append(part * threads / (time.perf_counter() - began))
    return Rate(threads, tuple(values))


def write_model(
    path: Path, type_name: str, size_bytes: int, hidden: int = HIDDEN, ffn: int = FFN
) -> None:
    """A Llama GGUF with random matrices of one type, of about size_bytes, at least one layer.

    Each matrix repeats a few rows that ggml quantized: the memory is real, and its numbers are
    ordinary ones. EdgeDtmError when the disk is full.
    """
    import gguf

    from edge_dtm.llamacpp import ggml

    kind = gguf.GGMLQuantizationType[type_name]
    kv = hidden // HEADS * KV_HEADS
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    layer = sum(
        rows * ggml_types.row_bytes(type_name, columns) for rows, columns in shapes.values()
    )
    layers = max(round(size_bytes / layer), 1)
    random = np.random.default_rng(0)
    blocks = {
        columns: ggml.quantize(
            type_name,
            (random.standard_normal((64, columns)) / np.sqrt(columns)).astype(np.float32),
            threads=1,
        )
        for columns in (hidden, ffn)
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(hidden // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")
    order: list[tuple[int, int] | None] = []  # the shape of a matrix, None for a norm

    def add(name: str, shape: tuple[int, int] | None) -> None:
        order.append(shape)
        if shape is None:
            writer.add_tensor_info(f"{name}.weight", (hidden,), np.dtype(np.float32), 4 * hidden)
        else:
            size = shape[0] * ggml_types.row_bytes(type_name, shape[1])
            writer.add_tensor_info(
                f"{name}.weight", shape, np.dtype(np.float32), size, raw_dtype=kind
            )

    add("token_embd", (VOCAB, hidden))
    add("output", (VOCAB, hidden))
    add("output_norm", None)
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{norm}", None)
        for name, shape in shapes.items():
            add(f"blk.{i}.{name}", shape)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for matrix in order:
            if matrix is None:
                writer.write_tensor_data(np.ones(hidden, dtype=np.float32))
            else:
                block = blocks[matrix[1]]
                writer.write_tensor_data(np.resize(block, (matrix[0], block.shape[1])))
    except OSError as error:
        raise EdgeDtmError(
            f"a model to measure with could not be written into {path.parent.parent} "
            f"({error.strerror or error}): free some space or set TMPDIR"
        ) from None
    finally:
        writer.close()


def thread_counts(cores: int) -> list[int]:
    """Numbers of threads worth trying: few gaps where a board's cores are few."""
    steps = [1, 2, 3, 4, 6, 8, 12]
    while steps[-1] < cores:
        steps.append(steps[-2] * 2)
    return sorted({min(n, cores) for n in steps if n < cores} | {cores})


def size_to_measure(
    cache_size_bytes: int, free_memory_bytes: int, free_disk_bytes: int, place: Path
) -> int:
    """Bytes of a model that caches cannot hold and that leaves the machine room.

    EdgeDtmError when memory or the disk at place do not suffice.
    """
    wanted = max(MODEL_BYTES, CACHES * cache_size_bytes)
    # llama.cpp keeps repacked weights beside the file.
    size = min(wanted, free_memory_bytes // 3)
    if size < 2 * cache_size_bytes or size < MODEL_BYTES // 8:
        raise EdgeDtmError(
            f"{free_memory_bytes / 1e6:,.0f} MB of free memory are too few to measure its "
            "bandwidth: stop other programs"
        )
    # A whole number of layers may take somewhat more.
    needed = size * 5 // 4
    if needed > free_disk_bytes:
        raise EdgeDtmError(
            f"measuring needs {needed / 1e6:,.0f} MB in {place}, {free_disk_bytes / 1e6:,.0f} "
            "are free: free some space or set TMPDIR"
        )
    return size


def cache_bytes(root: Path) -> int:
    """All last-level caches together, 0 where the kernel tells nothing."""
    sizes: dict[tuple[int, str], int] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, size = read_text(folder / "level").strip(), read_text(folder / "size").strip()
        found = re.fullmatch(r"(\d+)([KMG]?)", size)
        if level.isdigit() and found:
            factor = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[found[2]]
            shared = read_text(folder / "shared_cpu_list").strip()
            sizes[int(level), shared] = int(found[1]) * factor
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


def total_bytes(meminfo: str) -> int:
    """MemTotal of the text of /proc/meminfo, 0 without one."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def usable_cores(root: Path) -> int:
    """Physical cores that this process may use and its control group allows."""
    cpus = usable_cpus()
    count = physical_cores(root, cpus) or len(cpus)
    quota = cpu_quota(root)
    return count if quota is None else max(min(count, int(quota)), 1)


def board(root: Path) -> str:
    """The board's name in the device tree, empty on a machine without one."""
    return " ".join(read_text(root / "proc/device-tree/model").replace("\0", " ").split())


def default_name(board_name: str, cpu: Cpu) -> str:
    """`raspberry-pi-5-model-b-rev-1.0` of a board, else of the CPU."""
    return re.sub(r"[^a-z0-9.]+", "-", (board_name or cpu.name).lower()).strip("-.") or "device"


def check_name(name: str) -> str:
    """The name itself. EdgeDtmError when it could not be part of a file's name everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise EdgeDtmError(
            f"{name!r} is no name for a profile: take letters, digits, dots and hyphens"
        )
    return name


def profile_of(
    *,
    name: str,
    board: str,
    cpu: Cpu,
    build: Build,
    ram_bytes: int,
    room: machine.Room,
    cores: int,
    measured: Bandwidth,
    date: str,
) -> DeviceProfile:
    """What was found, with a sentence on how for every number. date: ISO 8601."""
    from edge_dtm.formats.plan import ALL_TYPES

    check_name(name)
    choices = load_profile(CHOICES_FROM)
    repacked = repacked_types(build.features)
    fast = tuple(t for t in ALL_TYPES if t in repacked)
    isa = tuple(_ISA_NAMES.get(f, f.lower()) for f in sorted(cpu.features) if f not in ("ARM_FMA",))
    llama = f"llama-cpp-python {build.version}" if build.version else "llama-cpp-python"
    compiled = ", ".join(sorted(build.features)) or "unknown features"
    speeds = "; ".join(f"{t} {rate}" for t, rate in measured.by_type.items())
    sweep = ", ".join(f"{r.threads}: {r.bytes_per_s / 1e9:.2f}e9" for r in measured.sweep)
    first = next(iter(measured.by_type))
    here = f"Measured on this machine on {date}"
    kept = ("n_ctx", "wanted_tokens_per_s", "max_share_of_f16", "kv_type")
    sources = {
        "ram_bytes": f"MemTotal of /proc/meminfo on this machine on {date}: what the kernel "
        "manages, without what the firmware keeps.",
        "reserve_bytes": f"{here}: ram_bytes minus what a process may still take, which "
        f"{room.limit} limited to {room.free_bytes} bytes; detect again when other programs run.",
        "effective_bandwidth_bytes_per_s": f"{here}: tokens per second times file size of "
        f"decoding in {llama} (compiled with {compiled}) with {_count(measured.threads, 'thread')} and models "
        f"of random weights of {measured.model_bytes / 1e6:.0f} MB, in bytes/s: {speeds}; the "
        f"slower one is taken. Plain reads of memory (memchr) with as many threads reached "
        f"{measured.plain}.",
        "cores": f"Physical cores that the process could use on {date}, by the kernel's topology "
        "and the limit of the control group.",
        "threads": f"{here}: the fewest threads that decode {first} within "
        f"{1 - SAME_SPEED:.0%} of the best, in bytes/s by threads: {sweep}.".replace("%", " %"),
        "isa_features": f"What the CPU ({cpu.name}) reports to the kernel.",
        "fast_types": f"ggml_repack_get_optimal_repack_type of llama.cpp "
        f"(ggml/src/ggml-cpu/repack.cpp) for what {llama} was compiled with on this machine."
        if fast
        else f"{llama} as it is compiled here repacks no type: the ones that were measured.",
    } | {key: choices.sources[key] for key in kept if key in choices.sources}
    what = board or cpu.name
    return DeviceProfile(
        schema_version=SCHEMA_VERSION,
        name=name,
        description=f"{what}, {ram_bytes / 1e9:.1f} GB, {_count(cores, 'core')}"
        + (f" ({cpu.name})" if board and cpu.name != cpu.machine else "")
        + f", CPU only, detected on {date}",
        ram_bytes=ram_bytes,
        reserve_bytes=max(ram_bytes - room.free_bytes, 1),
        effective_bandwidth_bytes_per_s=measured.bytes_per_s,
        cores=cores,
        threads=measured.threads,
        isa_features=isa or (cpu.machine.lower(),),
        fast_types=fast or MEASURED_TYPES,
        n_ctx=choices.n_ctx,
        wanted_tokens_per_s=choices.wanted_tokens_per_s,
        max_share_of_f16=choices.max_share_of_f16,
        kv_type=choices.kv_type,
        sources=sources,
    )


def to_toml(profile: DeviceProfile) -> str:
    """The text of a profile file; load_profile reads the same profile from it."""
    lines = [
        f"{item.name} = {_toml_value(getattr(profile, item.name))}"
        for item in fields(profile)
        if item.name != "sources"
    ]
    lines += ["", "[sources]"]
    lines += [f"{key} = {toml_string(text)}" for key, text in profile.sources.items()]
    return "\n".join(lines) + "\n"


def toml_string(text: str) -> str:
    """A TOML basic string. JSON's are the same, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: object) -> str:
    if isinstance(value, str):
        return toml_string(value)
    if isinstance(value, tuple):
        return f"[{', '.join(toml_string(str(item)) for item in value)}]"
    return repr(value)


def require_new(path: Path) -> None:
    """EdgeDtmError unless a new profile can be written to path, asked before measuring."""
    if path.suffix != ".toml":
        raise EdgeDtmError(f"{path} is no name for a profile: let it end in .toml")
    if os.path.lexists(path):
        raise EdgeDtmError(f"{path} exists already: give another name with -o, or remove it")
    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EdgeDtmError(f"{path} cannot be written: give a file in a folder that exists")


def save(profile: DeviceProfile, path: Path) -> None:
    """Write the profile file, which appears only once load_profile has read it back.

    EdgeDtmError as in require_new, and when the profile does not pass load_profile.
    """
    require_new(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.toml")
    try:
        write_whole(temporary, to_toml(profile).encode())
        # With a separator it is a path even when it looks like the name of a profile.
        if load_profile(str(temporary.resolve())) != profile:
            raise EdgeDtmError(f"{path} would not be read as it was detected: report this")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
