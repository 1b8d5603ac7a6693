"""What the calibration sequences that are not measured on leave behind for the fitting stages.

Error feedback and equalization are fitted here, costs are measured on other sequences, so that
what is fitted cannot flatter itself.
"""

from __future__ import annotations

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
from edge_dtm.formats.reference import DAMAGED, Reference
from edge_dtm.host.blocks.capture import BATCH_SEQUENCES, EMBEDDED, FINAL, Capture, input_key
from edge_dtm.host.quantize.hessian import input_hessian

FloatArray = npt.NDArray[np.float32]
OUTPUT_SEQUENCES = 32
SIGN_DRAWS = 1  # the weights of tokens need less certainty than a cost does


class Calibration:
    """Files in a folder: inputs float16 (tokens, row_length) divided by a power of two a file,
    of the first OUTPUT_SEQUENCES also the gradients at the outputs, float16 (tokens, rows), and
    small sums: token weights float32 (tokens,) a component, the mean squares of the margins'
    gradient at its outputs; for every input the summed squares of input and gradient a column.
    """

    def __init__(self, folder: Path, reference: Reference, components: Sequence[Component]) -> None:
        self.folder, self.reference = folder, reference
        lengths = reference.prompt_lengths + reference.generated_lengths - 1
        self.edges = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = int(self.edges[-1])
        self._columns = {input_key(c.name): c.row_length for c in components}
        self.vocab = max((c.rows for c in components if not c.in_block), default=0)
        self._rows = {c.name: c.rows for c in components if c.in_block}
        self.output_tokens = int(self.edges[min(OUTPUT_SEQUENCES, len(reference))])
        self._sums: dict[str, npt.NDArray[Any]] = {}
        self._done = 0
        self._scales: dict[str, float] = {}
        self._load()

    @property
    def size_bytes(self) -> int:
        inputs = self.tokens * sum(self._columns.values())
        return 2 * (inputs + self.output_tokens * sum(self._rows.values()))

    def check_disk(self) -> None:
        """EdgeDtmError when the files would not fit the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if not self._done and free < self.size_bytes * 1.05:
            raise EdgeDtmError(
                f"{self.folder} has {free / 1e9:.1f} GB free, the calibration inputs need "
                f"{self.size_bytes / 1e9:.1f} GB: free some space or use fewer prompts"
            )

    def _load(self) -> None:
        path = self.folder / "sums.npz"
        if not path.is_file():
            return
        try:
            # numpy leaves a path it cannot read open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                self._sums = {k: data[k] for k in data.files if k != "state"}
                state = json.loads(data["state"].tobytes().decode())
            self._done, self._scales = state["done"], state["scales"]
        except DAMAGED as error:
            raise EdgeDtmError(
                f"{path} is damaged ({error}): run edge-dtm compress again with --no-resume"
            ) from None

    def _save(self) -> None:
        state = json.dumps({"done": self._done, "scales": self._scales}).encode()
        temporary = self.folder / "sums.tmp.npz"
        arrays: dict[str, Any] = {**self._sums, "state": np.frombuffer(state, dtype=np.uint8)}
        np.savez(temporary, allow_pickle=False, **arrays)
        temporary.replace(self.folder / "sums.npz")

    def capture(self, model: Any, seed: int, progress: Callable[[int], None] | None = None) -> None:
        """Run the sequences not yet captured. progress: called with sequences done."""
        self.check_disk()
        if progress and self._done:
            progress(self._done)
        capture = Capture(model, self.reference, [f"g.{n}" for n in self._rows])
        try:
            for start in range(self._done, len(self.reference), BATCH_SEQUENCES):
                stop = min(start + BATCH_SEQUENCES, len(self.reference))
                self._take(capture.run(range(start, stop), seed, SIGN_DRAWS), start)
                self._done = stop
                self._save()
                if progress:
                    progress(stop - start)
        finally:
            capture.close()

    def _take(self, pieces: dict[str, list[torch.Tensor]], start: int) -> None:
        first = int(self.edges[start])
        for key, parts in pieces.items():
            kind, name = key[:2], key[2:]
            joined = torch.cat(parts, dim=-2)
            if kind == "x.":
                self._write(key, first, joined)
                self._add(key, joined.double().square().sum(0))
            elif kind == "b.":
                self._add(key, joined.double().square().sum((0, 1)) / SIGN_DRAWS)
            elif name == EMBEDDED:
                flat = joined.reshape(-1, joined.shape[-1])
                self._add("embedded", (flat.T @ flat) / SIGN_DRAWS)
            else:
                v = self._sums.setdefault(f"v.{name}", np.zeros(self.tokens, dtype=np.float32))
                squares = joined.square()
                v[first : first + joined.shape[-2]] = squares.mean((0, 2)).cpu().numpy()
                self._add(f"r.{name}", squares.double().sum((0, 1)) / SIGN_DRAWS)
                if first < self.output_tokens:
                    self._write(key, first, joined[0, : self.output_tokens - first])

    def _add(self, key: str, value: torch.Tensor) -> None:
        total = self._sums.setdefault(key, np.zeros(tuple(value.shape), dtype=np.float64))
        total += value.cpu().numpy()

    def _file(self, key: str) -> np.memmap[Any, Any]:
        path = self.folder / f"{key}.bin"
        name, mode = key[2:], "r+" if path.exists() else "w+"
        shape = (
            (self.tokens, self._columns[name])
            if key.startswith("x.")
            else (self.output_tokens, self._rows[name])
        )
        return np.memmap(path, dtype=np.float16, mode=mode, shape=shape)  # type: ignore[call-overload, no-any-return]

    def _write(self, key: str, first: int, joined: torch.Tensor) -> None:
        if key not in self._scales:
            largest = float(joined.abs().max()) or 1.0
            self._scales[key] = float(2.0 ** np.floor(np.log2(largest / 256)))
        scaled = joined / self._scales[key]
        if float(scaled.abs().max()) > 65504:
            raise EdgeDtmError(
                f"the inputs or gradients of {key[2:]} differ too much in size between prompts: "
                "use other --prompts"
            )
        self._file(key)[first : first + len(joined)] = scaled.cpu().numpy()

    def _read(self, key: str) -> FloatArray:
        return np.asarray(self._file(key), dtype=np.float32) * np.float32(self._scales[key])

    def inputs(self, name: str) -> FloatArray:
        """float32 (tokens, row_length): what the component was fed."""
        return self._read(f"x.{input_key(name)}")

    def gradients(self, name: str) -> FloatArray:
        """float32 (output_tokens, rows): the margins' gradient at the component's outputs."""
        return self._read(f"g.{name}")

    def token_weights(self, name: str) -> FloatArray:
        """float32 (tokens,): root mean square of the margins' gradient at the component's outputs.

        The square would be the Gauss-Newton weight, but then a few tokens would own the estimate
        (30 of 4,400 in `attn_v`); the root did better on sequences that were not fitted to.
        """
        return np.sqrt(np.asarray(self._sums[f"v.{name}"], dtype=np.float32))

    def input_squares(self, name: str) -> npt.NDArray[np.float64]:
        """(row_length,): mean square of each input."""
        return np.asarray(self._sums[f"x.{input_key(name)}"] / self.tokens)

    def gradient_squares(self, name: str) -> npt.NDArray[np.float64]:
        """(row_length,): mean square of the margins' gradient at each input, through all the
        matrices that it feeds."""
        return np.asarray(self._sums[f"b.{input_key(name)}"] / self.tokens)

    def output_squares(self, name: str) -> npt.NDArray[np.float64]:
        """(rows,): mean square of the margins' gradient at each of the component's outputs."""
        return np.asarray(self._sums[f"r.{name}"] / self.tokens)

    def edge_hessian(self, name: str, tied: bool) -> torch.Tensor:
        """Second moments for `token_embd` and `output`, float32 (hidden, hidden): of the rows
        looked up the gradients at the embedding, of a head's the final hidden states, both in the
        units in which they add to the cost (a margin has two rows of the head)."""
        out = torch.zeros((self._columns[FINAL],) * 2)
        positions = int(self.reference.generated_lengths.sum())
        if name == EMBEDDED:
            out += torch.from_numpy(self._sums["embedded"].astype(np.float32))
        if name == "output" or tied:
            first = self.edges[:-1] + self.reference.prompt_lengths - 1
            at = np.concatenate(
                [
                    a + np.arange(n)
                    for a, n in zip(first, self.reference.generated_lengths, strict=True)
                ]
            )
            hidden = torch.from_numpy(self.inputs(name)[at])
            out += 2 * len(at) * input_hessian(hidden, None)
        return out / positions

    def remove(self) -> None:
        (self.folder / "sums.npz").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
