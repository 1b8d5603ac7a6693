"""ggml's kernels against numpy: healthy here for every type, and a planted fault is found.

A real fault sits in compiled code. Here the kernel is handed other bytes, or another type, than
the arithmetic it is compared with.
"""

import ctypes
import subprocess
import sys

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.llamacpp import ggml, kernels
from edge_dtm.llamacpp.ggml_cpu import CpuBackend
from edge_dtm.llamacpp.kernels import activations, check_kernels, check_rows, decode
from edge_dtm.llamacpp.probe_model import finish

BLOCKS_OF_32 = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
BLOCKS_OF_256 = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS")
TYPES = BLOCKS_OF_32 + BLOCKS_OF_256
ROWS, ROW_LENGTH = 80, 512


def matrix(type_name, rows=ROWS, row_length=ROW_LENGTH, seed=0):
    """Bytes of a random matrix with a row of zeros and a large row."""
    weights = np.random.default_rng(seed).standard_t(4, (rows, row_length)) * 0.05
    weights[1] = 0
    weights[2] *= 100
    weights = weights.astype(np.float32)
    return weights.view(np.uint8) if type_name == "F32" else ggml.quantize(type_name, weights)


def write_gguf(path, tensors):
    """tensors: name -> (type name, rows, row_length), or None for a norm."""
    writer = gguf.GGUFWriter(path, "llama")
    for seed, (name, shape) in enumerate(tensors.items()):
        if shape is None:
            writer.add_tensor(name, np.ones(32, dtype=np.float32))
            continue
        kind, rows, row_length = shape
        data = matrix(kind, rows, row_length, seed)
        plain = {"F32": np.float32, "F16": np.float16}.get(kind)
        if plain is not None:
            writer.add_tensor(name, data.view(plain))
        else:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    finish(writer)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    tensors = {
        f"blk.{i}.ffn_up.weight": (kind, ROWS, 96 if kind in BLOCKS_OF_32 else 256)
        for i, kind in enumerate(TYPES)
    }
    return write_gguf(tmp_path_factory.mktemp("mixed") / "mixed.gguf", tensors)


@pytest.fixture(scope="module")
def cpu():
    with CpuBackend(1) as cpu:
        yield cpu


def test_this_machine_is_healthy_for_every_type(mixed):
    results = check_kernels(mixed, 2)
    assert {r.type for r in results} == set(TYPES)
    assert all(r.ok for r in results), [r for r in results if not r.ok]
    for kind in TYPES:
        plain = [r.columns for r in results if r.type == kind and r.path == "plain"]
        assert plain == list(kernels.COLUMNS)
    # Rounding of float32 alone, far below the limit: the activations lost nothing.
    assert max(r.worst_relative_error for r in results if r.type != "F16") < 1e-6


def test_repacked_layouts_are_checked_where_this_cpu_has_them(mixed):
    results = check_kernels(mixed, 1)
    repacked = {r.type for r in results if r.path == "repacked"}
    if not ggml.library().ggml_cpu_has_avx2():
        pytest.skip("which types are repacked is known for AVX2 only")
    assert repacked - {"Q2_K"} == {"Q4_0", "Q4_K", "IQ4_NL"}  # Q2_K with AVX-512
    for kind in repacked:
        columns = [r.columns for r in results if r.type == kind and r.path == "repacked"]
        assert columns == list(kernels.COLUMNS)


def test_each_kind_of_shape_is_checked_once(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        {
            "token_embd.weight": ("Q4_0", 601, 64),  # an odd vocabulary is not repacked
            "blk.0.attn_q.weight": ("Q4_0", 64, 64),
            "blk.0.attn_k.weight": ("Q4_0", 128, 64),  # the same kernels as attn_q
            "blk.0.ffn_down.weight": ("Q4_0", 64, 160),
        },
    )
    results = check_kernels(path, 1)
    plain = {r.component for r in results if r.path == "plain"}
    assert plain == {"token_embd", "blk.0.attn_q", "blk.0.ffn_down"}
    assert "token_embd" not in {r.component for r in results if r.path == "repacked"}


