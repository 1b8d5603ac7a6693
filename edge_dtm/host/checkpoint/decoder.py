"""One decoder block of a Llama as functions of tensors, float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from edge_dtm.host.checkpoint.checkpoint import ModelConfig

# What each matrix reads; the matrices that share an input share a site, named after the first.
SITES = {
    "attn_q": ("attn_q", "attn_k", "attn_v"),
    "attn_output": ("attn_output",),
    "ffn_gate": ("ffn_gate", "ffn_up"),
    "ffn_down": ("ffn_down",),
}
MATRICES = tuple(matrix for fed in SITES.values() for matrix in fed)

Rotation = tuple[torch.Tensor, torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Block:
    """The tensors of one decoder block on one device, all float32.

    tensors: `attn_q.weight` (rows, row_length) in Hugging Face's row order, `attn_norm.weight`
    (hidden,), biases (rows,) where the model has them.
    """

    config: ModelConfig
    tensors: Mapping[str, torch.Tensor]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """(..., row_length) -> (..., rows)."""
        return F.linear(x, self.tensors[name + ".weight"], self.tensors.get(name + ".bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden), the same shape out."""
        return rms_norm(x, self.tensors[name + ".weight"], self.config.rms_epsilon)


@dataclass
class Taps:
    """What a block's matrices read and write during one run.

    inputs: matrix -> (sequences, tokens, row_length), one tensor for each matrix, so that each has
    a gradient of its own. outputs: matrix -> (sequences, tokens, rows).
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


def rms_norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, float32, arXiv 1910.07467."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Rotations a position in radians, float32 (head_dim / 2,), arXiv 2104.09864, with Llama 3's or
    linear scaling where the model has one."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_linear:
        frequencies = frequencies / config.rope_linear
    if config.rope_factors is not None:
        frequencies = frequencies / torch.tensor(config.rope_factors)
    return frequencies


def rotation(frequencies: torch.Tensor, positions: torch.Tensor) -> Rotation:
    """Cosine and sine for `run_block`, float32 (sequences or 1, 1, tokens, head_dim / 2).

    positions: int64 (sequences or 1, tokens).
    """
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, turn: Rotation) -> torch.Tensor:
    """x: (sequences, heads, tokens, head_dim), first half rotated against second half."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turn
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each token looks at those before it and itself. q: (sequences, heads, tokens, head_dim);
    k, v: (sequences, kv_heads, tokens, head_dim). Padding has to stand to the right."""
    group = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, repeat(k, group), repeat(v, group), is_causal=True)


def repeat(x: torch.Tensor, group: int) -> torch.Tensor:
    """Every KV head as often as query heads share it, (sequences, heads, tokens, head_dim)."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def attended(
    block: Block,
    hidden: torch.Tensor,
    turn: Rotation,
    attention: Attention = causal_attention,
    taps: Taps | None = None,
) -> torch.Tensor:
    """What `attn_output` reads, (sequences, tokens, heads * head_dim). Arguments as in `run_block`."""
    c = block.config
    sequences, tokens, _ = hidden.shape

    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(sequences, tokens, count, c.head_dim).transpose(1, 2)

    q, k, v = _apply(block, "attn_q", block.norm("attn_norm", hidden), taps)
    mixed = attention(
        rotate(heads(q, c.heads), turn), rotate(heads(k, c.kv_heads), turn), heads(v, c.kv_heads)
    )
    return mixed.transpose(1, 2).reshape(sequences, tokens, c.heads * c.head_dim)


def gated(block: Block, hidden: torch.Tensor, taps: Taps | None = None) -> torch.Tensor:
    """What `ffn_down` reads, (sequences, tokens, ffn). hidden: with the attention's output added."""
    gate, up = _apply(block, "ffn_gate", block.norm("ffn_norm", hidden), taps)
    return F.silu(gate) * up


def run_block(
    block: Block,
    hidden: torch.Tensor,
    turn: Rotation,
    attention: Attention = causal_attention,
    taps: Taps | None = None,
) -> torch.Tensor:
    """The residual stream behind the block, (sequences, tokens, hidden) as it was before it.

    turn: of the tokens' positions, see `rotation`. attention: from q (sequences, heads, tokens,
    head_dim) and k, v (sequences, kv_heads, tokens, head_dim), rotated, to q's shape.
    """
    mixed = attended(block, hidden, turn, attention, taps)
    hidden = hidden + _apply(block, "attn_output", mixed, taps)[0]
    return hidden + _apply(block, "ffn_down", gated(block, hidden, taps), taps)[0]


def _apply(block: Block, site: str, x: torch.Tensor, taps: Taps | None) -> list[torch.Tensor]:
    inputs = [x] * len(SITES[site])
    if taps is not None:
        inputs = [x.view_as(x) for _ in inputs]
    outputs = [block.linear(m, i) for m, i in zip(SITES[site], inputs, strict=True)]
    if taps is not None:
        taps.inputs.update(zip(SITES[site], inputs, strict=True))
        taps.outputs.update(zip(SITES[site], outputs, strict=True))
    return outputs
