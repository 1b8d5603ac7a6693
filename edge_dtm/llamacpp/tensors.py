"""What is in a GGUF: the type, the bytes and the zeros of every tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_dtm.formats.ggml_types import facts
from edge_dtm.llamacpp import ggml
from edge_dtm.llamacpp.gguf_header import read_header

_SHOWN_FROM = 0.05


@dataclass(frozen=True)
class TensorSummary:
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


def describe(path: Path) -> list[TensorSummary]:
    """All tensors of a GGUF in file order; shapes are (rows, row_length)."""
    out = []
    for t in read_header(path).tensors:
        shape, zeros = tuple(reversed(t.shape)), None
        if len(shape) == 2 and facts(t.type).holds_zeros:
            raw = np.memmap(
                path, np.uint8, "r", t.offset_bytes, (shape[0], t.size_bytes // shape[0])
            )
            values = ggml.dequantize(t.type, raw, shape[1])
            zeros = 1 - np.count_nonzero(values) / values.size
        out.append(TensorSummary(t.name, t.type, shape, t.size_bytes, zeros))
    return out
