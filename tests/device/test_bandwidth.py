"""The memory bandwidth that decoding reaches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.device import bandwidth as module
from edge_dtm.device.bandwidth import (
    Rate,
    decoding_rate,
    fewest_threads,
    measure,
    size_to_measure,
    thread_counts,
    write_model,
)
from edge_dtm.llamacpp import ggml
from edge_dtm.llamacpp.gguf_header import check_gguf

SMALL = dataclasses.replace(module.TINY_LLAMA, hidden=256, ffn=512)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_the_model_is_a_llama_of_that_type_and_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, kind, 2_000_000, shape=SMALL)
    check_gguf(path)
    assert abs(path.stat().st_size / 2_000_000 - 1) < 0.3  # a layer is 0.3 to 0.6 MB
    matrices = [t for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2]
    assert {t.tensor_type.name for t in matrices} == {kind}
    down = next(t for t in matrices if t.name == "blk.1.ffn_down.weight")
    assert list(down.shape) == [512, 256]
    values = ggml.dequantize(kind, np.asarray(down.data), 512)
    # Ordinary numbers: slow ones (denormal, infinite) would be measured instead of memory.
    assert np.isfinite(values).all() and 0.8 < values.std() * np.sqrt(512) < 1.2


def test_rates_are_positive_and_of_the_threads_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, "Q4_0", 1, shape=SMALL)
    rate = decoding_rate(path, 1)
    assert rate.threads == 1 and len(rate.values) == module.REPEATS and min(rate.values) > 0


def test_all_types_are_measured_with_the_best_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speeds = {1: 5e9, 2: 8e9, 3: 10e9, 4: 10.1e9}
    asked: list[tuple[str, int]] = []

    def write(path: Path, kind: str, size: int) -> None:
        path.write_text(kind)

    def rate(path: Path, threads: int) -> Rate:
        asked.append((path.read_text(), threads))
        return Rate(threads, (speeds[threads],))

    monkeypatch.setattr(module, "write_model", write)
    monkeypatch.setattr(module, "decoding_rate", rate)
    done: list[int] = []
    measured = measure(100, [1, 2, 3, 4], lambda stage, total: done.append)
    assert asked == [("Q4_0", 1), ("Q4_0", 2), ("Q4_0", 3), ("Q4_0", 4), ("Q8_0", 3)]
    assert measured.threads == 3 and measured.bytes_per_s == 10_000_000_000
    assert done == [1] * 5


@given(st.lists(st.floats(1e8, 1e11), min_size=1, max_size=8))
def test_fewest_threads(speeds: list[float]) -> None:
    sweep = [Rate(n + 1, (speed,)) for n, speed in enumerate(speeds)]
    chosen = fewest_threads(sweep)
    assert chosen.bytes_per_s >= 0.97 * max(speeds)
    assert all(r.bytes_per_s < 0.97 * max(speeds) for r in sweep if r.threads < chosen.threads)


@given(st.integers(1, 512))
def test_thread_counts(cores: int) -> None:
    counts = thread_counts(cores)
    assert counts == sorted(set(counts)) and counts[0] == 1 and counts[-1] == cores
    assert len(counts) <= 24


def test_thread_counts_of_boards() -> None:
    assert thread_counts(4) == [1, 2, 3, 4]
    assert thread_counts(8) == [1, 2, 3, 4, 6, 8]
    assert thread_counts(40) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]


def test_sizes() -> None:
    here = Path("/tmp")
    assert size_to_measure(2**21, 2**34, 2**34, here) == 256_000_000
    assert size_to_measure(2**28, 2**34, 2**34, here) == 2**30
    assert size_to_measure(2**21, 300_000_000, 2**34, here) == 100_000_000
    with pytest.raises(EdgeDtmError, match="too few to measure"):
        size_to_measure(2**21, 60_000_000, 2**34, here)
    with pytest.raises(EdgeDtmError, match="too few to measure"):
        size_to_measure(2**28, 10**9, 2**34, here)
    with pytest.raises(EdgeDtmError, match="TMPDIR"):
        size_to_measure(2**21, 2**34, 300_000_000, here)
