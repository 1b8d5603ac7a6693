"""A checkpoint of which pruning or distillation replaced some tensors: these in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, DerivedCheckpoint, FloatArray


def write_edited(path: Path, tensors: Mapping[str, FloatArray]) -> None:
    """Write a safetensors file for `EditedCheckpoint`. EdgeDtmError when the disk is full.

    tensors: full GGUF name -> float32, rows as Hugging Face orders them.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file({n: np.ascontiguousarray(data) for n, data in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise EdgeDtmError(f"{path} could not be written ({error}): free some space") from None


class EditedCheckpoint(DerivedCheckpoint):
    """`original` with the tensors of `file` in the place of its own."""

    def __init__(self, original: Checkpoint, file: Path) -> None:
        from safetensors import safe_open

        super().__init__(original, file)
        self.file = file
        with safe_open(file, framework="np") as tensors:
            self._edited = frozenset(tensors.keys())

    def _read(self, name: str) -> FloatArray:
        if name not in self._edited:
            return self.original.hf_tensor(name)
        from safetensors import safe_open

        with safe_open(self.file, framework="np") as tensors:
            return np.asarray(tensors.get_tensor(name))
