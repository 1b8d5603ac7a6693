"""Memory bandwidth while decoding: a random model, far larger than the caches, decodes single tokens.

Tokens per second times file size are bytes per second: the definition that
`edge_dtm.formats.profile` calculates with. It holds the kernels' own speed as well as the memory's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import StageProgress, no_progress, scratch_folder
from edge_dtm.formats import ggml_types
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp.probe_model import LlamaShape, finish, llama_writer
from edge_dtm.llamacpp.runner import LlamaRunner

MODEL_BYTES = 256 * 10**6
CACHES = 4  # the measured bytes are at least as many times the last-level cache
REPEATS = 5
DECODE_TOKENS = 16
MEASURED_TYPES = ("Q4_0", "Q8_0")  # little and much memory for one multiplication
SAME_SPEED = 0.97  # of the best: then fewer threads do
# The matrices of TinyLlama 1.1B.
TINY_LLAMA = LlamaShape(2048, 1, 32, 4, 5632, 256, 512)


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
    """Decoding by type with `threads` threads, the sweep that chose them (of the first type), and
    the size of each model in bytes."""

    threads: int
    by_type: dict[str, Rate]
    sweep: tuple[Rate, ...]
    model_bytes: int

    @property
    def bytes_per_s(self) -> int:
        """The slower type's, so that a plan made with it is not too large."""
        return int(min(rate.bytes_per_s for rate in self.by_type.values()))


def measure(
    model_bytes: int, threads: Sequence[int], progress: StageProgress = no_progress
) -> Bandwidth:
    """Decode with models of about model_bytes; threads: the numbers to try, rising."""
    first, *others = MEASURED_TYPES
    advance = progress("Decoding", len(threads) + len(others))
    with scratch_folder() as folder:
        path = folder / "model.gguf"

        def rate(count: int) -> Rate:
            rate = decoding_rate(path, count)
            advance(1)
            return rate

        write_model(path, first, model_bytes)
        sweep = tuple(rate(count) for count in threads)
        best = fewest_threads(sweep)
        by_type = {first: best}
        for name in others:
            write_model(path, name, model_bytes)
            by_type[name] = rate(best.threads)
        return Bandwidth(best.threads, by_type, sweep, path.stat().st_size)


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
        rounds = [llama.time_decoding(prompt, DECODE_TOKENS) for _ in range(REPEATS)]
    return Rate(threads, tuple(timing.decode_tokens_per_s * size for timing in rounds))


def write_model(
    path: Path, type_name: str, size_bytes: int, shape: LlamaShape = TINY_LLAMA
) -> None:
    """A Llama GGUF with random matrices of one type, of about size_bytes, at least one layer.

    Each matrix repeats a few rows that ggml quantized: the memory is real, and its numbers are
    ordinary ones. shape: of one layer.
    """
    from edge_dtm.llamacpp import ggml

    layer_bytes = sum(
        s[0] * ggml_types.row_bytes(type_name, s[1])
        for name, s in shape.tensors().items()
        if name.startswith("blk.") and len(s) == 2
    )
    shape = replace(shape, layers=max(round(size_bytes / layer_bytes), 1))
    random = np.random.default_rng(0)
    kind, data = ggml_types.ggml_type(type_name), {}
    writer = llama_writer(path, shape)
    for name, size in shape.tensors().items():
        if len(size) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(size, dtype=np.float32))
            continue
        if size not in data:
            values = random.standard_normal((64, size[1])) / np.sqrt(size[1])
            block = ggml.quantize(type_name, values.astype(np.float32), threads=1)
            data[size] = np.resize(block, (size[0], block.shape[1]))
        writer.add_tensor(f"{name}.weight", data[size], raw_dtype=kind)
    finish(writer)


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
    # llama.cpp keeps repacked weights beside the file.
    size = min(max(MODEL_BYTES, CACHES * cache_size_bytes), free_memory_bytes // 3)
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
