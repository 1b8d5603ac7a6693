"""The quantizers against gguf-py's and against the files that llama.cpp itself writes."""

import ctypes
import os

import gguf
import numpy as np
import pytest

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import ggml_types
from edge_dtm.formats.ggml_types import ALLOWED_TYPES
from edge_dtm.llamacpp import ggml, llama
from edge_dtm.llamacpp.probe_model import LlamaShape, finish, llama_writer

# llama.cpp names whole files; with `pure` every matrix gets the type in the name.
FILE_TYPES = {
    "F16": "F16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K": "Q5_K_S", "Q4_K": "Q4_K_S", "Q3_K": "Q3_K_S",
    "Q5_1": "Q5_1", "Q5_0": "Q5_0", "Q4_1": "Q4_1", "Q4_0": "Q4_0", "IQ4_NL": "IQ4_NL",
}  # fmt: skip
WITH_IMPORTANCE = tuple(t for t in ALLOWED_TYPES if ggml_types.facts(t).importance == "used")
PYTHON_QUANTIZERS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def matrix(seed=0, rows=48, row_length=512):
    rng = np.random.default_rng(seed)
    # Heavy tails, a zero row and a constant row: what real matrices have and kernels dislike.
    weights = rng.standard_t(4, size=(rows, row_length)).astype(np.float32) * np.float32(0.05)
    weights[1] = 0
    weights[2] = 0.25
    return weights


def python_type(type_name):
    return gguf.GGMLQuantizationType[type_name]


@pytest.mark.parametrize("type_name", ALLOWED_TYPES)
def test_dequantize_equals_gguf_py(type_name):
    data = ggml.quantize(type_name, matrix())
    ours = ggml.dequantize(type_name, data, 512)
    theirs = gguf.quants.dequantize(
        data.view(np.float16) if type_name == "F16" else data, python_type(type_name)
    )
    # Both compute in float32, but the compiler may fuse a multiplication with an addition.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-7)


@pytest.mark.parametrize("type_name", PYTHON_QUANTIZERS)
def test_quantize_equals_gguf_py(type_name):
    weights = matrix(1)
    ours = ggml.quantize(type_name, weights)
    theirs = gguf.quants.quantize(weights, python_type(type_name))
    if type_name == "Q8_0":
        np.testing.assert_array_equal(ours, theirs)
    # The others may round a value that lies halfway between two steps the other way.
    assert (ours != theirs).mean() < 1e-3


def test_f32_is_kept():
    weights = matrix(3)
    data = ggml.quantize("F32", weights)
    np.testing.assert_array_equal(ggml.dequantize("F32", data, 512), weights)


@pytest.mark.parametrize("type_name", ALLOWED_TYPES)
def test_result_does_not_depend_on_threads(type_name):
    weights = matrix(4, rows=101)
    importance = np.random.default_rng(5).random(512).astype(np.float32)
    one = ggml.quantize(type_name, weights, importance, threads=1)
    many = ggml.quantize(type_name, weights, importance, threads=3)
    np.testing.assert_array_equal(one, many)
    np.testing.assert_array_equal(
        ggml.dequantize(type_name, one, 512, threads=1),
        ggml.dequantize(type_name, one, 512, threads=3),
    )


@pytest.mark.parametrize("type_name", ALLOWED_TYPES)
def test_rows_are_independent(type_name):
    weights = matrix(6)
    whole = ggml.quantize(type_name, weights)
    np.testing.assert_array_equal(whole[7:20], ggml.quantize(type_name, weights[7:20]))
    # A view with gaps between its rows is read as what it shows.
    np.testing.assert_array_equal(whole[::2], ggml.quantize(type_name, weights[::2]))


@pytest.mark.parametrize("type_name", WITH_IMPORTANCE)
def test_importance_lowers_the_weighted_error(type_name):
    weights = matrix(7)
    importance = np.random.default_rng(8).gamma(0.3, size=512).astype(np.float32)

    def error(data):
        return float((importance * (ggml.dequantize(type_name, data, 512) - weights) ** 2).sum())

    plain = error(ggml.quantize(type_name, weights))
    assert error(ggml.quantize(type_name, weights, importance)) < plain


def test_what_cannot_be_quantized():
    with pytest.raises(EdgeDtmError, match="Q4_K needs rows that divide by 256"):
        ggml.quantize("Q4_K", np.zeros((2, 257), dtype=np.float32))
    with pytest.raises(EdgeDtmError, match="without an importance vector"):
        ggml.quantize("IQ2_XXS", matrix())
    with pytest.raises(ValueError, match="importance"):
        ggml.quantize("Q4_0", matrix(), np.ones(511, dtype=np.float32))
    with pytest.raises(ValueError, match="bytes are no Q4_0 rows"):
        ggml.dequantize("Q4_0", np.zeros((2, 17), dtype=np.uint8), 32)


# --- llama.cpp's own files -----------------------------------------------------------------------


SHAPE = LlamaShape(256, layers=1, heads=4, kv_heads=2, ffn=512, vocab=32, context_tokens=64)


def tiny_weights():
    """The float32 matrices of a Llama of one block, by GGUF name without `.weight`."""
    rng = np.random.default_rng(9)
    return {
        name: (rng.standard_t(5, size=shape) * 0.05).astype(np.float32)
        for name, shape in SHAPE.tensors().items()
        if len(shape) == 2
    }


def write_tiny_llama(path):
    writer = llama_writer(path, SHAPE)
    for name, weights in tiny_weights().items():
        writer.add_tensor(f"{name}.weight", weights)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, dtype=np.float32))
    finish(writer)


@pytest.mark.parametrize("type_name", ALLOWED_TYPES)
def test_bytes_equal_those_of_llama_cpp(type_name, tmp_path):
    llama_cpp = llama.library()
    source, target = tmp_path / "f32.gguf", tmp_path / "quantized.gguf"
    write_tiny_llama(source)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{FILE_TYPES[type_name]}")
    parameters.pure = True
    parameters.nthread = 2
    result = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)
    )
    assert result == 0
    tensors = {t.name.removesuffix(".weight"): t for t in gguf.GGUFReader(target).tensors}
    for name, weights in tiny_weights().items():
        tensor = tensors[name]
        assert tensor.tensor_type.name == type_name, name
        ours = ggml.quantize(type_name, weights)
        theirs = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(ours.shape)
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
