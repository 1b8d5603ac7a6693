"""What each component's error does to the tokens: gradients times local output error.

For a component with weights W and inputs X, a treatment makes E = X^ W^' - X W' of its output,
X^ being the inputs as the device's kernel rounds them. To first order the margins then change by
the inner product of E with the margins' gradients. One backward pass of sum_t e_t m_t with random
signs e_t gives G; z = <G, E> over a sequence has E[z^2] = sum_t (change of m_t)^2, so

    cost(component, treatment) = sum of z^2 / number of positions,

the mean-square margin change in logits squared. With D = G' X^ this is
z = <D, W^ - W> + <G W, X^ - X>, so one product a rounding kind serves every treatment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.host.blocks.activations import SIGN_DRAWS, Activations
from edge_dtm.host.blocks.capture import EMBEDDED
from edge_dtm.host.blocks.encoded import takes_feedback
from edge_dtm.host.quantize.activations import activation_kind, round_activations
from edge_dtm.host.quantize.gptq import gptq_quantize
from edge_dtm.host.quantize.hessian import DampedHessian
from edge_dtm.host.quantize.treat import prune_order, treated_values

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.integer[Any]]


@torch.no_grad()
def component_costs(
    activations: Activations,
    component: Component,
    treatments: Sequence[Treatment],
    weights: FloatArray,
    device: torch.device,
    importance: FloatArray | None,
    known: Mapping[Treatment, torch.Tensor] | None = None,
) -> list[float]:
    """Cost of each treatment of one block matrix. weights: float32 (rows, row_length), HF layout
    (rows are quantized alone, so their order is no matter). known: the values, float32 (rows,
    row_length) on the device, of treatments that are not plain rounding."""
    w = torch.from_numpy(np.ascontiguousarray(weights)).to(device)
    x = torch.from_numpy(np.array(activations.inputs(component.name))).to(device)
    g = torch.from_numpy(activations.gradients(component.name)).to(device)
    order = prune_order(weights, importance) if any(t.zero_share for t in treatments) else None
    costs = [0.0] * len(treatments)
    positions = int(activations.reference.generated_lengths.sum())
    back = g @ w  # (draws, tokens, row_length)
    for kind in sorted({activation_kind(t.type) for t in treatments}):
        which = [j for j, t in enumerate(treatments) if activation_kind(t.type) == kind]
        rounded = round_activations(x, kind)
        deltas = torch.stack(
            [
                (
                    known[treatments[j]]
                    if known and treatments[j] in known
                    else torch.from_numpy(
                        treated_values(weights, treatments[j], importance, order)
                    ).to(device)
                )
                .sub(w)
                .reshape(-1)
                for j in which
            ]
        )
        shift = (back * (rounded - x)).sum(-1)  # (draws, tokens)
        total = torch.zeros(len(which), dtype=torch.float64)
        for a, b in zip(activations.edges, activations.edges[1:], strict=False):
            d = g[:, a:b].transpose(1, 2) @ rounded[a:b]  # (draws, rows, row_length)
            z = d.reshape(SIGN_DRAWS, -1) @ deltas.T + shift[:, a:b].sum(1, keepdim=True)
            total += z.double().square().sum(0).cpu() / SIGN_DRAWS
        for j, value in zip(which, (total / positions).tolist(), strict=True):
            costs[j] = value
    return costs


@torch.no_grad()
def edge_costs(
    activations: Activations,
    component: Component,
    treatments: Sequence[Treatment],
    weights: FloatArray,
    importance: FloatArray | None,
    tied: bool,
    feedback: DampedHessian | None = None,
) -> tuple[list[float], list[bool]]:
    """Costs of `token_embd` (its rows are looked up) and `output` (or a tied embedding), and for
    which treatments error feedback helped.

    The head's error changes the margins at once, by h (W^[top1] - W^[top2]) - h (W[top1] -
    W[top2]): no gradient is needed. Only rows that occur are quantized.
    """
    looked_up = component.name == EMBEDDED
    is_head = component.name == "output" or tied
    ids, at, top = _edge_tokens(activations)
    used = np.unique(np.concatenate([ids, top.ravel()]))
    rows = weights[used]
    index_ids, index_top = np.searchsorted(used, ids), np.searchsorted(used, top)
    hidden = torch.from_numpy(np.array(activations.inputs(component.name)[at])) if is_head else None
    gradients = activations.gradients(EMBEDDED) if looked_up else None
    w = torch.from_numpy(rows)

    def cost_of(t: Treatment, new: FloatArray) -> float:
        cost = 0.0
        if gradients is not None:
            error = (new - rows)[index_ids]
            z = np.add.reduceat(
                (gradients * error).sum(-1, dtype=np.float64), activations.edges[:-1], axis=1
            )
            cost += float(np.square(z).sum() / SIGN_DRAWS / len(at))
        if hidden is not None:
            seen = round_activations(hidden, activation_kind(t.type)).numpy()
            after = np.einsum("ti,ti->t", seen, new[index_top[:, 0]] - new[index_top[:, 1]])
            before = np.einsum(
                "ti,ti->t", hidden.numpy(), rows[index_top[:, 0]] - rows[index_top[:, 1]]
            )
            cost += float(np.square(after - before, dtype=np.float64).mean())
        return cost

    costs = [cost_of(t, treated_values(rows, t, importance)) for t in treatments]
    with_feedback = [False] * len(treatments)
    if feedback is not None:
        which = [j for j, t in enumerate(treatments) if takes_feedback(t)]
        encoded = gptq_quantize(w, [treatments[j].type for j in which], feedback, threads=1)
        for j, (_, values) in zip(which, encoded, strict=True):
            better = cost_of(treatments[j], values.numpy())
            if better < costs[j]:
                costs[j], with_feedback[j] = better, True
    return costs, with_feedback


def _edge_tokens(activations: Activations) -> tuple[IntArray, IntArray, IntArray]:
    """Over all sequences: the ids that are looked up, (tokens,); where margins are taken among the
    tokens, (positions,); and the two likeliest ids there, (positions, 2)."""
    ref = activations.reference
    lengths = [int(b - a) for a, b in zip(activations.edges, activations.edges[1:], strict=False)]
    ids = np.concatenate(
        [(ref.prompt(r) + ref.generated(r))[:n] for r, n in enumerate(lengths)]
    ).astype(np.int64)
    at = np.concatenate(
        [
            activations.edges[r] + ref.prompt_lengths[r] - 1 + np.arange(ref.generated_lengths[r])
            for r in range(len(ref))
        ]
    )
    top = np.concatenate([ref.top_ids[r, : ref.generated_lengths[r], :2] for r in range(len(ref))])
    return ids, at, top
