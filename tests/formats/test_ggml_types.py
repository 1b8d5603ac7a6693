"""The table of GGML types against gguf-py and the library itself."""

import ctypes
import subprocess
import sys

import gguf
import numpy as np
import pytest

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import ggml_types
from edge_dtm.formats.ggml_types import TYPES
from edge_dtm.llamacpp import ggml

QUANTIZED = [t.name for t in TYPES.values() if t.quantized and t.role != "activations"]


@pytest.fixture(scope="module")
def library():
    lib = ggml.library()
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_type_name.restype = ctypes.c_char_p
    return lib


@pytest.mark.parametrize("fact", TYPES.values(), ids=lambda t: t.name)
def test_the_library_has_the_same_blocks(fact, library):
    number = fact.number
    assert library.ggml_type_name(number).decode().lower() == fact.name.lower()
    assert library.ggml_blck_size(number) == fact.block_size
    assert library.ggml_type_size(number) == fact.block_bytes == sum(fact.parts.values())
    assert library.ggml_quantize_requires_imatrix(number) == (fact.importance == "needed")


def test_gguf_py_has_the_same_blocks():
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        fact = TYPES.get(kind.name)
        # gguf-py gives Q8_1 two floats where ggml has two halves; no file has such tensors.
        if fact is not None and kind.name != "Q8_1":
            assert (fact.block_size, fact.block_bytes) == sizes, kind.name
            assert ggml_types.ggml_type(kind.name) is kind
            assert ggml_types.by_number(int(kind)) is fact


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_importance_changes_the_blocks_where_the_table_says_so(type_name):
    random = np.random.default_rng(0)
    weights = random.standard_normal((8, 512)).astype(np.float32)
    vectors = [random.gamma(0.3, size=512).astype(np.float32) + 1e-3 for _ in range(2)]
    one, two = (ggml.quantize(type_name, weights, v) for v in vectors)
    assert np.array_equal(one, two) == (TYPES[type_name].importance == "ignored")


def test_derived_facts():
    assert TYPES["Q8_0"].bits == 8.5
    assert [t.name for t in TYPES.values() if not t.takes_feedback and t.role != "data"] == [
        "F32", "F16", "BF16",
    ]  # fmt: skip
    assert ggml_types.SPARSE_TYPES == ("Q8_0", "F16")
    assert set(ggml_types.DEFAULT_TYPES) == set(ggml_types.ALLOWED_TYPES) - {"Q3_K"}
    assert all(TYPES[t].activations for t in ggml_types.WEIGHT_TYPES)
    assert ggml_types.WEIGHT_TYPES >= ggml_types.KV_TYPES


def test_unknown_types_are_refused():
    with pytest.raises(EdgeDtmError, match="Q9_9"):
        ggml_types.facts("Q9_9")
    with pytest.raises(EdgeDtmError, match="4711"):
        ggml_types.by_number(4711)


def test_the_table_needs_no_package():
    code = (
        "import sys, edge_dtm.formats.ggml_types\n"
        "assert not {'gguf', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
