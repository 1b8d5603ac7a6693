"""A checkpoint with the scales of equalization worked in."""

from __future__ import annotations

from typing import Any

from edge_dtm.formats.plan import Component
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray
from edge_dtm.host.quantize.equalize import Scales, input_scale, output_scale


class EqualizedCheckpoint(Checkpoint):
    """A checkpoint with the scales worked in: other tensors, the same function."""

    def __init__(self, original: Checkpoint, scales: Scales) -> None:
        super().__init__(original.path, original.config)
        self.original, self.scales = original, scales
        self.on_grid, self._source_is_hf = original.on_grid, original._source_is_hf

    def __reduce__(self) -> tuple[Any, ...]:
        return EqualizedCheckpoint, (self.original, self.scales)

    @property
    def tokenizer(self) -> Any:
        return self.original.tokenizer

    def _names(self) -> set[str]:
        return self.original._names()

    def components(self) -> tuple[Component, ...]:
        return self.original.components()

    def check(self, progress: Any = None) -> str:
        """The original's hash: that is where it comes from."""
        return self.original.check(progress)

    def _read(self, name: str) -> FloatArray:
        data = self.original._read(name)
        stem, _, suffix = name.rpartition(".")
        out = output_scale(self.scales, stem, self.config)
        if suffix == "bias":
            return data if out is None else data * out
        if data.ndim == 1:  # the gain of a norm
            return data if out is None else data * out
        columns = input_scale(self.scales, stem)
        if columns is not None:
            data = data / columns
        return data if out is None else data * out[:, None]
