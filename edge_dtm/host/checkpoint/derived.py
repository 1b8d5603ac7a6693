"""Checkpoints made of another one: with scales worked in, with a plan's values, or with some tensors
replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Plan
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray
from edge_dtm.host.checkpoint.tokenizer import Tokenizer
from edge_dtm.host.quantize.equalize import Scales, input_scale, output_scale
from edge_dtm.host.values import Encoded
from edge_dtm.llamacpp import ggml


class DerivedCheckpoint(Checkpoint):
    """Another checkpoint with other values in some tensors. change: what makes them so."""

    def __init__(self, original: Checkpoint, change: Any) -> None:
        super().__init__(original.path, original.config, original.stored)
        self.original, self._change = original, change

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.original, self._change)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.original.tokenizer


class EqualizedCheckpoint(DerivedCheckpoint):
    """A checkpoint with the scales worked in: other tensors, the same function."""

    def __init__(self, original: Checkpoint, scales: Scales) -> None:
        super().__init__(original, scales)
        self.scales = scales

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


class TreatedCheckpoint(DerivedCheckpoint):
    """A checkpoint with the values that a plan ships. change: the plan, and where its bytes are."""

    def __init__(self, original: Checkpoint, change: tuple[Plan, Encoded]) -> None:
        super().__init__(original, change)
        plan, self._encoded = change
        pairs = plan.pairs
        self._treated = {c.name + ".weight": (c, t) for c, t in pairs}

    def _read(self, name: str) -> FloatArray:
        if name not in self._treated:
            return self.original.hf_tensor(name)
        component, treatment = self._treated[name]
        data = np.asarray(self._encoded.encoded(component, treatment))
        values = ggml.dequantize(treatment.type, data, component.row_length)
        return self.hf_rows(component.name, values)


def write_edited(path: Path, tensors: Mapping[str, FloatArray]) -> None:
    """Write a safetensors file for `EditedCheckpoint`. EdgeDtmError when the disk is full.

    tensors: full GGUF name -> float32, rows as Hugging Face orders them.
    """
    try:
        save_file({n: np.ascontiguousarray(data) for n, data in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise EdgeDtmError(f"{path} could not be written ({error}): free some space") from None


class EditedCheckpoint(DerivedCheckpoint):
    """`original` with the tensors of `file` in the place of its own."""

    def __init__(self, original: Checkpoint, file: Path) -> None:
        super().__init__(original, file)
        self.file = file
        with safe_open(file, framework="np") as tensors:
            self._edited = frozenset(tensors.keys())

    def _read(self, name: str) -> FloatArray:
        if name not in self._edited:
            return self.original.hf_tensor(name)
        with safe_open(self.file, framework="np") as tensors:
            return np.asarray(tensors.get_tensor(name))
