"""One treatment applied to one matrix: zeros by |W|·||x|| in each row, then ggml's quantizer.

Sensitivity and export both call this, so what is measured is what is shipped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.formats.plan import Treatment, zeros_per_row
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.integer[Any]]


def prune_order(weights: FloatArray, importance: FloatArray | None) -> IntArray:
    """Columns of each row in the order in which they are pruned, int (rows, row_length).

    Source of the score |W|·||x||: Wanda, arXiv 2306.11695; importance: float32 (row_length,),
    mean square of the inputs, None for plain magnitude. Ties go to the lower column, so the
    result is the same everywhere.
    """
    score = weights * weights if importance is None else weights * weights * importance
    return np.argsort(score, axis=1, kind="stable")


def prune_rows(
    weights: FloatArray,
    importance: FloatArray | None,
    zero_share: float,
    order: IntArray | None = None,
) -> FloatArray:
    """A copy with the given share of each row set to zero. weights: float32 (rows, row_length);
    order: prune_order of the same arguments, when it is already known."""
    out = np.array(weights, dtype=np.float32)
    if count := zeros_per_row(weights.shape[1], zero_share):
        order = prune_order(weights, importance) if order is None else order
        np.put_along_axis(out, order[:, :count], np.float32(0), axis=1)
    return out


def treat(
    weights: FloatArray,
    treatment: Treatment,
    importance: FloatArray | None,
    order: IntArray | None = None,
) -> npt.NDArray[np.uint8]:
    """The bytes that go into the GGUF, uint8 (rows, row_bytes)."""
    pruned = prune_rows(weights, importance, treatment.zero_share, order)
    return ggml.quantize(treatment.type, pruned, importance)


def treated_values(
    weights: FloatArray,
    treatment: Treatment,
    importance: FloatArray | None,
    order: IntArray | None = None,
) -> FloatArray:
    """The float32 values those bytes stand for."""
    data = treat(weights, treatment, importance, order)
    return ggml.dequantize(treatment.type, data, weights.shape[1])
