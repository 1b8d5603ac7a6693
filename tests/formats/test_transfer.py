"""What travels, against zstandard itself."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import Made

from edge_dtm.formats import transfer as module
from edge_dtm.formats.archive import COMPRESSION_LEVEL
from edge_dtm.formats.plan import Treatment
from edge_dtm.formats.transfer import packed_bytes, packed_estimate, sample_step
from edge_dtm.host.quantize.treat import treat

KINDS = [Treatment(t) for t in ("F16", "Q8_0", "Q6_K", "Q4_K", "Q4_0")]
KINDS += [Treatment(t, s) for t in ("Q8_0", "F16") for s in (0.5, 0.9)]


def _stream_bytes(data: bytes) -> int:
    """As pack writes it: a stream of unknown length."""
    out = io.BytesIO()
    with zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).stream_writer(out, closefd=False) as to:
        for a in range(0, len(data), 1000):
            to.write(data[a : a + 1000])
    return len(out.getvalue())


@pytest.mark.parametrize("kind", ["gguf", "zeros", "noise", "empty", "long"])
def test_packed_bytes_are_those_of_a_stream(tiny_gguf: Path, tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "file"
    data = {
        "gguf": lambda: tiny_gguf.read_bytes(),
        "zeros": lambda: bytes(300_000),
        "noise": lambda: random.bytes(200_000),
        "empty": lambda: b"",
        "long": lambda: random.bytes(1000) * (module._READ_BYTES // 1000 + 700),
    }[kind]()
    path.write_bytes(data)
    found = packed_bytes(path)
    assert found == _stream_bytes(data)
    if kind == "gguf":
        once = len(zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(data))
        assert found == pytest.approx(once, rel=0.01)


@pytest.mark.parametrize("name", ["blk.1.ffn_up", "blk.0.ffn_down", "token_embd"])
def test_some_rows_tell_how_the_matrix_packs(made: Made, name: str) -> None:
    """Trained weights, every other row of them."""
    weights = made.weights(name)
    for kind in KINDS:
        if kind.zero_share and name == "token_embd":
            continue
        blocks = treat(weights, kind, None)
        whole = len(zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(blocks.tobytes()))
        assert packed_estimate(blocks, len(blocks)) == whole
        found = packed_estimate(blocks[::2], len(blocks))
        assert found == pytest.approx(whole, rel=0.03), kind


@pytest.mark.parametrize("kind", [Treatment("Q4_0"), Treatment("Q8_0"), Treatment("Q8_0", 0.5)])
def test_a_sample_of_a_large_matrix(kind: Treatment) -> None:
    random = np.random.default_rng(1)
    size = np.exp(random.standard_normal((6000, 1)) / 3) * np.exp(random.standard_normal(1024) / 3)
    weights = (random.standard_normal((6000, 1024)) * size / 32).astype(np.float32)
    blocks = treat(weights, kind, None)
    step = sample_step(*blocks.shape)
    some = blocks[::step]
    assert step > 1 and module.SAMPLE_BYTES <= some.nbytes < 2 * module.SAMPLE_BYTES
    whole = len(zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(blocks.tobytes()))
    assert packed_estimate(some, len(blocks)) == pytest.approx(whole, rel=0.03)


@pytest.mark.parametrize("rows", [1, 7, 100, 5000])
@pytest.mark.parametrize("row_bytes", [18, 1000, 70_000])
def test_a_sample_is_never_much_less_than_asked_for(rows: int, row_bytes: int) -> None:
    step = sample_step(rows, row_bytes)
    taken = len(range(0, rows, step)) * row_bytes
    assert taken >= min(rows * row_bytes, module.SAMPLE_BYTES)


def test_zeros_travel_lightly(made: Made) -> None:
    weights = made.weights("blk.1.ffn_up")
    sizes = [
        packed_estimate(treat(weights, Treatment("Q8_0", s), None), len(weights))
        for s in (0, 0.5, 0.9)
    ]
    assert sizes[2] < 0.4 * sizes[0] and sizes[1] < 0.8 * sizes[0]
