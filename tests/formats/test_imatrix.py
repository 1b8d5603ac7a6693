"""Imatrix files: the round trip, the format's fields, and everything else refused."""

import ctypes
import struct

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.imatrix import check_imatrix, read_imatrix, write_imatrix
from edge_dtm.formats.plan import Component
from edge_dtm.llamacpp import ggml

VECTORS = {
    "blk.2.ffn_down": np.array([0.5, 0.0, 2.25, 1e-9], dtype=np.float32),
    "blk.10.attn_q": np.array([3.0, 1.0], dtype=np.float32),
    "token_embd": np.array([7.0], dtype=np.float32),
}
# Sums of 64 tokens stay within float32 and so do those of 2^20.
VALUES = st.floats(0, 2**100, width=32, allow_subnormal=False)
NAMES = st.sampled_from(["output", "token_embd"]) | st.builds(
    "blk.{}.{}".format,
    st.integers(0, 99),
    st.sampled_from(["attn_q", "attn_output", "ffn_down", "ffn_up"]),
)
ARRAYS = hnp.arrays(np.float32, st.integers(1, 40), elements=VALUES)


def written(path, vectors=VECTORS, tokens=1024, datasets=("a.txt",)):
    write_imatrix(path, vectors, tokens, datasets)
    return path


def refused(path, *words):
    """The one line of the error."""
    with pytest.raises(EdgeDtmError) as error:
        read_imatrix(path)
    text = str(error.value)
    assert "\n" not in text and str(path) in text
    for word in words:
        assert word in text, text
    return text


@given(st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=6), st.integers(1, 2**20))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path, vectors, tokens):
    read = read_imatrix(written(tmp_path / "i.gguf", vectors, tokens))
    assert sorted(read) == sorted(vectors)
    exact = tokens & (tokens - 1) == 0
    for name, vector in vectors.items():
        assert read[name].dtype == np.float32 and read[name].shape == vector.shape
        np.testing.assert_allclose(read[name], vector, rtol=0 if exact else 2**-23, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["i.gguf"]


def test_format_fields(tmp_path):
    path = written(tmp_path / "i.gguf", tokens=1300, datasets=["a.txt", "ü b.txt"])
    reader = gguf.GGUFReader(path)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert {k: f.contents() for k, f in fields.items()} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt", "ü b.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    kinds = gguf.GGUFValueType
    assert [f.types for f in fields.values()] == [
        [kinds.STRING], [kinds.ARRAY, kinds.STRING], [kinds.UINT32], [kinds.UINT32]
    ]  # fmt: skip
    # In the order of the bytes of the names, as llama-imatrix writes them: 10 before 2.
    assert [t.name for t in reader.tensors] == [
        f"{name}.weight.{part}"
        for name in ("blk.10.attn_q", "blk.2.ffn_down", "token_embd")
        for part in ("in_sum2", "counts")
    ]
    assert {t.tensor_type for t in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    tensors = {t.name: t for t in reader.tensors}
    for name, vector in VECTORS.items():
        assert tensors[f"{name}.weight.counts"].data.tolist() == [1300]
        assert list(tensors[f"{name}.weight.in_sum2"].shape) == [len(vector)]
        sums = tensors[f"{name}.weight.in_sum2"].data
        np.testing.assert_array_equal(sums, vector * np.float32(1300))
    assert path.stat().st_size % 32 == 0


def test_equal_bytes_whatever_the_order(tmp_path):
    first = written(tmp_path / "1").read_bytes()
    again = dict(reversed([(k, v.copy()) for k, v in VECTORS.items()]))
    assert written(tmp_path / "2", again).read_bytes() == first
    assert written(tmp_path / "2", tokens=1025).read_bytes() != first


class InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def test_ggml_reads_it(tmp_path):
    lib = ggml.library()
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, InitParams]
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    lib.gguf_get_n_tensors.restype = lib.gguf_find_key.restype = ctypes.c_int64
    lib.gguf_get_n_tensors.argtypes = [ctypes.c_void_p]
    lib.gguf_find_key.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    path = written(tmp_path / "i.gguf")
    context = lib.gguf_init_from_file(str(path).encode(), InitParams(True, None))
    assert context
    try:
        assert lib.gguf_get_n_tensors(context) == 2 * len(VECTORS)
        # Those without which llama-quantize refuses a file.
        for key in (b"imatrix.datasets", b"imatrix.chunk_count", b"imatrix.chunk_size"):
            assert lib.gguf_find_key(context, key) >= 0
    finally:
        lib.gguf_free(context)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 3e38])
