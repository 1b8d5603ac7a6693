"""A checkpoint of which pruning or distillation replaced some tensors: these in one file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray

_HEAD = "edge_dtm"  # one key of metadata: the order of several would change from run to run
_REMEDY = "run edge-dtm compress again with --no-resume"


def write_edited(
    path: Path, tensors: Mapping[str, FloatArray], meta: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file for `EditedCheckpoint`, whole or not at all.

    tensors: full GGUF name -> float32, rows as Hugging Face orders them. meta: anything JSON can
    hold, see `EditedCheckpoint.meta`. The same tensors and meta give the same bytes. EdgeDtmError
    when the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {n: np.ascontiguousarray(tensors[n], dtype=np.float32) for n in sorted(tensors)}
    digest = hashlib.sha256()
    for name, data in arrays.items():
        _take_in(digest, name, data)
    head = {"meta": dict(meta or {}), "sha256": digest.hexdigest()}
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(arrays, temporary, metadata={_HEAD: json.dumps(head, sort_keys=True)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise EdgeDtmError(f"{path} could not be written ({error}): free some space") from None
    finally:
        temporary.unlink(missing_ok=True)


def _take_in(digest: Any, name: str, data: FloatArray) -> None:
    digest.update(json.dumps([name, list(data.shape)]).encode())
    digest.update(data.data)


class EditedCheckpoint(Checkpoint):
    """`original` with the tensors of `file` in the place of its own.

    meta: what `write_edited` was given. EdgeDtmError when the file is damaged or a shape does not
    fit. Tensors are given in Hugging Face's layout by `_read`, whatever the source's is.
    """

    _source_is_hf = True

    def __init__(self, original: Checkpoint, file: Path) -> None:
        super().__init__(original.path, original.config)
        self.original, self.file, self.on_grid = original, file, original.on_grid
        self._shapes, self.meta, self._expected = self._open()
        self._check_shapes()

    def __reduce__(self) -> tuple[Any, ...]:
        return EditedCheckpoint, (self.original, self.file)

    def _open(self) -> tuple[dict[str, tuple[int, ...]], dict[str, Any], str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="np") as tensors:
                head = json.loads(tensors.metadata()[_HEAD])
                parts = {n: tensors.get_slice(n) for n in tensors.keys()}  # noqa: SIM118
                other = [n for n, part in parts.items() if part.get_dtype() != "F32"]
                if other:
                    raise ValueError(f"{other[0]} is not float32")
                shapes = {n: tuple(part.get_shape()) for n, part in parts.items()}
            return shapes, dict(head["meta"]), str(head["sha256"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise EdgeDtmError(f"{self.file} cannot be read ({reason}): {_REMEDY}") from None

    def _check_shapes(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            **{c.name + ".weight": (c.rows, c.row_length) for c in self.components()},
            **{n: (k,) for n, k in self.vectors()},
        }
        bad = [
            f"{n} has shape {shape}, not {shapes.get(n, 'any')}"
            for n, shape in self._shapes.items()
            if shapes.get(n) != shape
        ]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise EdgeDtmError(
                f"{self.file} does not fit {self.original.path}: {'; '.join(bad[:3])}{more}; "
                f"{_REMEDY}"
            )

    @property
    def tokenizer(self) -> Any:
        return self.original.tokenizer

    def _names(self) -> set[str]:
        return self.original._names()

    def _read(self, name: str) -> FloatArray:
        if name not in self._shapes:
            return self.original.hf_tensor(name)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="np") as tensors:
                return np.asarray(tensors.get_tensor(name))
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise EdgeDtmError(f"{self.file} cannot be read ({reason}): {_REMEDY}") from None

    def check(self, progress: Callable[[int], None] | None = None) -> str:
        """SHA-256 of the original's hash, the config and the file's tensors.

        Reads all of these; EdgeDtmError when the original's check fails or the file's tensors are
        not those that were written, or not finite. progress: called with weights read.
        """
        if self._hash is None:
            original = self.original.check(progress)
            digest, bad = hashlib.sha256(), []
            for name in sorted(self._shapes):
                data = self._read(name)
                _take_in(digest, name, data)
                if not np.isfinite(data).all():
                    bad.append(name)
            if digest.hexdigest() != self._expected:
                raise EdgeDtmError(f"{self.file} is damaged (its hash differs): {_REMEDY}")
            if bad:
                raise EdgeDtmError(
                    f"{self.file} has NaN or infinite weights in {len(bad)} tensors (first: "
                    f"{bad[0]}): {_REMEDY}"
                )
            parts = [original, self.config.to_json(), digest.hexdigest()]
            self._hash = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self._hash
