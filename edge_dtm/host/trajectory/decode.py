"""Several prompts continued side by side, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.checkpoint.decoder import causal_attention, run_block
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.sequences import padded

CACHE_BYTES = 2**31  # of keys and values at a time; a fixed number, so that batches are the same
BATCH_SEQUENCES = 64


def sequences_at_once(config: ModelConfig, tokens: int) -> int:
    """How many sequences of that many tokens are continued side by side."""
    each = config.layers * config.kv_heads * config.head_dim * 2 * 4 * tokens
    return max(1, min(BATCH_SEQUENCES, CACHE_BYTES // each))


class Decoding:
    """A batch of prompts that goes on. logits: float32 (sequences, vocab), of the next token."""

    @torch.no_grad()
    def __init__(self, model: Llama, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        c, device = model.config, model.device
        self.model = model
        self.lengths = torch.tensor([len(p) for p in prompts], device=device)  # (sequences,)
        ids = padded(prompts).to(device)  # (sequences, longest)
        shape = (c.layers, len(prompts), c.kv_heads, ids.shape[1] + tokens, c.head_dim)
        # Zeros, since what a mask hides still must not be NaN.
        self._keys = torch.zeros(shape, device=device)
        self._values = torch.zeros(shape, device=device)
        hidden = model.embed(ids)
        turn = model.turn(torch.arange(ids.shape[1], device=device)[None])
        for layer in range(model.layers):
            keys, values = self._keys[layer], self._values[layer]

            def attend(
                q: torch.Tensor,
                k: torch.Tensor,
                v: torch.Tensor,
                keys: torch.Tensor = keys,
                values: torch.Tensor = values,
            ) -> torch.Tensor:
                keys[:, :, : k.shape[2]], values[:, :, : v.shape[2]] = k, v
                return causal_attention(q, k, v)

            hidden = run_block(model.block(layer), hidden, turn, attend)
        last = hidden[torch.arange(len(prompts), device=device), self.lengths - 1]
        self.logits = model.logits(model.norm(last))

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> None:
        """Append one token to every sequence. ids: int64 (sequences,) on the model's device."""
        model, at = self.model, self.lengths
        rows = torch.arange(len(at), device=model.device)
        end = int(at.max()) + 1
        # Each sequence looks at its own tokens, which stand to the left.
        seen = (torch.arange(end, device=model.device)[None] <= at[:, None])[:, None, None]
        turn = model.turn(at[:, None])
        hidden = model.embed(ids)[:, None]  # (sequences, 1, hidden)
        for layer in range(model.layers):
            keys, values = self._keys[layer], self._values[layer]

            def attend(
                q: torch.Tensor,
                k: torch.Tensor,
                v: torch.Tensor,
                keys: torch.Tensor = keys,
                values: torch.Tensor = values,
            ) -> torch.Tensor:
                keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]
                # Query heads that share a KV head stand in the place of tokens: no copies of it.
                grouped = q.reshape(len(rows), keys.shape[1], -1, q.shape[-1])
                mixed = F.scaled_dot_product_attention(
                    grouped, keys[:, :, :end], values[:, :, :end], attn_mask=seen
                )
                return mixed.reshape(q.shape)

            hidden = run_block(model.block(layer), hidden, turn, attend)
        self.lengths = at + 1
        self.logits = model.logits(model.norm(hidden[:, 0]))