def test_bad_values_are_not_written(value, tmp_path):
    vectors = VECTORS | {"blk.0.ffn_up": np.array([1, value], dtype=np.float32)}
    with pytest.raises(EdgeDtmError, match=r"1 of 4 .*blk\.0\.ffn_up") as error:
        written(tmp_path / "i.gguf", vectors)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_failing_write_leaves_nothing(tmp_path):
    with pytest.raises(EdgeDtmError, match="cannot write"):
        written(tmp_path / "no folder" / "i.gguf")
    (tmp_path / "taken").mkdir()
    with pytest.raises(EdgeDtmError, match="cannot write"):
        written(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def by_hand(path, tensors, kind="imatrix"):
    """A GGUF of any tensors: name -> array."""
    writer = gguf.GGUFWriter(path, "imatrix")
    if kind is not None:
        writer.add_type(kind)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entry(sums, counts, name="blk.0.ffn_up.weight"):
    return {
        f"{name}.in_sum2": np.array(sums, dtype=np.float32),
        f"{name}.counts": np.array(counts, dtype=np.float32),
    }


@pytest.mark.parametrize(
    ("sums", "count", "mean"),
    [
        ([2, 6], 4, [0.5, 1.5]),
        ([0, 0], 0, [1, 1]),  # nothing counted: no weighting
        ([2, 6], 0, [1, 1]),
        ([2, 6], 0.4, [1, 1]),
        ([2, 6], 0.5, [2, 6]),
        ([2, 6], 2.5, [2 / 3, 2]),  # halves go up, as in lround
        ([2, 6], 1.4, [2, 6]),
    ],
)
@pytest.mark.parametrize("rows", [False, True])
def test_counts_as_llama_quantize_takes_them(sums, count, mean, rows, tmp_path):
    sums, counts = ([sums], [[count]]) if rows else (sums, [count])
    read = read_imatrix(by_hand(tmp_path / "i.gguf", entry(sums, counts)))
    assert list(read) == ["blk.0.ffn_up"]
    assert read["blk.0.ffn_up"].tolist() == np.array(mean, dtype=np.float32).tolist()


def test_other_tensors_are_passed_over(tmp_path):
    extra = {"blk.0.ffn_up.weight.in_sum": np.ones(3, dtype=np.float32)}
    assert list(read_imatrix(by_hand(tmp_path / "i", entry([1], [1]) | extra))) == ["blk.0.ffn_up"]


HALF = {"blk.0.ffn_up.weight.in_sum2": np.ones(2, np.float16)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, ["no entries"]),
        (dict(list(entry([1], [1]).items())[:1]), ["blk.0.ffn_up.weight lacks"]),
        (entry([1, 1], [1]) | HALF, ["blk.0.ffn_up.weight is not in F32"]),
        (entry([1, np.nan], [1]), ["blk.0.ffn_up", "NaN"]),
        (entry([1, -1], [1]), ["blk.0.ffn_up", "negative"]),
        (entry([1, 1], [np.nan]), ["counts of blk.0.ffn_up", "NaN"]),
        (entry([1, 1], [-1]), ["counts of blk.0.ffn_up", "negative"]),
        (entry([1, 1, 1], [1, 1]), ["3 values for 2 counts"]),
    ],
)
def test_bad_entries(tensors, words, tmp_path):
    refused(by_hand(tmp_path / "i.gguf", tensors), "llama-imatrix -m", *words)


@pytest.mark.parametrize("kind", [None, "model"])
def test_another_gguf(kind, tmp_path):
    path = by_hand(tmp_path / "i.gguf", entry([1], [1]), kind)
    refused(path, f"general.type is {kind!r}, not 'imatrix'", "llama-imatrix -m")


def test_experts(tmp_path):
    tensors = (
        entry([[1, 2], [3, 4]], [[5], [0]], "blk.0.ffn_up_exps.weight")
        | entry([[1, 2]], [[5]], "blk.1.ffn_up_exps.weight")
        | entry([1, 2], [5], "blk.0.attn_q.weight")
        | entry([[1, 2], [3, 4]], [[5], [5]], "blk.1.attn_q.weight")
    )
    path = by_hand(tmp_path / "i.gguf", tensors)
    refused(path, "3 of 4", "blk.0.ffn_up_exps, blk.1.ffn_up_exps, blk.1.attn_q", "mixture")


@pytest.mark.parametrize("data", [b"", b"abc", b"Once upon a time", struct.pack("<ii", 1, 6)])
def test_what_is_no_gguf_is_to_be_made_again(data, tmp_path):
    (tmp_path / "i.dat").write_bytes(data)
    refused(tmp_path / "i.dat", "GGUF", "llama-imatrix -m")


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "i"
    # Padding after the last tensor may be cut off.
    whole = written(path).read_bytes()
    needed = gguf.GGUFReader(path).tensors[-1]
    for size in range(needed.data_offset + needed.n_bytes):
        path.write_bytes(whole[:size])
        refused(path)


def test_damage_is_an_error_or_other_values(tmp_path):
    """Never another exception, whichever byte changes."""
    path, rng = tmp_path / "i", np.random.default_rng(0)
    whole = written(path).read_bytes()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            for vector in read_imatrix(path).values():
                assert np.isfinite(vector).all() and (vector >= 0).all()
        except EdgeDtmError as error:
            assert "\n" not in str(error)


def test_no_file(tmp_path):
    refused(tmp_path / "i.gguf", "does not exist", "llama-imatrix -m")
    refused(tmp_path, "cannot read")


COMPONENTS = (
    Component("token_embd", 9, 1),
    Component("output", 9, 1),
    Component("blk.2.ffn_down", 3, 4),
    Component("blk.10.attn_q", 3, 2),
)


def test_check_accepts_what_fits():
    check_imatrix(VECTORS, COMPONENTS)
    check_imatrix({k: v for k, v in VECTORS.items() if k != "token_embd"}, COMPONENTS)
    check_imatrix(VECTORS, COMPONENTS[2:])


def test_check_lists_everything():
    vectors = {"blk.2.ffn_down": np.ones(5, np.float32), "token_embd": np.ones(2, np.float32)}
    with pytest.raises(EdgeDtmError) as error:
        check_imatrix(vectors, iter(COMPONENTS))
    text = str(error.value)
    assert "3 of 4" in text and "llama-imatrix -m" in text and "\n" not in text
    assert "token_embd (2 values, not 1), blk.2.ffn_down (5 values, not 4)" in text
    assert "blk.10.attn_q (missing)" in text
