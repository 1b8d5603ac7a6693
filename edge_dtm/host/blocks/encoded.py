"""What is measured is what is shipped: encoded matrices, kept on disk between the two."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.ggml_types import facts
from edge_dtm.formats.plan import Component, Treatment, zeros_per_row
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.quantize.gptq import gptq_quantize
from edge_dtm.host.quantize.hessian import DampedHessian
from edge_dtm.host.quantize.treat import treat

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
LOST = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what numpy raises then


def takes_feedback(treatment: Treatment) -> bool:
    return facts(treatment.type).takes_feedback and not treatment.zero_share


class EncodedStore:
    """A folder with what export needs to write the very bytes whose costs were measured.

    Of block matrices the bytes with error feedback themselves, one file a component and type; of
    `token_embd` and `output`, whose rows are many and of which few are measured, the moments that
    feedback needs; of every component the importance for plain rounding.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.folder, self.checkpoint = folder, checkpoint

    @property
    def key(self) -> str:
        """Names the measurement that the bytes are from."""
        return self.folder.name

    def _write(self, name: str, write: Callable[[IO[bytes]], None]) -> None:
        path = self.folder / name
        temporary = path.with_name(name + ".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                write(file)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise EdgeDtmError(
                f"{path} could not be written ({error.strerror or error}): free some space"
            ) from None

    def save(self, component: Component, treatment: Treatment, data: ByteArray) -> None:
        """data: uint8 (rows, row_bytes), rows as Hugging Face orders them."""
        rows = self.checkpoint.gguf_rows(component.name, data)
        self._write(
            self._block_file(component, treatment).name,
            lambda file: np.save(file, rows, allow_pickle=False),
        )

    def _block_file(self, component: Component, treatment: Treatment) -> Path:
        zeros = zeros_per_row(component.row_length, treatment.zero_share)
        suffix = f"-{zeros}-zeros" if zeros else ""
        return self.folder / f"{component.name}.{treatment.type}{suffix}.npy"

    def has(self, component: Component, treatment: Treatment) -> bool:
        """Whether the very bytes of a treatment are stored."""
        return self._block_file(component, treatment).is_file()

    def is_fitted(self, component: Component, treatment: Treatment) -> bool:
        """Whether a treatment with zeros was measured with its other weights fitted again; between
        two measured levels the upper one decides, and without one it was not.

        EdgeDtmError when the folder lacks the component.
        """
        try:
            with self._head(component.name) as stored:
                levels = [
                    (float(share), bool(fitted))
                    for name, share, fitted in zip(
                        stored["sparse_types"].tolist(),
                        stored["sparse_shares"].tolist(),
                        stored["sparse_fitted"].tolist(),
                        strict=True,
                    )
                    if name == treatment.type and share >= treatment.zero_share
                ]
        except LOST as error:
            raise self._lost(component, treatment, error) from None
        return min(levels)[1] if levels else False

    def _lost(
        self, component: Component, treatment: Treatment, error: BaseException
    ) -> EdgeDtmError:
        return EdgeDtmError(
            f"{self.folder} has lost {component.name} as {treatment} ({error}): run "
            "edge-dtm compress again with --no-resume"
        )

    def save_component(
        self,
        name: str,
        importance: FloatArray | None,
        compensated: Sequence[str],
        feedback: DampedHessian | None = None,
        sparse: Mapping[Treatment, bool] | None = None,
    ) -> None:
        """The last word about a component, after its bytes.

        importance: float32 (row_length,), or None for columns that are equally important;
        compensated: types that were measured with error feedback; feedback: what to make their
        bytes with, where these are not stored; sparse: treatments with zeros, and whether what
        they keep was fitted.
        """
        masks = sorted(sparse.items()) if sparse else []
        none = np.zeros(0, dtype=np.float32)
        self._write(
            f"{name}.npz",
            lambda file: np.savez(
                file,
                allow_pickle=False,
                importance=none if importance is None else importance,
                compensated=np.array(compensated, dtype=np.str_),
                moments=none if feedback is None else feedback.damped.cpu().numpy(),
                sparse_types=np.array([t.type for t, _ in masks], dtype=np.str_),
                sparse_shares=np.array([t.zero_share for t, _ in masks]),
                sparse_fitted=np.array([yes for _, yes in masks], dtype=np.bool_),
            ),
        )

    @contextmanager
    def _head(self, name: str) -> Iterator[Mapping[str, Any]]:
        # numpy leaves a path it cannot read open.
        with (
            (self.folder / f"{name}.npz").open("rb") as file,
            np.load(file, allow_pickle=False) as stored,
        ):
            yield stored

    def load(self, component: Component, treatment: Treatment) -> ByteArray:
        """Stored bytes. EdgeDtmError when they cannot be read."""
        path = self._block_file(component, treatment)
        try:
            data: ByteArray = np.load(path, mmap_mode="r", allow_pickle=False)
            return data
        except (OSError, ValueError, EOFError) as error:
            raise EdgeDtmError(
                f"{path} cannot be read ({error}): run edge-dtm compress again with --no-resume"
            ) from None

    def importance(self, name: str) -> FloatArray | None:
        """float32 (row_length,), what plain rounding of the component weighs errors with."""
        with self._head(name) as stored:
            importance: FloatArray = stored["importance"]
        return importance if len(importance) else None

    def encoded(self, component: Component, treatment: Treatment) -> ByteArray:
        """What goes into the GGUF, uint8 (rows, row_bytes) in its row order.

        EdgeDtmError when the folder lacks what was measured.
        """
        path = self._block_file(component, treatment)
        data: ByteArray
        try:
            if treatment.zero_share and self.is_fitted(component, treatment):
                data = np.load(path, mmap_mode="r", allow_pickle=False)
                return data
            with self._head(component.name) as stored:
                importance, types = stored["importance"], stored["compensated"].tolist()
                moments = torch.from_numpy(stored["moments"])
            if takes_feedback(treatment) and treatment.type in types:
                if len(moments):
                    feedback = DampedHessian(moments, None)
                    weights = torch.from_numpy(self._weights(component))
                    return gptq_quantize(weights, [treatment.type], feedback)[0][0]
                data = np.load(path, mmap_mode="r", allow_pickle=False)
                return data
        except LOST as error:
            raise self._lost(component, treatment, error) from None
        return treat(self._weights(component), treatment, importance if len(importance) else None)

    def _weights(self, component: Component) -> FloatArray:
        return self.checkpoint.tensor(component.name + ".weight")