@pytest.mark.parametrize("type_name", TYPES)
def test_any_flipped_bit_shows_as_much_as_it_changes_the_products(cpu, type_name):
    data = matrix(type_name)
    weights = decode(type_name, data)
    x = activations(max(kernels.COLUMNS), ROW_LENGTH).astype(np.float64)
    scale = np.abs(x) @ np.abs(weights.astype(np.float64)).T
    scale[:, 1] = np.inf  # the row of zeros is left alone
    random = np.random.default_rng(5)
    found = 0
    for _ in range(12):
        wrong = data.copy()
        row = random.choice([0, 2, ROWS // 2, ROWS - 1])
        byte, bit = random.integers(data.shape[1]), random.integers(8)
        wrong[row, byte] ^= np.uint8(1 << bit)
        meant = decode(type_name, wrong)
        if not np.isfinite(meant).all():
            continue
        effect = np.abs(x @ (meant.astype(np.float64) - weights).T) / scale
        for result in check_rows(cpu, "c", type_name, wrong, weights):
            expected = effect[: result.columns].max()
            assert result.worst_relative_error == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert result.ok or expected > 0.9 * kernels.tolerance(type_name, "")
            found += not result.ok
    assert found > 0


@pytest.mark.parametrize(
    ("told", "meant"), [("IQ4_NL", "Q4_0"), ("Q4_0", "IQ4_NL"), ("BF16", "F16")]
)
def test_a_wrong_type_is_found(cpu, told, meant):
    data = matrix(meant)
    assert not any(r.ok for r in check_rows(cpu, "c", told, data, decode(meant, data)))


def wrong_everywhere(product):
    product[0, 0] = np.nan


def wrong_in_one_kernel(product):
    if len(product) == 5:
        product[3, 7] *= 1.01


@pytest.mark.parametrize(
    ("spoil", "columns"), [(wrong_everywhere, set(kernels.COLUMNS)), (wrong_in_one_kernel, {5})]
)
def test_a_fault_of_one_layout_or_column_count_is_named(mixed, monkeypatch, spoil, columns):
    """As issue 22011 of llama.cpp: one kernel of many is wrong."""
    multiply = CpuBackend._product

    def faulty(self, buffer_type, type_name, data, x):
        product = multiply(self, buffer_type, type_name, data, x)
        if product is not None and type_name in BLOCKS_OF_256:
            spoil(product)
        return product

    monkeypatch.setattr(CpuBackend, "_product", faulty)
    wrong = {(r.type, r.columns) for r in check_kernels(mixed, 1) if not r.ok}
    assert wrong == {(kind, n) for kind in BLOCKS_OF_256 for n in columns}


def test_a_row_of_zeros_must_give_zeros(cpu):
    data = matrix("F32")
    weights = decode("F32", data)
    assert not weights[1].any()
    wrong = data.copy()
    wrong.view(np.float32)[1, 3] = 1e-30
    assert not any(r.ok for r in check_rows(cpu, "c", "F32", wrong, weights))


@given(st.integers(1, 40), st.integers(1, 4))
def test_activations_survive_8_bit_rounding_unchanged(blocks, columns):
    x = activations(columns, blocks * 32)
    # gguf-py's quantizer to Q8_0 is independent of ggml's.
    kind = gguf.GGMLQuantizationType.Q8_0
    back = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    np.testing.assert_array_equal(back, x)
    # And half precision holds the activations and Q8_1's sum of a block.
    np.testing.assert_array_equal(x.astype(np.float16), x)
    sums = x.reshape(columns, -1, 32).sum(axis=2)
    np.testing.assert_array_equal(sums.astype(np.float16), sums)


def test_activations_survive_the_rounding_of_k_quants(cpu):
    x = activations(4, 512)
    lib = ggml.library()
    for row in x:
        blocks = np.zeros(2 * 292, dtype=np.uint8)  # d float32, 256 int8, 16 sums int16
        lib.quantize_row_q8_K_ref(
            ctypes.c_void_p(row.ctypes.data),
            ctypes.c_void_p(blocks.ctypes.data),
            ctypes.c_int64(512),
        )
        for block, wanted in zip(blocks.reshape(2, 292), row.reshape(2, 256), strict=True):
            scale, steps = block[:4].view(np.float32), block[4:260].view(np.int8)
            np.testing.assert_array_equal(scale * steps.astype(np.float32), wanted)


def test_ggml_says_nothing(mixed):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from edge_dtm.llamacpp.kernels import check_kernels\n"
        "assert check_kernels(Path(sys.argv[1]), 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(mixed)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_that_cannot_be_checked(tmp_path):
    cut = write_gguf(tmp_path / "cut.gguf", {"output.weight": ("Q8_0", 64, 64)})
    cut.write_bytes(cut.read_bytes()[:-2000])
    with pytest.raises(EdgeDtmError, match="truncated"):
        check_kernels(cut, 1)
    norms = write_gguf(tmp_path / "norms.gguf", {"output_norm.weight": None})
    with pytest.raises(EdgeDtmError, match="no weight matrix"):
        check_kernels(norms, 1)


def test_a_type_that_gguf_py_cannot_decode_is_told():
    with pytest.raises(EdgeDtmError, match="I32 cannot be checked"):
        decode("I32", np.zeros((2, 128), dtype=np.uint8))
