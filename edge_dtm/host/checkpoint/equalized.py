"""A checkpoint with the scales of equalization worked in."""

from __future__ import annotations

from collections.abc import Callable

from edge_dtm.host.checkpoint.checkpoint import Checkpoint, DerivedCheckpoint, FloatArray
from edge_dtm.host.quantize.equalize import Scales, input_scale, output_scale


class EqualizedCheckpoint(DerivedCheckpoint):
    """A checkpoint with the scales worked in: other tensors, the same function."""

    def __init__(self, original: Checkpoint, scales: Scales) -> None:
        super().__init__(original, scales)
        self.scales = scales

    def check(self, progress: Callable[[int], None] | None = None) -> str:
        """The original's hash: that is where it comes from."""
        return self.original.check(progress)

    def _read(self, name: str) -> FloatArray:
        data = self.original.hf_tensor(name)
        stem = name.rpartition(".")[0]
        rows, columns = output_scale(self.scales, stem, self.config), None
        if data.ndim == 2:
            rows = None if rows is None else rows[:, None]
            columns = input_scale(self.scales, stem)
        if columns is not None:
            data = data / columns
        return data if rows is None else data * rows
