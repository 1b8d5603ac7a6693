"""One treatment applied to one matrix: zeros by |W|·||x|| in each row, then ggml's quantizer.

Sensitivity and export both call this, so what is measured is what is shipped.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_dtm import ggml
from edge_dtm.plan import Treatment, zeros_per_row

FloatArray = npt.NDArray[np.float32]


def prune_rows(weights: FloatArray, importance: FloatArray | None, zero_share: float) -> FloatArray:
    """A copy with the given share of each row set to zero, least |W|·||x|| first.

    weights: float32 (rows, row_length); importance: float32 (row_length,), mean square of the
    inputs, None for plain magnitude. Source of the score: Wanda, arXiv 2306.11695. Ties go to
    the lower column, so the result is the same everywhere.
    """
    count = zeros_per_row(weights.shape[1], zero_share)
    out = np.array(weights, dtype=np.float32)
    if not count:
        return out
    score = out * out if importance is None else out * out * importance
    columns = np.argsort(score, axis=1, kind="stable")[:, :count]
    np.put_along_axis(out, columns, np.float32(0), axis=1)
    return out


def treat(
    weights: FloatArray, treatment: Treatment, importance: FloatArray | None
) -> npt.NDArray[np.uint8]:
    """The bytes that go into the GGUF, uint8 (rows, row_bytes)."""
    pruned = prune_rows(weights, importance, treatment.zero_share)
    return ggml.quantize(treatment.type, pruned, importance)


def treated_values(
    weights: FloatArray, treatment: Treatment, importance: FloatArray | None
) -> FloatArray:
    """The float32 values those bytes stand for."""
    return ggml.dequantize(
        treatment.type, treat(weights, treatment, importance), weights.shape[1]
    )
