"""A GGUF file of architecture llama as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray
from edge_dtm.host.checkpoint.config import ModelConfig
from edge_dtm.llamacpp import ggml

if TYPE_CHECKING:
    from edge_dtm.host.checkpoint.tokenizer import Tokenizer


class GgufCheckpoint(Checkpoint):
    """One GGUF file of architecture llama; quantized tensors are dequantized by ggml."""

    _source_is_hf = False

    def __init__(self, path: Path) -> None:
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader raises whatever its parsing stumbles over
            raise EdgeDtmError(f"{path} is no readable GGUF ({error}): get it again") from None
        self._tensors = {t.name: t for t in self._reader.tensors}
        size = path.stat().st_size
        if any(t.data_offset + t.n_bytes > size for t in self._reader.tensors):
            raise EdgeDtmError(
                f"{path} is truncated: its tensors end beyond the file; get it again"
            )
        architecture = self._value("general.architecture")
        if architecture != "llama":
            raise EdgeDtmError(
                f"{path} is a {architecture} GGUF; supported is the architecture llama"
            )
        super().__init__(path, self._config())
        kinds = sorted(
            {t.tensor_type.name for t in self._reader.tensors} - {"F32", "F16", "BF16", "F64"}
        )
        if kinds:
            self.on_grid = ", ".join(kinds)

    def _value(self, key: str, default: Any = None) -> Any:
        data = self._reader.get_field(key)
        if data is None:
            if default is None:
                raise EdgeDtmError(f"{self._reader.data.filename} has no {key}: convert it again")
            return default
        return data.contents()

    def _config(self) -> ModelConfig:
        get, path = self._value, Path(str(self._reader.data.filename))
        hidden, heads = get("llama.embedding_length"), get("llama.attention.head_count")
        kv_heads, ffn = (
            get("llama.attention.head_count_kv", heads),
            get("llama.feed_forward_length"),
        )
        if any(isinstance(v, list) for v in (heads, kv_heads, ffn)):
            raise EdgeDtmError(f"{path} has layers of different shapes, which is not supported yet")
        if "blk.0.ffn_gate_exps.weight" in self._tensors:
            raise EdgeDtmError(f"{path} is a mixture of experts, which is not supported")
        if "token_embd.weight" not in self._tensors:
            raise EdgeDtmError(f"{path} has no token_embd.weight: it is no whole model")
        scaling = get("llama.rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise EdgeDtmError(f"{path}: rope scaling {scaling!r} is not supported (none, linear)")
        factors = self._tensors.get("rope_freqs.weight")
        head_dim = get("llama.attention.key_length", hidden // heads)
        return ModelConfig(
            architecture="LlamaForCausalLM",
            name=get("general.name", path.stem),
            layers=get("llama.block_count"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=ffn,
            vocab=int(self._tensors["token_embd.weight"].shape[1]),
            rms_epsilon=float(get("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=float(get("llama.rope.freq_base", 10000.0)),
            context_length=get("llama.context_length"),
            tied="output.weight" not in self._tensors,
            attention_bias="blk.0.attn_q.bias" in self._tensors,
            mlp_bias="blk.0.ffn_up.bias" in self._tensors,
            rope_linear=float(get("llama.rope.scaling.factor", 1.0))
            if scaling == "linear"
            else None,
            rope_factors=None if factors is None else tuple(float(f) for f in factors.data),
        )

    @property
    def tokenizer(self) -> Tokenizer:
        from edge_dtm.host.checkpoint.gguf_tokenizer import GgufTokenizer

        if not hasattr(self, "_tokenizer"):
            self._tokenizer = GgufTokenizer.from_gguf(self.path)
        return self._tokenizer

    def _names(self) -> set[str]:
        return set(self._tensors)

    def _read(self, name: str) -> FloatArray:
        t = self._tensors[name]
        shape = tuple(int(n) for n in reversed(t.shape))
        if t.tensor_type.name == "F64":
            return np.asarray(t.data, dtype=np.float32).reshape(shape)
        raw = (
            np.ascontiguousarray(t.data)
            .view(np.uint8)
            .reshape(shape[0] if len(shape) > 1 else 1, -1)
        )
        return ggml.dequantize(t.tensor_type.name, raw, shape[-1]).reshape(shape)
