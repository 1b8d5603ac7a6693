"""Inputs of and margin gradients at every component, kept as files for the cost measurement."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Component
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.capture import BATCH_SEQUENCES, EMBEDDED, Capture, input_key
from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.quantize.equalize import Scales, input_scale, output_scale

FloatArray = npt.NDArray[np.float32]

Advance = Callable[[int], None] | None

SIGN_DRAWS = 2


class Activations:
    """Inputs of and margin gradients at every component, for some sequences, as files.

    Files, since at 7B they exceed memory: inputs float32 (tokens, row_length), gradients float16
    (SIGN_DRAWS, tokens, rows) divided by a power of two a file. Tokens of all sequences lie one
    after another; `edges` (sequences + 1,) tells where each begins. What is captured is the
    original model's; `equalized` gives them as the equalized model has them.
    """

    def __init__(self, folder: Path, reference: Reference, components: Sequence[Component]) -> None:
        self.folder, self.reference = folder, reference
        self.scales: Scales = {}
        self.config: ModelConfig | None = None
        lengths = reference.prompt_lengths + reference.generated_lengths - 1
        self.edges = np.concatenate([[0], np.cumsum(lengths)])
        tokens = int(self.edges[-1])
        self.shapes: dict[str, tuple[int, ...]] = {}
        for c in components:
            self.shapes[f"x.{input_key(c.name)}"] = (tokens, c.row_length)
            if c.in_block:
                self.shapes[f"g.{c.name}"] = (SIGN_DRAWS, tokens, c.rows)
            elif c.name == EMBEDDED:
                self.shapes[f"g.{c.name}"] = (SIGN_DRAWS, tokens, c.row_length)
        self._state_file = folder / "state.json"

    def equalized(self, scales: Scales, config: ModelConfig) -> Activations:
        """The same files, read as the model with these scales has them."""
        other = copy.copy(self)
        other.scales, other.config = scales, config
        return other

    @property
    def size_bytes(self) -> int:
        return sum(
            int(np.prod(s)) * (4 if k.startswith("x.") else 2) for k, s in self.shapes.items()
        )

    def check_disk(self) -> None:
        """EdgeDtmError when the files would not fit the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if not self._state_file.exists() and free < self.size_bytes * 1.05:
            raise EdgeDtmError(
                f"{self.folder} has {free / 1e9:.1f} GB free, the activations need "
                f"{self.size_bytes / 1e9:.1f} GB: free some space or use fewer prompts"
            )

    def _state(self) -> dict[str, Any]:
        if self._state_file.is_file():
            state: dict[str, Any] = json.loads(self._state_file.read_text())
            return state
        return {"done": 0, "scales": {}}

    def _file(self, key: str) -> np.memmap[Any, Any]:
        path = self.folder / f"{key}.bin"
        dtype: Any = np.float32 if key.startswith("x.") else np.float16
        shape = self.shapes[key]
        if path.exists():
            return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
        return np.memmap(path, dtype=dtype, mode="w+", shape=shape)

    def capture(self, model: Any, seed: int, progress: Advance = None) -> None:
        """Run the sequences not yet captured. progress: called with sequences done."""
        self.check_disk()
        state = self._state()
        if progress and state["done"]:
            progress(state["done"])
        capture = Capture(model, self.reference, self.shapes)
        try:
            for start in range(state["done"], len(self.reference), BATCH_SEQUENCES):
                stop = min(start + BATCH_SEQUENCES, len(self.reference))
                for key, pieces in capture.run(range(start, stop), seed, SIGN_DRAWS).items():
                    if key not in self.shapes:
                        continue
                    self._write(key, start, pieces, state["scales"])
                state["done"] = stop
                temporary = self._state_file.with_suffix(".tmp")
                temporary.write_text(json.dumps(state))
                temporary.replace(self._state_file)
                if progress:
                    progress(stop - start)
        finally:
            capture.close()

    def _write(
        self, key: str, start: int, pieces: list[torch.Tensor], scales: dict[str, float]
    ) -> None:
        file = self._file(key)
        joined = torch.cat(pieces, dim=-2)
        if key.startswith("g."):
            if key not in scales:
                largest = float(joined.abs().max()) or 1.0
                scales[key] = 2.0 ** np.floor(np.log2(largest / 256))
            joined = joined / scales[key]
            if float(joined.abs().max()) > 65504:
                raise EdgeDtmError(
                    f"gradients at {key[2:]} exceed the range of half precision: this model's "
                    "margins are not smooth enough to measure; use other prompts"
                )
        first = self.edges[start]
        file[..., first : first + joined.shape[-2], :] = joined.cpu().numpy()

    def inputs(self, name: str) -> FloatArray:
        """float32 (tokens, row_length): what the component was fed."""
        x = np.asarray(self._file(f"x.{input_key(name)}"))
        scale = input_scale(self.scales, name)
        return x if scale is None else x * scale

    def gradients(self, name: str) -> FloatArray:
        """float32 (SIGN_DRAWS, tokens, rows)."""
        scale = self._state()["scales"][f"g.{name}"]
        g = np.asarray(self._file(f"g.{name}"), dtype=np.float32) * np.float32(scale)
        out = output_scale(self.scales, name, self.config) if self.config else None
        return g if out is None else g / out

    def importance(self, name: str) -> FloatArray:
        """Mean square of the component's inputs, float32 (row_length,): llama.cpp's imatrix."""
        x = self.inputs(name)
        total = np.zeros(x.shape[1])
        for part in np.array_split(x, max(1, len(x) // 4096)):
            total += np.square(part, dtype=np.float64).sum(axis=0)
        return (total / len(x)).astype(np.float32)

    def remove(self) -> None:
        self._state_file.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
