"""What is measured is what is shipped: the bytes of treated matrices, on disk until the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.ggml_types import facts
from edge_dtm.formats.plan import Component, Treatment, zeros_per_row
from edge_dtm.host.checkpoint.checkpoint import Checkpoint

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


def takes_feedback(treatment: Treatment) -> bool:
    return facts(treatment.type).takes_feedback and not treatment.zero_share


class EncodedStore:
    """A folder with the bytes of treated matrices, one file a component and treatment, and beside it
    the importance that plain rounding of the component weighs errors with."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.folder, self.checkpoint = folder, checkpoint

    @property
    def key(self) -> str:
        """Names the measurement that the bytes are from."""
        return self.folder.name

    def save(
        self,
        component: Component,
        treatment: Treatment,
        data: ByteArray,
        importance: FloatArray | None = None,
    ) -> None:
        """data: uint8 (rows, row_bytes), rows as Hugging Face orders them. importance: float32
        (row_length,), None where all columns are equally important."""
        if importance is not None:
            self._write(self.folder / f"{component.name}.importance.npy", importance)
        rows = self.checkpoint.gguf_rows(component.name, data)
        self._write(self._file(component, treatment), rows)

    def _write(self, path: Path, array: npt.NDArray[Any]) -> None:
        temporary = path.with_name(path.name + ".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise EdgeDtmError(
                f"{path} could not be written ({error.strerror or error}): free some space"
            ) from None

    def _file(self, component: Component, treatment: Treatment) -> Path:
        zeros = zeros_per_row(component.row_length, treatment.zero_share)
        suffix = f"-{zeros}-zeros" if zeros else ""
        return self.folder / f"{component.name}.{treatment.type}{suffix}.npy"

    def has(self, component: Component, treatment: Treatment) -> bool:
        return self._file(component, treatment).is_file()

    def encoded(self, component: Component, treatment: Treatment) -> ByteArray:
        """uint8 (rows, row_bytes) in the GGUF's row order. EdgeDtmError when they cannot be read."""
        data: ByteArray = self._load(self._file(component, treatment))
        return data

    def importance(self, name: str) -> FloatArray | None:
        """float32 (row_length,), what plain rounding of the component weighs errors with."""
        path = self.folder / f"{name}.importance.npy"
        return self._load(path) if path.is_file() else None

    def _load(self, path: Path) -> Any:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise EdgeDtmError(
                f"{path} cannot be read ({error}): run edge-dtm compress again with --no-resume"
            ) from None
