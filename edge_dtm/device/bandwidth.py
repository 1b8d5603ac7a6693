"""Memory bandwidth while decoding: a random model, far larger than the caches, decodes single tokens.

Tokens per second times file size are bytes per second. Plain reads of memory, measured beside it,
are the upper bound.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import StageProgress
from edge_dtm.core.scratch import Scratch
from edge_dtm.formats import ggml_types
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp.llama_gguf import LlamaShape, llama_writer
from edge_dtm.llamacpp.runner import LlamaRunner

MODEL_BYTES = 256 * 10**6
CACHES = 4  # the measured bytes are at least as many times the last-level cache
REPEATS = 5
DECODE_TOKENS = 16
MEASURED_TYPES = ("Q4_0", "Q8_0")  # little and much memory for one multiplication
SAME_SPEED = 0.97  # of the best: then fewer threads do
# The matrices of TinyLlama 1.1B.
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 4, 256


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


def measure(
    model_bytes: int, threads: Sequence[int], progress: StageProgress | None = None
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
        llama.time_decoding(prompt, 2)  # the first touch of the weights
        timings = [llama.time_decoding(prompt, DECODE_TOKENS) for _ in range(REPEATS)]
    return Rate(threads, tuple(timing.decode_tokens_per_s * size for timing in timings))


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
    shape = LlamaShape(hidden, 1, HEADS, KV_HEADS, ffn, VOCAB, 512)
    matrices = shape.matrices()
    layer_bytes = sum(
        rows * ggml_types.row_bytes(type_name, columns) for rows, columns in matrices.values()
    )
    shape = replace(shape, layers=max(round(size_bytes / layer_bytes), 1))
    random = np.random.default_rng(0)
    blocks = {
        columns: ggml.quantize(
            type_name,
            (random.standard_normal((64, columns)) / np.sqrt(columns)).astype(np.float32),
            threads=1,
        )
        for columns in (hidden, ffn)
    }
    writer = llama_writer(path, shape)
    order: list[tuple[int, int] | None] = []  # the shape of a matrix, None for a norm

    def add(name: str, rows_columns: tuple[int, int] | None) -> None:
        order.append(rows_columns)
        if rows_columns is None:
            writer.add_tensor_info(f"{name}.weight", (hidden,), np.dtype(np.float32), 4 * hidden)
        else:
            size = rows_columns[0] * ggml_types.row_bytes(type_name, rows_columns[1])
            writer.add_tensor_info(
                f"{name}.weight", rows_columns, np.dtype(np.float32), size, raw_dtype=kind
            )

    add("token_embd", (VOCAB, hidden))
    add("output", (VOCAB, hidden))
    add("output_norm", None)
    for i in range(shape.layers):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{norm}", None)
        for name, rows_columns in matrices.items():
            add(f"blk.{i}.{name}", rows_columns)
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
