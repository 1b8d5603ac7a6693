"""ggml's own quantizers and dequantizers, through the library that llama-cpp-python ships.

The same C code makes the bytes here and in llama.cpp's tools, so nothing has to be trusted twice.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import default_threads
from edge_dtm.formats.ggml_types import facts, row_bytes
from edge_dtm.llamacpp import llama
from edge_dtm.llamacpp.gguf_header import read_header

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


class _TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


@cache
def library() -> Any:
    """ggml's functions, by llama.cpp's library: dlsym finds what is in the libraries it links."""
    lib = ctypes.CDLL(llama.library()._lib._name)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[integer] * 3, pointer]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    return lib


def quantize(
    type_name: str,
    weights: FloatArray,
    importance: FloatArray | None = None,
    threads: int | None = None,
) -> ByteArray:
    """Quantize rows with ggml_quantize_chunk.

    weights: float32 (rows, row_length), finite. importance: float32 (row_length,), the weight of
    each column's squared error (llama.cpp's imatrix: mean square of the inputs). Returns uint8
    (rows, row_bytes). Rows are independent, so the result does not depend on `threads`.
    """
    rows, row_length = weights.shape
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    out = np.empty((rows, row_bytes(type_name, row_length)), dtype=np.uint8)
    lib, ggml_type = library(), facts(type_name)
    number = ggml_type.number
    lib.ggml_quantize_init(ctypes.c_int(number))  # fills shared tables; not safe inside threads
    pointer = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != (row_length,):
            raise ValueError(f"importance {importance.shape} does not fit rows of {row_length}")
        pointer = importance.ctypes.data
    elif ggml_type.importance == "needed":
        raise EdgeDtmError(f"{type_name} cannot be made without an importance vector")

    def chunk(start: int, stop: int) -> None:
        part, target = weights[start:stop].ctypes.data, out[start:stop].ctypes.data
        lib.ggml_quantize_chunk(number, part, target, 0, stop - start, row_length, pointer)

    _over_rows(chunk, rows, threads)
    return out


def dequantize(
    type_name: str, data: ByteArray, row_length: int, threads: int | None = None
) -> FloatArray:
    """The float32 (rows, row_length) that blocks stand for. data: uint8 (rows, row_bytes)."""
    data = np.ascontiguousarray(data)
    if data.ndim != 2 or data.shape[1] != row_bytes(type_name, row_length):
        raise ValueError(f"{data.shape} bytes are no {type_name} rows of {row_length}")
    out = np.empty((data.shape[0], row_length), dtype=np.float32)
    if type_name == "F32":
        return data.view(np.float32).copy()
    number = ctypes.c_int(facts(type_name).number)
    to_float = library().ggml_get_type_traits(number).contents.to_float

    def chunk(start: int, stop: int) -> None:
        part, target = data[start:stop], out[start:stop]
        to_float(part.ctypes.data, target.ctypes.data, (stop - start) * row_length)

    _over_rows(chunk, data.shape[0], threads)
    return out


def zero_shares(path: Path) -> dict[str, float]:
    """Share of exact zeros in each matrix of a GGUF whose type does not hide them, by component."""
    shares: dict[str, float] = {}
    for t in read_header(path).tensors:
        if t.is_matrix and facts(t.type).holds_zeros:
            row_length, rows = t.shape
            raw = np.memmap(path, np.uint8, "r", t.offset_bytes, (rows, t.size_bytes // rows))
            values = dequantize(t.type, raw, row_length)
            shares[t.component] = 1 - np.count_nonzero(values) / values.size
    return shares


def _over_rows(chunk: Callable[[int, int], None], rows: int, threads: int | None) -> None:
    """Call chunk(start, stop) over all rows on several threads; ctypes releases the GIL."""
    count = max(1, min(threads or default_threads(), rows // 16))
    if count == 1:
        chunk(0, rows)
        return
    # More pieces than threads, since some rows (all zeros, say) are quicker than others.
    edges = np.linspace(0, rows, 4 * count + 1).astype(int)
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(chunk, a, b) for a, b in pairwise(edges)]:
            future.result()
