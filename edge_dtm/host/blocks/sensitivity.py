"""What each component's error does to the tokens: gradients times local output error.

For a component with weights W and inputs X, a treatment makes E = X^ W^' - X W' of its output,
X^ being the inputs as the device's kernel rounds them. To first order the margins then change by
the inner product of E with the margins' gradients. One backward pass of sum_t e_t m_t with random
signs e_t gives G; z = <G, E> over a sequence has E[z^2] = sum_t (change of m_t)^2, so

    cost(component, treatment) = sum of z^2 / number of positions,

the mean-square margin change in logits squared. With D = G' X^ this is
z = <D, W^ - W> + <G W, X^ - X>, so one product a rounding kind serves every treatment.

Both terms are taken as independent. So are the errors of different rows of W^ - W, so that the first
term is taken on some rows and scaled up; the second is taken on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.host.blocks.statistics import SITE_OF, Statistics
from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.quantize.activations import activation_kind, round_activations
from edge_dtm.host.quantize.equalize import Scales, input_scale, output_scale


@dataclass(frozen=True)
class Measured:
    """One matrix on the measured sequences, as the equalized model has it, on one device.

    inputs: float32 (tokens, row_length). gradients: at the sampled outputs, (draws, tokens, sampled
    rows). back: at the inputs through all of the matrix, (draws, tokens, row_length). sizes:
    (tokens,), root mean squares of the gradients at all outputs. edges, (sequences + 1,): where
    each sequence begins. positions: margins among the tokens.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor
    back: torch.Tensor
    sizes: torch.Tensor
    edges: npt.NDArray[np.integer[Any]]
    positions: int

    @classmethod
    def of(
        cls,
        statistics: Statistics,
        component: Component,
        scales: Scales,
        config: ModelConfig,
        edges: npt.NDArray[np.integer[Any]],
        positions: int,
        rows: torch.Tensor | None = None,
    ) -> Measured:
        """rows: int64, of the sampled rows those that are wanted; None: all of them."""
        name, part = component.name, component.name.rpartition(".")[2]
        inputs = statistics[f"inputs.{SITE_OF[part]}"]
        gradients, back = statistics[f"gradients.{part}"], statistics[f"back.{part}"]
        sizes, device = statistics[f"sizes.{part}"], inputs.device
        scale, out = input_scale(scales, name), output_scale(scales, name, config)
        if scale is not None:
            s = torch.from_numpy(scale).to(device)
            inputs, back = inputs * s, back / s
        sampled = statistics[f"rows.{part}"].to(device)
        if out is not None:
            gradients = gradients / torch.from_numpy(out).to(device)[sampled]
        if rows is not None:
            gradients = gradients[..., torch.isin(sampled, rows.to(device))]
        return cls(inputs, gradients, back, sizes, edges, positions)


@dataclass(frozen=True)
class Cost:
    """Of one treatment, logits squared: of what it does to the weights and to the inputs."""

    by_weights: float
    by_inputs: float


@torch.no_grad()
def costs_of(
    measured: Measured,
    treatments: Sequence[Treatment],
    weights: torch.Tensor,
    values: Sequence[torch.Tensor],
    rows: int,
) -> list[Cost]:
    """Of each treatment of one block matrix.

    weights: float32 (sampled rows, row_length), Hugging Face's order, equalized. values: of each
    treatment, the same shape. rows: of the whole matrix.
    """
    x, g, draws = measured.inputs, measured.gradients, len(measured.gradients)
    costs: dict[int, Cost] = {}
    for kind in sorted({activation_kind(t.type) for t in treatments}):
        which = [j for j, t in enumerate(treatments) if activation_kind(t.type) == kind]
        rounded = round_activations(x, kind)
        deltas = torch.stack([(values[j] - weights).reshape(-1) for j in which])
        shift = (measured.back * (rounded - x)).sum(-1)  # (draws, tokens)
        by_weights, by_inputs = torch.zeros(len(which), dtype=torch.float64), 0.0
        for a, b in zip(measured.edges, measured.edges[1:], strict=False):
            d = g[:, a:b].transpose(1, 2) @ rounded[a:b]  # (draws, sampled rows, row_length)
            z = (d.reshape(draws, -1) @ deltas.T).double()  # (draws, treatments)
            by_weights += z.square().sum(0).cpu() / draws
            by_inputs += float(shift[:, a:b].sum(1).double().square().sum()) / draws
        by_weights *= rows / len(weights) / measured.positions
        for j, value in zip(which, by_weights.tolist(), strict=True):
            costs[j] = Cost(value, by_inputs / measured.positions)
    return [costs[j] for j in range(len(treatments))]
