"""Zeros fitted in the order in which the layers run: each matrix makes up for all before it.

Fitted alone, a matrix is held to what the original's inputs give. In the pruned model its inputs
are no longer those. Here two streams run side by side, the original's and the treated model's,
and each matrix with zeros is the least-squares answer to

    what the original has at its output  ~  Q times what the treated model feeds it,

the outputs of `attn_output` and `ffn_down` together with the residual stream that they are added
to, so that what earlier layers did wrong is put right as far as Q can. SparseGPT (arXiv
2301.00774) takes the treated model's inputs too, but asks for W times them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.plan import Treatment
from edge_dtm.host.checkpoint.model import module_name
from edge_dtm.host.distill.teacher import batches_by_length, padded
from edge_dtm.host.quantize.gptq import gptq_quantize
from edge_dtm.host.quantize.hessian import DampedHessian, damping_for, effective_tokens
from edge_dtm.host.quantize.masks import refit
from edge_dtm.llamacpp import ggml

ByteArray = npt.NDArray[np.uint8]
BATCH_TOKENS = 2048
# Matrices that share an input, in the order in which a layer runs them; whether the output is
# added to the residual stream, and before which norm that stream is seen.
GROUPS = (
    (("attn_q", "attn_k", "attn_v"), None),
    (("attn_output",), "input_layernorm"),
    (("ffn_gate", "ffn_up"), None),
    (("ffn_down",), "post_attention_layernorm"),
)


@dataclass(frozen=True)
class Pruned:
    """A matrix with zeros: its treatment, its weights before, float32 (rows, row_length), bool of
    the same shape: False where zeros are, the damped moments of the margins' gradients at its
    outputs, and how much each token counts, float32 (tokens,), None: all alike."""

    treatment: Treatment
    weights: torch.Tensor
    kept: torch.Tensor
    outputs: DampedHessian | None
    token_weights: torch.Tensor | None = None


class _Stop(Exception):
    pass


class _Stream:
    """One model's residual stream over all sequences, a layer at a time."""

    def __init__(self, model: Any, sequences: Sequence[Sequence[int]]) -> None:
        self.model, device = model, next(model.parameters()).device
        lengths = [len(s) for s in sequences]
        order = sorted(range(len(sequences)), key=lambda i: (lengths[i], i))
        batches = batches_by_length(lengths, order, BATCH_TOKENS)
        tokens = torch.split(torch.arange(sum(lengths)), lengths)
        # Where each token of `sequences` stands among those of the batches, padding left out.
        self.back = torch.cat([tokens[i] for i in order]).argsort().to(device)
        self.real = [padded([[1] * lengths[i] for i in b]).bool().to(device) for b in batches]
        ids = [padded([sequences[i] for i in b]).to(device) for b in batches]
        self.hidden = [model.model.embed_tokens(x) for x in ids]

    def run(
        self, layer: Any, hidden: torch.Tensor, wanted: Sequence[str], last: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Inputs of the layer's modules of these names and, unless it stops at `last`, its output
        as `out`."""
        seen: dict[str, torch.Tensor] = {}

        def hook(name: str, _: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = args[0]
            if name == last:
                raise _Stop

        handles = [
            layer.get_submodule(name).register_forward_pre_hook(partial(hook, name))
            for name in wanted
        ]
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotation = self.model.model.rotary_emb(hidden, positions)
        with suppress(_Stop):
            seen["out"] = layer(
                hidden, attention_mask=None, position_embeddings=rotation, use_cache=False
            )
        for handle in handles:
            handle.remove()
        return seen


@torch.no_grad()
def prune_sequentially(
    original: Any,
    student: Any,
    pruned: Mapping[str, Pruned],
    sequences: Sequence[Sequence[int]],
    progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[ByteArray, torch.Tensor]]:
    """For each matrix of `pruned` its blocks, uint8 (rows, row_bytes), and values, float32 (rows,
    row_length), both in Hugging Face's row order.

    original, student: load_model's, of the same shape; the student has every treated value but
    those of `pruned`, and is left with all of them. sequences: token ids to fit to. progress:
    called with layers done.
    """
    was, now = _Stream(original, sequences), _Stream(student, sequences)
    encoded: dict[str, tuple[ByteArray, torch.Tensor]] = {}
    for number, (before, after) in enumerate(
        zip(original.model.layers, student.model.layers, strict=True)
    ):
        prefix = f"blk.{number}."
        parts = dict(after.named_modules())
        local = {p: module_name(prefix + p).split(".", 3)[3] for group, _ in GROUPS for p in group}
        steps = [
            (here, local[group[0]], norm)
            for group, norm in GROUPS
            if (here := [p for p in group if prefix + p in pruned])
        ]
        # The original's inputs all in one run; the treated model's change with every step.
        wanted = list(dict.fromkeys(x for _, site, norm in steps for x in (site, norm) if x))
        own = [was.run(before, x, wanted) for x in was.hidden]
        for here, site, norm in steps:
            fed = _fed(own, now, after, site, norm)
            for p in here:
                encoded[prefix + p] = _fit(pruned[prefix + p], *fed)
                parts[local[p]].weight.copy_(encoded[prefix + p][1])
        was.hidden = [seen["out"] for seen in own]
        now.hidden = [now.run(after, x, ())["out"] for x in now.hidden]
        if progress:
            progress(1)
    return encoded


def _fed(
    own: Sequence[Mapping[str, torch.Tensor]], now: _Stream, layer: Any, site: str, norm: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of all tokens, in the order of `sequences`: what the original and the treated model feed a
    group of matrices, float32 (tokens, row_length), and by how much the residual streams differ,
    (tokens, hidden), where the outputs are added to these. own: what the original's layer was fed,
    one mapping a batch."""
    wanted = [site] if norm is None else [norm, site]
    theirs = [now.run(layer, hidden, wanted, site) for hidden in now.hidden]

    def joined(side: Sequence[Mapping[str, torch.Tensor]], name: str) -> torch.Tensor:
        parts = [seen[name][real] for seen, real in zip(side, now.real, strict=True)]
        return torch.cat(parts)[now.back]

    missing = None if norm is None else joined(own, norm) - joined(theirs, norm)
    return joined(own, site), joined(theirs, site), missing


def _fit(
    item: Pruned, was: torch.Tensor, now: torch.Tensor, missing: torch.Tensor | None
) -> tuple[ByteArray, torch.Tensor]:
    """The least squares are damped towards the original weights."""
    v = item.token_weights
    if v is None or not float(v.sum()):
        v = torch.ones(len(now), device=now.device)
    weighted = now * (v / v.sum())[:, None]
    h, cross = weighted.T @ now, was.T @ weighted
    damping = damping_for(effective_tokens(v), item.weights.shape[1])
    mean = float(h.diagonal().double().mean().clamp(min=1e-30))
    feedback = DampedHessian(h, damping)  # has h / mean, damped
    wanted = item.weights @ (cross / mean) + damping * item.weights
    if missing is not None:
        wanted = wanted + missing.T @ weighted / mean
    # The best without zeros is wanted times the inverse; with H as the metric, what is nearest to
    # it is the best with zeros.
    free = torch.linalg.solve(feedback.damped.double(), wanted.double().T).T.float()
    values = refit(free, item.kept, feedback, item.outputs)
    if item.treatment.type == "F16":
        return ggml.quantize("F16", values.cpu().numpy()), values.half().float()
    return gptq_quantize(
        values[None], [item.treatment.type], feedback, item.outputs, kept=item.kept[None]
    )[0]
