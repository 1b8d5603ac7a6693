"""A checkpoint on disk: its shape, its tokenizer and its tensors, read one at a time.

Tensors have their GGUF names. Two layouts of q and k rows exist: Hugging Face rotates half
against half, GGUF's llama rotates neighbours; `tensor` gives GGUF's, `hf_tensor` the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Component
from edge_dtm.host.checkpoint.config import ModelConfig

if TYPE_CHECKING:
    from edge_dtm.host.checkpoint.tokenizer import Tokenizer

FloatArray = npt.NDArray[np.float32]


class Checkpoint:
    """What every source offers; `open_checkpoint` makes one.

    A source provides `tokenizer`, `_names`, `_read` and `_source_is_hf`.
    """

    path: Path
    config: ModelConfig
    on_grid: str | None = None  # the grid a quantized source lies on, for the warning

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path, self.config = path, config
        self._hash: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        return type(self), (self.path,)

    @property
    def tokenizer(self) -> Tokenizer:
        raise AttributeError

    def _names(self) -> set[str]:
        """Full GGUF names of the tensors that the source holds."""
        raise AttributeError

    def _read(self, name: str) -> FloatArray:
        """The tensor, float32, in the layout the source itself has."""
        raise AttributeError

    _source_is_hf = True

    def components(self) -> tuple[Component, ...]:
        """All weight matrices, in the order they stand in the GGUF."""
        c = self.config
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

    def vectors(self) -> tuple[tuple[str, int], ...]:
        """(full GGUF name, length) of everything that stays F32: norms, biases, rope factors."""
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        out = [("output_norm.weight", c.hidden)]
        if c.rope_factors is not None:
            out.append(("rope_freqs.weight", c.head_dim // 2))
        for layer in range(c.layers):
            p = f"blk.{layer}."
            out += [(p + "attn_norm.weight", c.hidden), (p + "ffn_norm.weight", c.hidden)]
            if c.attention_bias:
                out += [(p + "attn_q.bias", q), (p + "attn_k.bias", kv), (p + "attn_v.bias", kv)]
                if self._has(p + "attn_output.bias"):
                    out.append((p + "attn_output.bias", c.hidden))
            if c.mlp_bias:
                out += [
                    (p + "ffn_gate.bias", c.ffn),
                    (p + "ffn_up.bias", c.ffn),
                    (p + "ffn_down.bias", c.hidden),
                ]
        return tuple(out)

    def _has(self, name: str) -> bool:
        return name in self._names()

    def tensor(self, name: str) -> FloatArray:
        """float32 in GGUF layout. name: full GGUF name, `blk.0.attn_q.weight`."""
        if name == "rope_freqs.weight" and self.config.rope_factors is not None:
            return np.array(self.config.rope_factors, dtype=np.float32)
        data = self._read(name)
        heads = self._rotated_heads(name)
        return to_gguf_rows(data, heads) if heads and self._source_is_hf else data

    def hf_tensor(self, name: str) -> FloatArray:
        """float32 in Hugging Face layout."""
        data = self._read(name)
        heads = self._rotated_heads(name)
        return to_hf_rows(data, heads) if heads and not self._source_is_hf else data

    def _rotated_heads(self, name: str) -> int:
        if ".attn_q." in name:
            return self.config.heads
        return self.config.kv_heads if ".attn_k." in name else 0

    def gguf_rows(self, component: str, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An array whose rows are the component's in Hugging Face's order, in GGUF's order."""
        heads = self._rotated_heads(component + ".weight")
        return to_gguf_rows(data, heads) if heads else data

    def hf_rows(self, component: str, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The other way round."""
        heads = self._rotated_heads(component + ".weight")
        return to_hf_rows(data, heads) if heads else data

    def check(self, progress: Callable[[int], None] | None = None) -> str:
        """Read every tensor once: shapes, finite values, and the SHA-256 of all of them.

        EdgeDtmError naming every offender. progress is called with weights read.
        """
        if self._hash is not None:
            return self._hash
        wanted = [(c.name + ".weight", (c.rows, c.row_length)) for c in self.components()]
        shapes: list[tuple[str, tuple[int, ...]]] = [
            *wanted,
            *((n, (k,)) for n, k in self.vectors()),
        ]
        missing = [n for n, _ in shapes if n != "rope_freqs.weight" and not self._has(n)]
        if missing:
            raise EdgeDtmError(
                f"{self.path} lacks {len(missing)} tensors ({', '.join(missing[:4])}"
                f"{', ...' if len(missing) > 4 else ''}): get the whole checkpoint again"
            )
        digest = hashlib.sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        bad = []
        for name, shape in shapes:
            data = self.hf_tensor(name) if name != "rope_freqs.weight" else self.tensor(name)
            if data.shape != shape:
                bad.append(f"{name} has shape {data.shape}, not {shape}")
            elif not np.isfinite(data).all():
                bad.append(f"{name} has {int((~np.isfinite(data)).sum())} NaN or infinite weights")
            digest.update(np.ascontiguousarray(data).data)
            if progress:
                progress(data.size)
        if bad:
            more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
            raise EdgeDtmError(f"{self.path}: {'; '.join(bad[:4])}{more}: get the checkpoint again")
        self._hash = digest.hexdigest()
        return self._hash


def to_gguf_rows(data: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """llama.cpp's permutation of q and k rows (convert_hf_to_gguf.py, LlamaModel.permute)."""
    half = data.shape[0] // heads // 2
    return np.ascontiguousarray(
        data.reshape(heads, 2, half, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    )


def to_hf_rows(data: FloatArray, heads: int) -> FloatArray:
    half = data.shape[0] // heads // 2
    return np.ascontiguousarray(
        data.reshape(heads, half, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    )
