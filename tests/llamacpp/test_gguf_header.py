"""The head of a GGUF: as gguf-py reads it, and what is refused."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.llamacpp.gguf_header import check_gguf, read_header
from edge_dtm.llamacpp.probe_model import finish


def test_the_head_agrees_with_ggufs_own_reader(tiny_gguf: Path) -> None:
    import gguf

    header = read_header(tiny_gguf)
    reader = gguf.GGUFReader(tiny_gguf)
    assert [(t.name, t.shape, t.type, t.offset_bytes, t.size_bytes) for t in header.tensors] == [
        (t.name, tuple(map(int, t.shape)), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    assert header.architecture == "llama"
    for key, value in header.values.items():
        assert value == pytest.approx(reader.fields[key].contents())
    assert header.integer("block_count") == 2
    assert header.integer("attention.key_length") is None
    assert "tokenizer.ggml.tokens" not in header.values


@given(st.data())
def test_a_damaged_head_is_refused_or_read(data: st.DataObject) -> None:
    good = _small_gguf()
    broken = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 9))
        kind = data.draw(st.sampled_from(["byte", "word", "cut"]))
        if kind == "byte":
            broken[at] = data.draw(st.integers(0, 255))
        elif kind == "word":
            number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
            broken[at : at + 8] = number.to_bytes(8, "little")
        else:
            del broken[-at - 1 :]
            break
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(broken)
        file.flush()
        try:
            header = read_header(Path(file.name))
        except EdgeDtmError as error:
            assert "\n" not in str(error)
        else:
            assert all(t.end_bytes <= len(broken) for t in header.tensors)


@cache
def _small_gguf() -> bytes:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_token_list(["a", "bc"])
        writer.add_block_count(2)
        writer.add_rope_scaling_factor(1.5)
        writer.add_tensor("t", np.zeros((2, 4), dtype=np.float32))
        finish(writer)
        return path.read_bytes()


@pytest.mark.parametrize("count", [2**40, 2**64 - 1])
def test_no_count_keeps_the_reader_going(tmp_path: Path, count: int) -> None:
    """A file that promises more than it holds is refused before any loop over it."""
    path = tmp_path / "many.gguf"
    key = b"tokens"
    array = len(key).to_bytes(8, "little") + key + (9).to_bytes(4, "little")
    for head in (
        (1).to_bytes(8, "little") + count.to_bytes(8, "little"),
        count.to_bytes(8, "little") + (0).to_bytes(8, "little"),
        bytes(8) + (1).to_bytes(8, "little") + array + (8).to_bytes(4, "little")
        + count.to_bytes(8, "little"),
    ):  # fmt: skip
        path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + head + bytes(1000))
        with pytest.raises(EdgeDtmError, match="truncated or no GGUF"):
            read_header(path)


def test_checking_leaves_no_weights_in_memory(tiny_gguf: Path) -> None:
    """Its pages would count twice: once for the check and once for llama.cpp."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    check_gguf(tiny_gguf)
    assert str(tiny_gguf) not in maps.read_text()


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.003, 0.1, 0.5, 0.9999])
def test_truncated_gguf(tiny_gguf: Path, tmp_path: Path, share: float) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(EdgeDtmError, match=str(path)):
        check_gguf(path)


def test_foreign_files(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "foreign.gguf"
    data = tiny_gguf.read_bytes()
    for content, message in [
        (b"PK\3\4" + bytes(100), "no GGUF file"),
        (data[:4] + b"\2\0\0\0" + data[8:], "version 3"),
        (data[:4] + b"\0\0\0\3" + data[8:], "version 3"),
        (data.replace(b"llama", b"bloom"), "architecture 'bloom'"),
        (data[:8] + b"\xff" * 16 + data[24:], "truncated or no GGUF"),
    ]:
        path.write_bytes(content)
        with pytest.raises(EdgeDtmError, match=message):
            check_gguf(path)
    with pytest.raises(EdgeDtmError, match="cannot read"):
        check_gguf(tmp_path / "absent.gguf")
