"""ggml's matrix kernels on this machine against plain arithmetic, type by type.

For every GGML type and row length among a GGUF's matrices some rows of a real one are multiplied
by ggml, one column (what decoding does) and several (prefill), in the file's layout and in each
repacked layout this CPU uses. The same bytes, decoded by gguf-py's own dequantizer in numpy,
are multiplied in float64.

A quantized type's kernel rounds the activations to 8 bits first. They are chosen so that nothing
is lost by it: multiples of 2^-7, in every block of 32 one of +-127/128. A block's scale is then
+-2^-7 (Q8_0, Q8_1, Q8_K), every value a whole number of steps, and the block sums, below 2^11
steps, fit the half precision of Q8_1. What is left is rounding of sums, so the limit is strict:

    error = |ggml - exact| / sum |weight * activation|, the worst over rows and columns.

- 1e-5: n float32 additions err by about 1e-7 of that sum; types with an offset somewhat more.
- F16, 1e-3: ARM kernels may add up in half precision; 3e-4 on an emulated Cortex-A76.
- KleidiAI's layouts, 5e-3: they round activations and Q8_0 weights once more.

A kernel that computes something else is off by 1 / sqrt(n), 0.01 or more at n = 8192, a single
wrong scale of a block by 32 / n, and one wrong weight by 1 / n, above 1e-5 for all rows in use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import ggml_types
from edge_dtm.formats.verdict import KernelCheck
from edge_dtm.llamacpp import ggml
from edge_dtm.llamacpp.ggml_cpu import CpuBackend
from edge_dtm.llamacpp.gguf_header import TensorInfo, read_header

Layout = Literal["plain", "repacked"]
# One for gemv; five is a group of four and a rest for the repacked kernels; 32 fills any tile.
COLUMNS = (1, 5, 32)
MAX_ROWS = 256
_GROUP = 64  # a multiple of the rows that any repacked layout interleaves
_STEP, _LARGEST, _BLOCK = 2.0**-7, 127, 32
_SEED = 22011


def check_kernels(path: Path, threads: int) -> list[KernelCheck]:
    """All kernels that the matrices of a GGUF need on this CPU, in the order of the file.

    At most MAX_ROWS rows of one matrix are in memory, and nothing else of the file but its head.
    EdgeDtmError when the file is no whole GGUF, has no matrix, or has a type that gguf-py cannot
    decode.
    """
    # One matrix of each kind. An odd vocabulary is not repacked, while others of its type are.
    kinds: dict[tuple[str, int, int], TensorInfo] = {}
    for tensor in read_header(path).tensors:
        if tensor.is_matrix:
            row_length, rows = tensor.shape
            kinds.setdefault((tensor.type, row_length, rows % _GROUP), tensor)
    if not kinds:
        raise EdgeDtmError(f"{path} has no weight matrix: it is no model; compress one")
    results: list[KernelCheck] = []
    with CpuBackend(threads) as cpu:
        for tensor in kinds.values():
            rows = tensor.shape[1]
            shape = (rows, tensor.size_bytes // rows)
            whole = np.memmap(path, np.uint8, "r", tensor.offset_bytes, shape)
            data = np.array(whole[_some_rows(rows)])
            name = tensor.component
            results += check_rows(cpu, name, tensor.type, data, decode(tensor.type, data))
    return results


def decode(type_name: str, data: ggml.ByteArray) -> ggml.FloatArray:
    """The weights that blocks stand for by gguf-py, which shares no code with the kernels.

    data: uint8 (rows, row_bytes); float32 (rows, row_length). EdgeDtmError for a type it lacks.
    """
    kind = ggml_types.ggml_type(type_name)
    plain = {"F32": np.float32, "F16": np.float16}.get(type_name, np.uint8)
    try:
        return np.asarray(gguf.quants.dequantize(data.view(plain), kind), dtype=np.float32)
    except NotImplementedError:
        raise EdgeDtmError(
            f"the kernels of {type_name} cannot be checked, since gguf-py cannot decode it: "
            "update gguf"
        ) from None


def check_rows(
    cpu: CpuBackend, component: str, type_name: str, data: ggml.ByteArray, weights: ggml.FloatArray
) -> list[KernelCheck]:
    """Multiply the bytes in each layout and for each number of columns, and compare.

    data: uint8 (rows, row_bytes), what ggml is handed; weights (rows, row_length): what they mean.
    """
    x = activations(max(COLUMNS), weights.shape[1])
    exact = x.astype(np.float64) @ weights.T.astype(np.float64)
    scale = np.abs(x).astype(np.float64) @ np.abs(weights).T.astype(np.float64)
    checks = []
    for buffer, number, product in cpu.products(type_name, data, x, COLUMNS):
        layout: Layout = "plain" if buffer == cpu.plain else "repacked"
        error = _relative_error(product, exact[:number], scale[:number])
        ok = error <= tolerance(type_name, buffer)
        checks.append(KernelCheck(type_name, layout, number, error, component, ok))
    return checks


def activations(columns: int, row_length: int) -> ggml.FloatArray:
    """float32 (columns, row_length) that 8-bit rounding leaves as they are (see the module).

    Half of each block of 32 is positive, so that its sum is at most 16 * 127 steps.
    """
    random = np.random.default_rng(_SEED)
    blocks = -(-row_length // _BLOCK)
    steps = random.integers(0, _LARGEST + 1, (columns, blocks, _BLOCK))
    steps[..., 0] = _LARGEST
    steps[..., _BLOCK // 2 :] *= -1
    steps = random.permuted(steps, axis=2)
    # Either sign may be the one of the largest.
    steps *= random.choice((-1, 1), (columns, blocks, 1))
    flat = steps.reshape(columns, -1)[:, :row_length]
    return np.ascontiguousarray(flat * _STEP, dtype=np.float32)


def _some_rows(rows: int) -> npt.NDArray[np.int64]:
    """At most MAX_ROWS, evenly spread. Divided by _GROUP their number leaves the same rest as the
    whole's, so that a layout that needs whole groups of rows is taken if it is for the whole."""
    count = rows if rows <= MAX_ROWS else MAX_ROWS - _GROUP + rows % _GROUP
    return np.arange(count, dtype=np.int64) * rows // count


def _relative_error(
    product: ggml.FloatArray, exact: npt.NDArray[np.float64], scale: npt.NDArray[np.float64]
) -> float:
    difference = np.abs(product - exact)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A row of zeros has to give exactly zero; anything else of it is infinitely wrong.
        error = np.where(difference == 0, 0.0, difference / scale)
    return float(np.where(np.isnan(error), np.inf, error).max())


def tolerance(type_name: str, buffer: str) -> float:
    if "KLEIDIAI" in buffer.upper():
        return 5e-3
    return 1e-3 if type_name == "F16" else 1e-5
