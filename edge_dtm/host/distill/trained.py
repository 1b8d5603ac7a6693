"""What distillation trains: matrices on the grids of the plan, and the gains of the norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.ggml_types import facts
from edge_dtm.formats.plan import Plan, Treatment
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.model import module_name
from edge_dtm.host.values import Encoded
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Start:
    """A component as it would be shipped without distillation.

    importance: float32 (row_length,), what ggml's quantizer weighs columns with, or None; values:
    float32 (rows, row_length) in Hugging Face layout, masked and on the grid. Their zeros are held
    where the treatment has a zero_share.
    """

    treatment: Treatment
    importance: FloatArray | None
    values: FloatArray


def start_values(checkpoint: Checkpoint, plan: Plan, encoded: Encoded) -> dict[str, Start]:
    """Every component as the plan ships it."""
    out = {}
    for c, t in plan.pairs:
        values = ggml.dequantize(t.type, np.asarray(encoded.encoded(c, t)), c.row_length)
        importance = encoded.importance(c.name) if facts(t.type).importance != "ignored" else None
        out[c.name] = Start(t, importance, checkpoint.hf_rows(c.name, values))
    return out


def set_weights(model: Any, starts: Mapping[str, Start]) -> None:
    """Put the values into a model of load_model."""
    for name, start in starts.items():
        modules = [model.get_submodule(module_name(name))]
        if name == "token_embd" and model.config.tie_word_embeddings:
            modules.append(model.lm_head)
        for module in modules:
            module.weight.data = torch.tensor(start.values, device=module.weight.device)


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


class Trained:
    """A parameter of the model, which holds the effective values, and `latent`, float32 of its
    shape: what the optimizer updates, the weights before rounding in units of their size."""

    def __init__(self, parameter: torch.nn.Parameter, units: tuple[torch.Tensor, ...]) -> None:
        self.parameter, self.units = parameter.requires_grad_(True), units
        self.latent = torch.nn.Parameter(torch.empty_like(parameter))
        self.restart(parameter.detach())

    @torch.no_grad()
    def restart(self, values: torch.Tensor) -> None:
        """Effective values and latent are these."""
        self.parameter.copy_(values)
        latent = self.parameter
        for unit in self.units:
            latent = latent / unit
        self.latent.copy_(latent)

    def take_gradient(self) -> None:
        """The effective values' gradient is the latent's."""
        gradient = self.parameter.grad
        assert gradient is not None
        for unit in self.units:
            gradient.mul_(unit)
        self.latent.grad, self.parameter.grad = gradient, None

    def weights(self) -> torch.Tensor:
        """What the latent stands for."""
        weights = self.latent.detach()
        for unit in self.units:
            weights = weights * unit
        return weights

    @torch.no_grad()
    def follow(self) -> None:
        """Effective values after an update of the latent."""
        self.parameter.copy_(self.weights())


class TrainedGain(Trained):
    """The gains of a norm."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        start = parameter.detach()
        least = start.square().mean().sqrt() * 1e-3 + torch.finfo(torch.float32).tiny
        super().__init__(parameter, (start.abs().clamp(min=least),))


class TrainedMatrix(Trained):
    """The weights of a component, rounded by ggml's own quantizer. parameter: holds the start."""

    def __init__(self, start: Start, parameter: torch.nn.Parameter) -> None:
        self.start, self.type = start, start.treatment.type
        # Latents of zeros that are held get no gradient and no decay, so they stay exactly 0.
        self.mask = parameter.detach() != 0 if start.treatment.zero_share else None
        # rounded = weights + offset until the next rounding. At the start it is zero: the start
        # is on the grid, though not always where the quantizer itself would put it.
        self.offset: torch.Tensor | None = None
        super().__init__(parameter, unit_sizes(parameter.detach()))

    def take_gradient(self) -> None:
        """The effective values' gradient is the latent's, except at held zeros."""
        if self.mask is not None:
            assert self.parameter.grad is not None
            self.parameter.grad.mul_(self.mask)
        super().take_gradient()

    @torch.no_grad()
    def follow(self) -> None:
        """Effective values after an update of the latent, with the roundings as they are known."""
        super().follow()
        if self.type == "F16":
            self.parameter.copy_(self.parameter.half().float())
        elif self.offset is not None:
            self.parameter.add_(self.offset)

    def restart_from(self, blocks: torch.Tensor | None) -> None:
        """From blocks that `round` returned, None: from the start."""
        self.offset = None
        values = self.start.values if blocks is None else self._decoded(blocks.numpy())
        self.restart(torch.from_numpy(values))

    def _decoded(self, blocks: npt.NDArray[np.uint8]) -> FloatArray:
        return ggml.dequantize(self.type, blocks, self.parameter.shape[1])

    @torch.no_grad()
    def round(self) -> torch.Tensor:
        """Effective values on the grid again; returns the blocks they are decoded from, uint8
        (rows, row_bytes). Needs a finite latent."""
        wanted = self.weights()
        blocks = ggml.quantize(self.type, wanted.cpu().numpy(), self.start.importance)
        self.parameter.copy_(torch.from_numpy(self._decoded(blocks)))
        if self.type != "F16":
            self.offset = self.parameter.detach() - wanted
        return torch.from_numpy(blocks)


def distillation_bytes(block_weights: int, edge_weights: int, quantized: bool) -> int:
    """Peak memory besides activations: of each weight of a block the latent and the running value,
    the gradient and AdamW's two moments, with a grid other than F16's also what rounding moves it
    by, in float32; the embedding and two heads, edge_weights being those of one."""
    return (24 if quantized else 20) * block_weights + 12 * edge_weights
