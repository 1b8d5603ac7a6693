"""The files that bench_quality compares: llama.cpp's presets and ours, made, measured, removed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import digest_of
from edge_dtm.core.metrics import BoolArray, divergent_mask
from edge_dtm.formats.plan import Component, Plan, uniform
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import HELD_OUT, Reference
from edge_dtm.host import export
from edge_dtm.host.blocks.costs import Costs
from edge_dtm.host.blocks.quantize import quantize as quantize_ours
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.derived import EqualizedCheckpoint
from edge_dtm.host.measure import against, replay
from edge_dtm.host.quantize.equalize import input_scale
from edge_dtm.host.values import Base, Measurement, Run
from edge_dtm.llamacpp import llama
from edge_dtm.llamacpp.gguf_header import read_header
from edge_dtm.search.allocation import search
from edge_dtm.search.cost_table import CostTable

Vectors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Candidate:
    """One GGUF: its size, the number of tensors of each type, and how it did on the held-out
    sequences. mask: bool (sequences, tokens), where its argmax is not the original's."""

    size_bytes: int
    types: Mapping[str, int]
    sha256: str
    measured: Measurement
    mask: BoolArray

    @property
    def sdt(self) -> float:
        return self.measured.divergence.sdt.value

    def to_json(self) -> dict[str, Any]:
        return {
            "size_bytes": self.size_bytes,
            "tensors_of_type": dict(self.types),
            "gguf_sha256": self.sha256,
            **self.measured.to_json(),
        }


class Files:
    """Makes GGUFs and measures them. A record stays in `folder`, so each file is made once."""

    def __init__(self, run: Run, base: Base, reference: Reference) -> None:
        self.run, self.base, self.reference = run, base, reference
        self.held_out = reference.part(HELD_OUT)
        self.folder = run.work.folder / "bench"
        self.folder.mkdir(exist_ok=True)
        self._sources: dict[str, Path] = {}

    def candidate(self, title: str, what: Any, make: Callable[[Path], None]) -> Candidate:
        """what: JSON that, with the model, settles the file's bytes."""
        settings = self.run.run_settings.to_json() | {"threads": None}
        packages = export.packages()
        path = self.folder / f"{digest_of([self.run.key, settings, packages, what])}.npz"
        if not path.is_file():
            gguf = self.folder / "candidate.gguf"
            try:
                make(gguf)
                with gguf.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                types = Counter(t.type for t in read_header(gguf).tensors)
                facts = {"size_bytes": gguf.stat().st_size, "types": types, "sha256": sha256}
                replay(self.run, gguf, self.held_out, f"{title}: replay").save(path, facts)
            finally:
                gguf.unlink(missing_ok=True)
        record = Record.load(path)
        measured = against(self.held_out, record, 0.0)
        return Candidate(**record.meta, measured=measured, mask=self.mask(record))

    def mask(self, record: Record) -> BoolArray:
        held_out = self.held_out
        return divergent_mask(held_out.generated_ids, record.ids, held_out.generated_lengths)

    def preset(
        self, name: str, vectors: Vectors | None, checkpoint: Checkpoint | None = None
    ) -> Candidate:
        """vectors: llama.cpp's importance matrix. checkpoint: instead of the original."""
        checkpoint = checkpoint or self.run.checkpoint
        title = f"{name}{' + im' if vectors else ''}"
        what: list[Any] = ["preset", name, array_digest(vectors or {})]
        if isinstance(checkpoint, EqualizedCheckpoint):
            title += ", equalized"
            what.append(array_digest(checkpoint.scales))

        def make(path: Path) -> None:
            source = self._source(checkpoint)
            with self.run.stages(f"{title}: quantize", 1) as advance:
                quantize(source, path, name, vectors or {}, self.run.run_settings.threads)
                advance(1)

        return self.candidate(title, what, make)

    def ours(
        self,
        title: str,
        plan: Plan,
        costs: Costs,
    ) -> Candidate:
        """costs: what the plan's bytes are made with."""

        def make(path: Path) -> None:
            quantize_ours(self.run, costs, plan.pairs)
            with self.run.stages(f"{title}: export", self.base.weights) as advance:
                export.export_gguf(costs.equalized, plan, path, costs.encoded.encoded, advance)

        return self.candidate(title, ["plan", plan.hash, costs.encoded.key], make)

    def _source(self, checkpoint: Checkpoint) -> Path:
        """The F32 export that llama.cpp quantizes."""
        kind = "equalized" if isinstance(checkpoint, EqualizedCheckpoint) else "original"
        if kind not in self._sources:
            path = self.folder / f"f32-{kind}.gguf"
            plan = uniform(self.base.components, "F32", self.base.fixed_bytes)
            with self.run.stages(f"Exporting F32, {kind}", self.base.weights) as advance:
                export.export_gguf(checkpoint, plan, path, {}, advance)
            self._sources[kind] = path
        return self._sources[kind]

    def close(self) -> None:
        """Remove what is large and quick to make again."""
        for path in self._sources.values():
            path.unlink(missing_ok=True)


def quantize(source: Path, path: Path, name: str, vectors: Vectors, threads: int) -> None:
    """What llama-quantize makes of source. EdgeDtmError when it cannot."""
    lib = llama.library()  # sends llama.cpp's log elsewhere
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = preset_ftype(name), threads
    params.allow_requantize = False
    arrays = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in vectors.items()}
    if arrays:
        entries = (lib.llama_model_imatrix_data * (len(arrays) + 1))()  # the last: no name
        for entry, (key, data) in zip(entries, arrays.items(), strict=False):
            entry.name = f"{key}.weight".encode()
            entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = data.size
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    llama.last_errors.clear()
    if lib.llama_model_quantize(os.fsencode(source), os.fsencode(path), ctypes.byref(params)):
        raise EdgeDtmError(f"llama.cpp could not make a {name} of this model{llama.error_text()}")


def array_digest(arrays: Vectors) -> str:
    return digest_of(
        {
            k: hashlib.sha256(np.ascontiguousarray(v, dtype=np.float32).data).hexdigest()
            for k, v in arrays.items()
        }
    )


def preset_ftype(name: str) -> int:
    value = getattr(llama.library(), f"LLAMA_FTYPE_MOSTLY_{name}", None)
    if value is None:
        raise EdgeDtmError(f"llama.cpp has no preset {name!r}; known are Q4_K_M, Q5_K_S, Q8_0, ...")
    return int(value)


def why_skipped(name: str, components: Sequence[Component]) -> str | None:
    """Why a preset cannot be compared on this model, or None."""
    unfit = [c for c in components if c.row_length % 256]
    if re.match("Q[23]_K", name) and unfit:
        return (
            f"the rows of {len(unfit)} of {len(components)} matrices do not divide by 256, and "
            "llama.cpp would silently give those a larger type"
        )
    return None


def best_plan(table: CostTable, max_bytes: int) -> tuple[Plan, bool]:
    """The plan for max_bytes, or the smallest there is, and whether it is that one."""
    dense = table.restricted(table.types, sparse=False)
    smallest = dense.fixed_bytes + sum(
        min(map(c.size_bytes, treatments))
        for c, treatments in zip(dense.components, dense.treatments, strict=True)
    )
    return search(table, max(max_bytes, smallest)), smallest > max_bytes


def equalized_imatrix(vectors: Vectors, equalized: EqualizedCheckpoint) -> dict[str, Any]:
    """The importance matrix of the equalized model: its inputs are the original's times scales."""
    out = {}
    for name, vector in vectors.items():
        scale = input_scale(equalized.scales, name)
        out[name] = vector if scale is None else vector * np.square(scale)
    return out
