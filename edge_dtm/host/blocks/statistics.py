"""What one block's matrices are fitted and measured with, gathered batch by batch.

Sums over the fitted sequences (Hessians need no activations to be kept), and of the measured
sequences the inputs, and the gradients at a sample of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Component
from edge_dtm.host.blocks.sweeps import Piece
from edge_dtm.host.blocks.text import MEASURED_DRAWS, OUTPUT_SEQUENCES, Text
from edge_dtm.host.checkpoint.decoder import MATRICES, SITES
from edge_dtm.host.quantize.gptq import group_rows
from edge_dtm.host.quantize.hessian import scaled_gradients

SITE_OF = {matrix: site for site, fed in SITES.items() for matrix in fed}
MEASURED = {"inputs", "back", "rows", "gradients", "sizes"}
SAMPLE_STEP = 4  # every fourth input is enough to tell strengths of equalization apart


def sampled_rows(component: Component, share: float, seed: int) -> npt.NDArray[np.int64]:
    """Rows whose costs are measured, rising: whole groups of those that are rounded side by side,
    drawn by seed. All of them with a share of 1."""
    size = group_rows(component.rows)
    groups = math.ceil(component.rows / size)
    count = max(1, math.ceil(groups * share))
    name = int.from_bytes(component.name.encode(), "little")
    chosen = np.random.default_rng([seed, name]).permutation(groups)[:count]
    rows = [np.arange(g * size, min((g + 1) * size, component.rows)) for g in sorted(chosen)]
    return np.concatenate(rows)


@dataclass(frozen=True)
class Statistics:
    """One block's, on any device, float32 unless it says otherwise. matrix: one of MATRICES, site:
    one of SITES, n: row_length.

    Of the fitted sequences: `hessian.MATRIX` (n, n), second moments of the inputs, each token
    weighted by the size of the margins' gradient at the matrix's outputs; `known.MATRIX` (), how
    many equally weighted tokens know as much; `moments.MATRIX` (rows, rows) and `output_known.
    MATRIX` (), the same of the gradients at the outputs, those that `moment_rows.MATRIX`, int64,
    names; float64 mean squares of inputs
    `squares.SITE` and of gradients there `gradient_squares.SITE` (n,), of gradients at the outputs
    `output_squares.MATRIX` (rows,); `sample.SITE` (tokens / SAMPLE_STEP, n), some inputs;
    `token_weights.MATRIX` (tokens,), root mean squares of the gradients at all outputs.
    Of the measured sequences: `inputs.SITE` (tokens, n); `back.MATRIX` (draws, tokens, n), the
    gradients at the inputs through that matrix alone; `rows.MATRIX`, int64, the sampled rows, and
    `gradients.MATRIX` (draws, tokens, sampled rows); `sizes.MATRIX` (tokens,), root mean squares
    of the gradients at all outputs.
    """

    tensors: Mapping[str, torch.Tensor]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def save(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}
            save_file(tensors, temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise EdgeDtmError(f"{path} could not be written ({error}): free some space") from None
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, matrix: str | None = None) -> Statistics:
        """Those of one matrix and its site, or all. EdgeDtmError when the file is damaged."""
        from safetensors import SafetensorError, safe_open

        parts = {matrix, SITE_OF[matrix]} if matrix else set()
        try:
            with safe_open(path, framework="pt") as file:
                return cls(
                    {
                        key: file.get_tensor(key)
                        for key in file.keys()  # noqa: SIM118 (not a dict)
                        if not parts or key.partition(".")[2] in parts
                    }
                )
        except (SafetensorError, OSError) as error:
            raise EdgeDtmError(
                f"{path} cannot be read ({error}): run edge-dtm compress again with --no-resume"
            ) from None

    def parts(self) -> tuple[Statistics, Statistics]:
        """Those of the fitted and those of the measured sequences."""
        measured = {k: v for k, v in self.tensors.items() if k.partition(".")[0] in MEASURED}
        fitted = {k: v for k, v in self.tensors.items() if k not in measured}
        return Statistics(fitted), Statistics(measured)

    def to(self, device: torch.device) -> Statistics:
        return Statistics({k: v.to(device) for k, v in self.tensors.items()})


class Gathering:
    """Adds up the statistics of one block. rows: matrix -> its sampled rows; none: of the fitted
    sequences only. all_moments: those of all outputs, not of the sampled ones only."""

    def __init__(
        self,
        text: Text,
        rows: Mapping[str, npt.NDArray[np.int64]] | None,
        all_moments: bool = True,
    ) -> None:
        self.text, self.all_moments = text, all_moments or rows is None
        self.rows = {} if rows is None else {m: torch.from_numpy(r) for m, r in rows.items()}
        self._sums: dict[str, torch.Tensor] = {}
        self._samples: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}
        self._by_token: dict[str, torch.Tensor] = {}  # keys as in Statistics

    def add(self, piece: Piece) -> None:
        if piece.batch[0] < self.text.measured:
            if self.rows:
                self._measure(piece)
        else:
            self._fit(piece)

    def _add(self, key: str, value: torch.Tensor) -> None:
        self._sums[key] = self._sums[key] + value if key in self._sums else value

    def _fit(self, piece: Piece) -> None:
        for site, x in piece.inputs.items():
            self._add(f"squares.{site}", _squares(x))
            back = sum(piece.at_inputs[matrix] for matrix in SITES[site])
            assert isinstance(back, torch.Tensor)
            self._add(f"gradient_squares.{site}", _squares(back.flatten(0, 1)) / len(back))
            self._samples[site].append(x[::SAMPLE_STEP].clone())
        near = self._near(piece)
        for matrix, g in piece.at_outputs.items():
            x, sizes = piece.inputs[SITE_OF[matrix]], _sizes(g)
            places = piece.places.to(g.device) - self.text.measured_tokens
            self._put(
                f"token_weights.{matrix}",
                (self.text.tokens - self.text.measured_tokens,),
                places,
                sizes,
            )
            self._add(f"hessian.{matrix}", (x * sizes[:, None]).T @ x)
            self._add(f"weights.{matrix}", _weight_sums(sizes))
            self._add(f"output_squares.{matrix}", _squares(g.flatten(0, 1)) / len(g))
            if len(near):
                self._add(f"output_weights.{matrix}", _weight_sums(sizes[near]))
                scaled = scaled_gradients(g[0, near], sizes[near])
                if not self.all_moments:
                    scaled = scaled[:, self.rows[matrix].to(scaled.device)]
                self._add(f"moments.{matrix}", scaled.T @ scaled)

    def _near(self, piece: Piece) -> torch.Tensor:
        """int64: which of its tokens count for the moments of the gradients at the outputs."""
        last = self.text.measured + OUTPUT_SEQUENCES
        ids = torch.tensor(piece.batch)
        lengths = torch.tensor([len(self.text.sequences[i]) for i in piece.batch])
        return (
            (torch.repeat_interleave(ids, lengths) < last).nonzero()[:, 0].to(piece.before.device)
        )

    def _measure(self, piece: Piece) -> None:
        tokens, places = self.text.measured_tokens, piece.places.to(piece.before.device)
        for site, x in piece.inputs.items():
            self._put(f"inputs.{site}", (tokens, x.shape[1]), places, x)
        for matrix, g in piece.at_outputs.items():
            rows = self.rows[matrix].to(g.device)
            shape = (MEASURED_DRAWS, tokens, len(rows))
            self._put(f"gradients.{matrix}", shape, places, g[..., rows])
            back = piece.at_inputs[matrix]
            self._put(f"back.{matrix}", (MEASURED_DRAWS, tokens, back.shape[-1]), places, back)
            self._put(f"sizes.{matrix}", (tokens,), places, _sizes(g))

    def _put(
        self, key: str, shape: Sequence[int], places: torch.Tensor, values: torch.Tensor
    ) -> None:
        if key not in self._by_token:
            self._by_token[key] = torch.zeros(shape, device=values.device)
        if len(shape) == 3:
            self._by_token[key][:, places] = values
        else:
            self._by_token[key][places] = values

    def finish(self) -> Statistics:
        tokens = self.text.tokens - self.text.measured_tokens
        out: dict[str, Any] = dict(self._by_token)
        out |= {f"rows.{m}": r for m, r in self.rows.items()}
        for site, samples in self._samples.items():
            out[f"sample.{site}"] = torch.cat(samples)
            out[f"squares.{site}"] = self._sums[f"squares.{site}"] / tokens
            out[f"gradient_squares.{site}"] = self._sums[f"gradient_squares.{site}"] / tokens
        for matrix in MATRICES:
            total, known = _known_tokens(self._sums[f"weights.{matrix}"])
            out[f"hessian.{matrix}"] = self._sums[f"hessian.{matrix}"] / total
            out[f"known.{matrix}"] = known
            moments = out[f"moments.{matrix}"] = self._sums[f"moments.{matrix}"]
            every = torch.arange(len(moments))
            out[f"moment_rows.{matrix}"] = every if self.all_moments else self.rows[matrix]
            out[f"output_known.{matrix}"] = _known_tokens(self._sums[f"output_weights.{matrix}"])[1]
            out[f"output_squares.{matrix}"] = self._sums[f"output_squares.{matrix}"] / tokens
        return Statistics(out)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """(tokens, n) -> sums of squares over the tokens, float64 (n,)."""
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=0)
    return norms.double().square()


def _sizes(gradients: torch.Tensor) -> torch.Tensor:
    """(draws, tokens, n) -> root mean squares over draws and n, (tokens,)."""
    draws, _, n = gradients.shape
    norms: torch.Tensor = torch.linalg.vector_norm(gradients, dim=(0, 2))
    return norms / math.sqrt(draws * n)


def _weight_sums(weights: torch.Tensor) -> torch.Tensor:
    """(3,): number, sum and sum of squares of token weights, float64."""
    w = weights.double()
    return torch.stack([torch.full_like(w.sum(), len(w)), w.sum(), w.square().sum()])


def _known_tokens(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a weighted Hessian is divided by, and Kish's effective sample size, both ()."""
    count, total, squares = sums
    if not float(squares):
        return torch.ones_like(total).float(), count.float()
    return total.float(), (total.square() / squares).float()
