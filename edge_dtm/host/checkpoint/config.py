"""The shape of a model."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama.

    rope_factors: head_dim / 2 numbers, by which each rotation frequency is divided (Llama-3
    scaling), or None. rope_linear: position interpolation factor, or None. tied: the head is the
    embedding.
    """

    architecture: str
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rms_epsilon: float
    rope_theta: float
    context_length: int
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_linear: float | None = None
    rope_factors: tuple[float, ...] | None = field(default=None, repr=False)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of an F16 KV cache a token takes."""
        return self.layers * self.kv_heads * 2 * self.head_dim * 2
