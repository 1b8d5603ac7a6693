"""What distillation trains: matrices on the grids of the plan, and the gains of the norms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Treatment
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


HALF_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Trained:
    """A component as it would be shipped without distillation.

    importance: float32 (row_length,), what ggml's quantizer weighs columns with, or None; start:
    float32 (rows, row_length) in Hugging Face layout, masked and on the grid. Zeros of the start
    are held where the treatment has a zero_share.
    """

    treatment: Treatment
    importance: FloatArray | None
    start: FloatArray


def unit_sizes(start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a weight is measured in, its row's size times its column's over the matrix's: float32
    (rows, 1) and (1, row_length), root mean squares of what is not zero.

    AdamW moves every weight by about the same. Equalization has channels of very different sizes,
    and a step that is small for one is large for another; counted in these units a step is the
    same share of every weight, however channels are scaled.
    """
    there = (start != 0).float()

    def size(dim: int) -> torch.Tensor:
        sums, counts = start.square().sum(dim, keepdim=True), there.sum(dim, keepdim=True)
        return (sums / counts.clamp(min=1)).sqrt()

    rows, columns = size(1), size(0)
    whole = (start.square().sum() / there.sum().clamp(min=1)).sqrt()
    least = whole * 1e-4 + torch.finfo(torch.float32).tiny
    return rows.clamp(min=least), columns.clamp(min=least) / whole.clamp(min=least)


class TrainedGain:
    """A norm's gains: the module's `parameter`, and `latent`, what the optimizer updates, in units
    of their sizes at the start."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.parameter = parameter
        start = parameter.detach()
        least = start.square().mean().sqrt() * 1e-3 + torch.finfo(torch.float32).tiny
        self.unit = start.abs().clamp(min=least)
        self.latent = torch.nn.Parameter(start / self.unit)

    def take_gradient(self) -> None:
        if self.parameter.grad is not None:  # a removed attention's norm has none
            self.latent.grad = self.parameter.grad * self.unit
            self.parameter.grad = None

    @torch.no_grad()
    def follow(self) -> None:
        self.parameter.copy_(self.latent * self.unit)

    @torch.no_grad()
    def restart(self, values: FloatArray) -> None:
        """Gains and latent are these."""
        self.parameter.copy_(torch.from_numpy(values))
        self.latent.copy_(self.parameter / self.unit)


class TrainedMatrix:
    """A trained component: `parameter`, the module's weight, holds the effective values; `latent`,
    float32 of the same shape, is what the optimizer updates, in `unit_sizes`."""

    def __init__(self, name: str, trained: Trained, parameter: torch.nn.Parameter) -> None:
        self.name, self.type = name, trained.treatment.type
        self.importance, self.parameter = trained.importance, parameter
        start = torch.tensor(trained.start, dtype=torch.float32, device=parameter.device)
        if start.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(parameter.shape)}, not {tuple(start.shape)}")
        parameter.data = start
        self.rows, self.columns = unit_sizes(start)
        self.latent = torch.nn.Parameter(start / self.rows / self.columns)
        # Latents of zeros that are held get no gradient and no decay, so they stay exactly 0.
        self.mask = start != 0 if trained.treatment.zero_share else None
        # rounded = weights + offset until the next rounding. At the start it is zero: the start
        # is on the grid, though not always where the quantizer itself would put it.
        self.offset: torch.Tensor | None = None

    def take_gradient(self) -> None:
        """The effective values' gradient is the latent's, except at held zeros."""
        gradient = self.parameter.grad
        assert gradient is not None
        if self.mask is not None:
            gradient.mul_(self.mask)
        self.latent.grad = gradient.mul_(self.rows).mul_(self.columns)
        self.parameter.grad = None

    def weights(self) -> torch.Tensor:
        """What the latent stands for."""
        return self.latent.detach() * self.rows * self.columns

    @torch.no_grad()
    def follow(self) -> None:
        """Effective values after an update of the latent, with the roundings as they are known."""
        self.parameter.copy_(self.weights())
        if self.type in HALF_TYPES:
            self.parameter.copy_(self.parameter.to(HALF_TYPES[self.type]).float())
        elif self.offset is not None:
            self.parameter.add_(self.offset)

    @torch.no_grad()
    def restart(self, values: FloatArray) -> None:
        """Effective values and latent are these, which lie on the grid."""
        self.parameter.copy_(torch.from_numpy(values))
        self.latent.copy_(self.parameter / self.rows / self.columns)
        self.offset = None

    @torch.no_grad()
    def round(self) -> ByteArray:
        """Effective values on the grid again; returns the blocks they are decoded from, uint8
        (rows, row_bytes). Needs a finite latent."""
        wanted = self.weights()
        weights = wanted.cpu().numpy()
        blocks = ggml.quantize(self.type, weights, self.importance)
        values = torch.from_numpy(ggml.dequantize(self.type, blocks, weights.shape[1]))
        self.parameter.copy_(values)
        if self.mask is not None and bool((self.parameter[~self.mask] != 0).any()):
            raise EdgeDtmError(
                f"{self.name}: {self.type} cannot hold zeros: distill a plan whose zeros are in "
                "Q8_0 or F16"
            )
        if self.type not in HALF_TYPES:
            if self.offset is None:
                self.offset = torch.empty_like(self.latent)
            torch.sub(self.parameter.detach(), wanted, out=self.offset)
        return blocks


def distillation_bytes(block_weights: int, edge_weights: int, quantized: bool) -> int:
    """Peak memory besides activations: of each weight of a block the latent and the running value,
    the gradient and AdamW's two moments, with a grid other than F16's also what rounding moves it
    by, in float32; the embedding and two heads, edge_weights being those of one."""
    return (24 if quantized else 20) * block_weights + 12 * edge_weights
