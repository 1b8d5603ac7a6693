"""A checkpoint on disk: its shape, its tokenizer and its tensors, read one at a time.

Tensors have their GGUF names. Two layouts of q and k rows exist: Hugging Face rotates half
against half, GGUF's llama rotates neighbours; `hf_tensor` gives the one, `tensor` the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.plan import Component
from edge_dtm.host.checkpoint.tokenizer import Tokenizer

FloatArray = npt.NDArray[np.float32]
ROPE_FACTORS = "rope_freqs.weight"  # made from the config, not read


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


def components_of(c: ModelConfig) -> tuple[Component, ...]:
    """All weight matrices of such a model, in the order they stand in the GGUF."""
    out = [Component("token_embd", c.vocab, c.hidden)]
    if not c.tied:
        out.append(Component("output", c.vocab, c.hidden))
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes = {
        "attn_q": (q, c.hidden),
        "attn_k": (kv, c.hidden),
        "attn_v": (kv, c.hidden),
        "attn_output": (c.hidden, q),
        "ffn_gate": (c.ffn, c.hidden),
        "ffn_up": (c.ffn, c.hidden),
        "ffn_down": (c.hidden, c.ffn),
    }
    for layer in range(c.layers):
        out += [Component(f"blk.{layer}.{n}", *shape) for n, shape in shapes.items()]
    return tuple(out)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: size_bytes from offset on in file, under the name key.

    type: as GGML and safetensors spell it, `F16`. shape: (rows, row_length) or (length,).
    """

    file: Path
    key: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class Checkpoint(ABC):
    """What every source offers; `open_checkpoint` makes one.

    stored: full GGUF name -> tensor of the source. types: those that it may have. on_grid: the grid
    that a quantized source lies on, for the warning.
    """

    types: frozenset[str] = frozenset()
    on_grid: str | None = None

    def __init__(self, path: Path, config: ModelConfig, stored: Mapping[str, Stored]) -> None:
        self.path, self.config, self.stored = path, config, stored

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        return type(self), (self.path,)

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @abstractmethod
    def _read(self, name: str) -> FloatArray:
        """The tensor, float32, rows as Hugging Face orders them."""

    def components(self) -> tuple[Component, ...]:
        """All weight matrices, in the order they stand in the GGUF."""
        return components_of(self.config)

    def vectors(self) -> tuple[tuple[str, int], ...]:
        """(full GGUF name, length) of everything that stays F32: norms, biases, rope factors."""
        c = self.config
        out = [("output_norm.weight", c.hidden)]
        if c.rope_factors is not None:
            out.append((ROPE_FACTORS, c.head_dim // 2))
        rows = {component.name: component.rows for component in self.components()}
        biased = ["attn_q", "attn_k", "attn_v", "attn_output"] if c.attention_bias else []
        biased += ["ffn_gate", "ffn_up", "ffn_down"] if c.mlp_bias else []
        for layer in range(c.layers):
            block = f"blk.{layer}."
            out += [(f"{block}{norm}.weight", c.hidden) for norm in ("attn_norm", "ffn_norm")]
            for name in biased:
                # GGUFs may have biases of q, k and v only.
                if name != "attn_output" or f"{block}{name}.bias" in self.stored:
                    out.append((f"{block}{name}.bias", rows[block + name]))
        return tuple(out)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full GGUF name -> shape of every tensor, components first."""
        matrices = {c.name + ".weight": (c.rows, c.row_length) for c in self.components()}
        return {**matrices, **{name: (length,) for name, length in self.vectors()}}

    def hf_tensor(self, name: str) -> FloatArray:
        """float32, rows as Hugging Face orders them. name: full GGUF name, `blk.0.attn_q.weight`."""
        if name == ROPE_FACTORS:
            return np.array(self.config.rope_factors, dtype=np.float32)
        return self._read(name)

    def torch_tensor(self, name: str) -> torch.Tensor:
        """The same as `hf_tensor`, float32 or the source's own 16 bits."""
        return torch.from_numpy(np.ascontiguousarray(self.hf_tensor(name)))

    def tensor(self, name: str) -> FloatArray:
        """float32, rows as GGUF orders them."""
        return self.gguf_rows(name, self.hf_tensor(name))

    def gguf_rows(self, name: str, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An array whose rows are in Hugging Face's order, in GGUF's (convert_hf_to_gguf.py,
        LlamaModel.permute). name: of the component, or its tensor's."""
        return self._reordered(name, data, (2, -1))

    def hf_rows(self, name: str, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The other way round."""
        return self._reordered(name, data, (-1, 2))

    def _reordered(
        self, name: str, data: npt.NDArray[Any], halves: tuple[int, int]
    ) -> npt.NDArray[Any]:
        if ".attn_q" in name:
            heads = self.config.heads
        elif ".attn_k" in name:
            heads = self.config.kv_heads
        else:
            return data
        pairs = data.reshape(heads, *halves, *data.shape[1:]).swapaxes(1, 2)
        return np.ascontiguousarray(pairs.reshape(data.shape))
