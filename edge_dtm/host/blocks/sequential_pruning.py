"""Zeros fitted in the order in which the blocks run: each matrix makes up for all before it.

Fitted alone, a matrix is held to what the original's inputs give. In the pruned model its inputs
are no longer those. Here two streams run side by side, the original's and the treated model's,
and each matrix with zeros is the least-squares answer to

    what the original has at its output  ~  Q times what the treated model feeds it,

the outputs of `attn_output` and `ffn_down` together with the residual stream that they are added
to, so that what earlier blocks did wrong is put right as far as Q can. SparseGPT (arXiv
2301.00774) takes the treated model's inputs too, but asks for W times them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.host.blocks.text import Text
from edge_dtm.host.checkpoint.decoder import SITES, Block, attended, gated
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.quantize.gptq import gptq_quantize
from edge_dtm.host.quantize.hessian import DampedHessian, damping_for, effective_tokens
from edge_dtm.host.quantize.masks import refit
from edge_dtm.llamacpp import ggml

ByteArray = npt.NDArray[np.uint8]
ADDED = ("attn_output", "ffn_down")  # their outputs are added to the residual stream


@dataclass(frozen=True)
class Pruned:
    """A matrix with zeros: its GGML type, how much each token counts, float32 (tokens,), None: all
    alike, and what gives the damped Hessian of the margins' gradients at its outputs, None: rows on
    their own."""

    type: str
    token_weights: torch.Tensor | None
    outputs: Callable[[], DampedHessian | None]


class _Stream:
    """One model's residual stream over all fitted sequences. hidden: of each batch, (sequences,
    longest, hidden); block: the one that it stands before or in."""

    def __init__(self, model: Llama, text: Text, batches: Sequence[tuple[int, ...]]) -> None:
        self.model = model
        self.hidden = [model.embed(text.ids(b).to(model.device)) for b in batches]
        self.block = Block(model.config, {})

    def inputs(self, site: str, batch: int) -> torch.Tensor:
        """What the site's matrices read, (sequences, longest, row_length)."""
        hidden = self.hidden[batch]
        if site == "attn_q":
            return self.block.norm("attn_norm", hidden)
        if site == "ffn_gate":
            return self.block.norm("ffn_norm", hidden)
        if site == "ffn_down":
            return gated(self.block, hidden)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return attended(self.block, hidden, self.model.turn(positions))

    def add(self, site: str) -> None:
        """To the residual stream what the site's matrix makes."""
        for batch, hidden in enumerate(self.hidden):
            hidden += self.block.linear(site, self.inputs(site, batch))


@torch.no_grad()
def prune_sequentially(
    original: Llama,
    treated: Llama,
    text: Text,
    wanted: Callable[[str], Pruned | None],
    keep: Callable[[str, ByteArray], None],
    done: Callable[[int], None] = lambda layer: None,
) -> None:
    """Fit zeros to the text's fitted sequences, a block at a time, of which no more is held than
    the residual streams.

    treated: of the original's shape, has every treated value; the zeros of what is wanted are held
    where it has them. wanted: asked for each matrix of the blocks by the component's name, in the
    order in which they run; None: it stays as it is. keep: takes a component's new blocks, uint8
    (rows, row_bytes), Hugging Face's row order. done: called with the number of each block.
    """
    batches = [b for b in text.batches if b[0] >= text.measured]
    was, now = _Stream(original, text, batches), _Stream(treated, text, batches)
    for layer in range(original.layers):
        was.block, now.block = original.block(layer), treated.block(layer)
        for site, matrices in SITES.items():
            names = {m: f"blk.{layer}.{m}" for m in matrices}
            pruned = {m: item for m in matrices if (item := wanted(names[m]))}
            sums = _sums(pruned, site, was, now, text, batches)
            for m, item in pruned.items():
                weights, start = (s.block.tensors[m + ".weight"] for s in (was, now))
                data = _fit(item, weights, start != 0, sums.pop(m))
                keep(names[m], data)
                values = torch.from_numpy(ggml.dequantize(item.type, data, weights.shape[1]))
                tensors = {**now.block.tensors, m + ".weight": values.to(treated.device)}
                now.block = Block(treated.config, tensors)
            if site in ADDED:
                was.add(site)
                now.add(site)
        done(layer)


@dataclass
class _Sums:
    """Over all fitted tokens, each counted by its share of `token_weights` (tokens,): moments, x x'
    of what the treated model feeds the matrix, and cross, o x' with what the original feeds it,
    (row_length, row_length); missing, d x' with what the treated residual stream lacks, (hidden,
    row_length), where the output is added to it."""

    token_weights: torch.Tensor
    moments: torch.Tensor
    cross: torch.Tensor
    missing: torch.Tensor | None


def _sums(
    pruned: Mapping[str, Pruned],
    site: str,
    was: _Stream,
    now: _Stream,
    text: Text,
    batches: Sequence[tuple[int, ...]],
) -> dict[str, _Sums]:
    """Of each matrix that is to be fitted, all of one site."""
    sums: dict[str, _Sums] = {}
    for number, batch in enumerate(batches if pruned else ()):
        real, places = text.real(batch), text.places(batch) - text.measured_tokens
        x, o = (s.inputs(site, number)[real] for s in (now, was))
        d = (was.hidden[number] - now.hidden[number])[real] if site in ADDED else None
        for matrix, item in pruned.items():
            if matrix not in sums:
                sums[matrix] = _no_sums(item, x, d, text.tokens - text.measured_tokens)
            to = sums[matrix]
            weighted = x * (to.token_weights[places] / to.token_weights.sum())[:, None]
            to.moments.addmm_(weighted.T, x)
            to.cross.addmm_(o.T, weighted)
            if to.missing is not None and d is not None:
                to.missing.addmm_(d.T, weighted)
    return sums


def _no_sums(item: Pruned, x: torch.Tensor, d: torch.Tensor | None, tokens: int) -> _Sums:
    v, width = item.token_weights, x.shape[1]
    if v is None or not float(v.sum()):
        v = x.new_ones(tokens)
    missing = None if d is None else x.new_zeros(d.shape[1], width)
    return _Sums(v, x.new_zeros(width, width), x.new_zeros(width, width), missing)


def _fit(item: Pruned, weights: torch.Tensor, kept: torch.Tensor, sums: _Sums) -> ByteArray:
    """The least squares are damped towards the original weights."""
    damping = damping_for(effective_tokens(sums.token_weights), weights.shape[1])
    mean = float(sums.moments.diagonal().double().mean().clamp(min=1e-30))
    feedback = DampedHessian(sums.moments, damping)  # has moments / mean, damped
    wanted = weights @ (sums.cross / mean) + damping * weights
    if sums.missing is not None:
        wanted = wanted + sums.missing / mean
    # The best without zeros is wanted times the inverse; with H as the metric, what is nearest to
    # it is the best with zeros.
    free = torch.linalg.solve(feedback.damped.double(), wanted.double().T).T.float()
    outputs = item.outputs()
    values = refit(free, kept, feedback, outputs)
    if item.type == "F16":
        return ggml.quantize("F16", values.cpu().numpy())
    return gptq_quantize(values[None], [item.type], feedback, outputs, kept=kept[None])[0][0]
