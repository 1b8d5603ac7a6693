"""A GGUF file of architecture llama as a checkpoint."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray
from edge_dtm.host.checkpoint.config import ModelConfig
from edge_dtm.host.checkpoint.gguf_tokenizer import GgufTokenizer
from edge_dtm.llamacpp import ggml


class GgufCheckpoint(Checkpoint):
    """One GGUF file of architecture llama; quantized tensors are dequantized by ggml."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader raises whatever its parsing stumbles over
            raise EdgeDtmError(f"{path} is no readable GGUF ({error}): get it again") from None
        self._tensors = {t.name: t for t in self._reader.tensors}
        super().__init__(path, self._config(path), self._tensors)
        kinds = {t.tensor_type.name for t in self._reader.tensors} - {"F32", "F16", "BF16"}
        self.on_grid = ", ".join(sorted(kinds)) or None

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is None:
            raise EdgeDtmError(f"{self._reader.data.filename} has no {key}: convert it again")
        return default

    def _config(self, path: Path) -> ModelConfig:
        get = self._value
        architecture = get("general.architecture")
        if architecture != "llama":
            raise EdgeDtmError(
                f"{path} is a {architecture} GGUF; supported is the architecture llama"
            )
        hidden, heads = get("llama.embedding_length"), get("llama.attention.head_count")
        kv_heads = get("llama.attention.head_count_kv", heads)
        ffn = get("llama.feed_forward_length")
        scaling = get("llama.rope.scaling.type", "none")
        refusals = {
            "has layers of different shapes": any(
                isinstance(v, list) for v in (heads, kv_heads, ffn)
            ),
            "is a mixture of experts": "blk.0.ffn_gate_exps.weight" in self._tensors,
            "is no whole model: it has no token_embd.weight": "token_embd.weight"
            not in self._tensors,
            f"has rope scaling {scaling!r} (none and linear are known)": scaling
            not in ("none", "linear"),
        }
        for reason, applies in refusals.items():
            if applies:
                raise EdgeDtmError(f"{path} is not supported: it {reason}")
        factors = self._tensors.get("rope_freqs.weight")
        linear = float(get("llama.rope.scaling.factor", 1.0)) if scaling == "linear" else None
        return ModelConfig(
            architecture="LlamaForCausalLM",
            name=get("general.name", path.stem),
            layers=get("llama.block_count"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=get("llama.attention.key_length", hidden // heads),
            ffn=ffn,
            vocab=int(self._tensors["token_embd.weight"].shape[1]),
            rms_epsilon=float(get("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=float(get("llama.rope.freq_base", 10000.0)),
            context_length=get("llama.context_length"),
            tied="output.weight" not in self._tensors,
            attention_bias="blk.0.attn_q.bias" in self._tensors,
            mlp_bias="blk.0.ffn_up.bias" in self._tensors,
            rope_linear=linear,
            rope_factors=None if factors is None else tuple(float(f) for f in factors.data),
        )

    @cached_property
    def tokenizer(self) -> GgufTokenizer:
        return GgufTokenizer(self.path, self._reader)

    def _read(self, name: str) -> FloatArray:
        t = self._tensors[name]
        rows = np.ascontiguousarray(t.data).reshape(-1, t.data.shape[-1]).view(np.uint8)
        shape = tuple(int(n) for n in reversed(t.shape))
        data = ggml.dequantize(t.tensor_type.name, rows, shape[-1])
        return self.hf_rows(name, data.reshape(shape))
