"""`token_embd` and `output`, the matrices outside the blocks: their costs and their bytes.

The head's error changes the margins at once, by h (W^[top1] - W^[top2]) - h (W[top1] - W[top2]): no
gradient is needed. Of the embedding only rows that occur are looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.host.blocks.boundaries import Boundaries
from edge_dtm.host.blocks.encoded import takes_feedback
from edge_dtm.host.blocks.fit import ROW_STEP, best_scales
from edge_dtm.host.blocks.statistics import SAMPLE_STEP
from edge_dtm.host.blocks.text import MEASURED_DRAWS, Text
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.quantize.activations import activation_kind, round_activations
from edge_dtm.host.quantize.equalize import Scales, input_scale
from edge_dtm.host.quantize.gptq import gptq_quantize
from edge_dtm.host.quantize.hessian import DampedHessian, damping_for, input_hessian
from edge_dtm.host.quantize.treat import treat, treated_values

FloatArray = npt.NDArray[np.float32]
EMBEDDED, HEAD = "token_embd", "output"
CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class EdgeInputs:
    """What the ends of the model see, of the base, on the CPU; nothing of the size of a block.

    Of the measured sequences: ids, int64 (tokens,); embedded: float32 (draws, tokens, hidden), the
    margins' gradients at the embeddings; hidden: (positions, hidden), what the head reads where
    margins are taken; top, int64 (positions, 2); edges (sequences + 1,) of the tokens. squares:
    float32 (hidden,), mean squares of what the head reads, all measured tokens. Of the fitted ones:
    looked_up and head, float32 (hidden, hidden), the second moments of the gradients at the
    embeddings and of what the head reads, a margin each; positions of these margins; sample:
    (tokens, hidden), head_squares and head_gradient_squares, float64 (hidden,), for equalization.
    """

    ids: npt.NDArray[np.integer[Any]]
    embedded: FloatArray
    hidden: torch.Tensor
    top: npt.NDArray[np.integer[Any]]
    edges: npt.NDArray[np.integer[Any]]
    squares: FloatArray
    looked_up: torch.Tensor
    head: torch.Tensor
    positions: int
    sample: torch.Tensor
    head_squares: npt.NDArray[np.float64]
    head_gradient_squares: npt.NDArray[np.float64]


@torch.no_grad()
def edge_inputs(model: Llama, text: Text, boundaries: Boundaries) -> EdgeInputs:
    """From the boundaries at both ends. On the model's device, in parts."""
    count, measured, tokens = len(text.sequences), text.measured, text.measured_tokens
    last = boundaries.rows("hidden", model.layers)
    first = boundaries.rows("gradient", 0)

    def head_inputs(places: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
        parts = np.array_split(places, max(1, len(places) // CHUNK_TOKENS))
        return torch.cat(
            [model.norm(torch.from_numpy(last[p]).to(model.device)).cpu() for p in parts]
        )

    looked_up = _moments(first[tokens : text.tokens])
    at = text.margin_positions(measured, count)
    hidden = head_inputs(at)
    fitted = head_inputs(np.arange(tokens, text.tokens))
    top = torch.from_numpy(text.top_ids(measured, count).astype(np.int64)).to(model.device)
    gradient_squares = torch.zeros(model.config.hidden, dtype=torch.float64)
    for start in range(0, len(top), CHUNK_TOKENS):
        part = top[start : start + CHUNK_TOKENS]
        difference = model.head_rows(part[:, 0]) - model.head_rows(part[:, 1])
        gradient_squares += difference.double().square().sum(0).cpu()
    draws = [first[:tokens], first[text.tokens :]]
    seen = head_inputs(np.arange(tokens))
    return EdgeInputs(
        ids=np.concatenate([np.array(s, dtype=np.int64) for s in text.sequences[:measured]]),
        embedded=np.stack(draws),
        hidden=head_inputs(text.margin_positions(0, measured)),
        top=text.top_ids(0, measured),
        edges=text.edges[: measured + 1],
        squares=seen.double().square().mean(0).float().numpy(),
        looked_up=looked_up / len(at),
        head=2 * input_hessian(hidden, None),
        positions=len(at),
        sample=fitted[::SAMPLE_STEP].clone(),
        head_squares=fitted.double().square().mean(0).numpy(),
        head_gradient_squares=(gradient_squares / len(fitted)).numpy(),
    )


def _moments(gradients: FloatArray) -> torch.Tensor:
    total = torch.zeros((gradients.shape[1],) * 2)
    for part in np.array_split(gradients, max(1, len(gradients) // CHUNK_TOKENS)):
        g = torch.from_numpy(np.array(part))
        total += g.T @ g
    return total


def head_scales(inputs: EdgeInputs, weights: FloatArray, config: Any) -> FloatArray:
    """The scales between the last norm and an untied head, float32 (hidden,)."""
    # Which rows of a head meet in a margin is not recorded; all alike is near enough here.
    rows = np.ones(len(weights))[::ROW_STEP]
    return best_scales(
        inputs.sample,
        inputs.head_squares,
        inputs.head_gradient_squares,
        [weights[::ROW_STEP]],
        [rows],
        HEAD,
        config,
    )


def edge_importance(
    inputs: EdgeInputs, component: Component, tied: bool, scales: Scales
) -> FloatArray | None:
    """float32 (hidden,); none for a table of looked-up rows that is not a head too, since there the
    columns are equally important."""
    if component.name == EMBEDDED and not tied:
        return None
    scale = input_scale(scales, component.name)
    return inputs.squares if scale is None else inputs.squares * scale * scale


def edge_feedback(
    inputs: EdgeInputs, component: Component, tied: bool, scales: Scales
) -> DampedHessian:
    """Of the rows looked up and of a head's, both in the units in which they add to the cost."""
    hessian = torch.zeros_like(inputs.head)
    if component.name == EMBEDDED:
        hessian = hessian + inputs.looked_up
    if component.name == HEAD or tied:
        hessian = hessian + inputs.head
    scale = input_scale(scales, component.name)
    if scale is not None:
        s = torch.from_numpy(scale)
        hessian = s[:, None] * hessian * s
    return DampedHessian(hessian, damping_for(inputs.positions, component.row_length))


@torch.no_grad()
def edge_costs(
    inputs: EdgeInputs,
    component: Component,
    treatments: Sequence[Treatment],
    weights: FloatArray,
    tied: bool,
    scales: Scales,
    feedback: bool,
    vector: FloatArray | None = None,
) -> tuple[list[float], list[bool]]:
    """Cost of each treatment, logits squared, and for which error feedback helped.

    weights: float32 (rows, hidden), equalized; only rows that occur are quantized. vector:
    importance in place of our own.
    """
    used = np.unique(np.concatenate([inputs.ids, inputs.top.ravel()]))
    rows = weights[used]
    importance = edge_importance(inputs, component, tied, scales) if vector is None else vector
    scale = input_scale(scales, component.name)
    hidden = inputs.hidden if scale is None else inputs.hidden * torch.from_numpy(scale)
    index_ids, index_top = np.searchsorted(used, inputs.ids), np.searchsorted(used, inputs.top)

    def margins(x: FloatArray, w: FloatArray) -> FloatArray:
        out: FloatArray = np.einsum("ti,ti->t", x, w[index_top[:, 0]] - w[index_top[:, 1]])
        return out

    def cost_of(t: Treatment, new: FloatArray) -> float:
        cost = 0.0
        if component.name == EMBEDDED:
            error = (new - rows)[index_ids]
            z = np.add.reduceat(
                (inputs.embedded * error).sum(-1, dtype=np.float64), inputs.edges[:-1], axis=1
            )
            cost += float(np.square(z).sum() / MEASURED_DRAWS / len(inputs.top))
        if component.name == HEAD or tied:
            seen = round_activations(hidden, activation_kind(t.type)).numpy()
            change = margins(seen, new) - margins(hidden.numpy(), rows)
            cost += float(np.square(change, dtype=np.float64).mean())
        return cost

    costs = [cost_of(t, treated_values(rows, t, importance)) for t in treatments]
    with_feedback = [False] * len(treatments)
    if feedback:
        hessian = edge_feedback(inputs, component, tied, scales)
        which = [j for j, t in enumerate(treatments) if takes_feedback(t)]
        types = [treatments[j].type for j in which]
        encoded = gptq_quantize(torch.from_numpy(rows), types, hessian, threads=1)
        for j, (_, values) in zip(which, encoded, strict=True):
            better = cost_of(treatments[j], values.numpy())
            if better < costs[j]:
                costs[j], with_feedback[j] = better, True
    return costs, with_feedback


def edge_bytes(
    weights: FloatArray,
    treatment: Treatment,
    hessian: DampedHessian | None,
    importance: FloatArray | None,
) -> npt.NDArray[np.uint8]:
    """uint8 (rows, row_bytes). weights: float32 (rows, hidden), equalized. hessian: for error
    feedback, None: plain rounding."""
    if hessian is None:
        return treat(weights, treatment, importance)
    return gptq_quantize(torch.from_numpy(weights), [treatment.type], hessian)[0][0]
