"""What is in a GGUF: the type, the bytes and the zeros of every tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edge_dtm import ggml

# Coarser grids round many weights to zero anyway; there a share of zeros says nothing of a mask.
_COUNTED = ("F32", "F16", "Q8_0")
_SHOWN_FROM = 0.05


@dataclass(frozen=True)
class TensorInfo:
    """zero_share: exact zeros over all weights, None where the type hides it."""

    name: str
    type: str
    shape: tuple[int, ...]
    size_bytes: int
    zero_share: float | None

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def component(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def text(self) -> str:
        if self.zero_share is not None and self.zero_share >= _SHOWN_FROM:
            return f"{self.type} {self.zero_share:.0%}0"
        return self.type

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(path: Path) -> list[TensorInfo]:
    """All tensors of a GGUF in file order; shapes are (rows, row_length)."""
    out = []
    for t in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        kind, zeros = t.tensor_type.name, None
        if len(shape) == 2 and kind in _COUNTED:
            raw = np.ascontiguousarray(t.data).view(np.uint8).reshape(shape[0], -1)
            values = ggml.dequantize(kind, raw, shape[1])
            zeros = 1 - np.count_nonzero(values) / values.size
        out.append(TensorInfo(t.name, kind, shape, int(t.n_bytes), zeros))
    return out
