"""A GGUF file of architecture llama as a checkpoint, and the tokenizer inside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFValueType

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.ggml_types import WEIGHT_TYPES
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray, ModelConfig, Stored
from edge_dtm.host.checkpoint.tokenizer import SPECIAL, Tokenizer
from edge_dtm.llamacpp import ggml
from edge_dtm.llamacpp.vocabulary import LlamaVocab


class GgufCheckpoint(Checkpoint):
    """One GGUF file of architecture llama; quantized tensors are dequantized by ggml."""

    types = WEIGHT_TYPES

    def __init__(self, path: Path) -> None:
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader raises whatever its parsing stumbles over
            raise EdgeDtmError(f"{path} is no readable GGUF ({error}): get it again") from None
        self._tensors = {t.name: t for t in self._reader.tensors}
        stored = {
            name: Stored(
                file=path,
                key=name,
                type=t.tensor_type.name,
                shape=tuple(int(n) for n in reversed(t.shape)),
                offset=int(t.data_offset),
                size_bytes=int(t.n_bytes),
            )
            for name, t in self._tensors.items()
        }
        super().__init__(path, self._config(path), stored)
        kinds = {t.type for t in stored.values()} - {"F32", "F16", "BF16"}
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
            raise EdgeDtmError(f"{path} is a {architecture} GGUF; supported is llama")
        hidden, heads = get("llama.embedding_length"), get("llama.attention.head_count")
        kv_heads = get("llama.attention.head_count_kv", heads)
        ffn = get("llama.feed_forward_length")
        scaling = get("llama.rope.scaling.type", "none")
        for refused, reason in (
            (list in map(type, (heads, kv_heads, ffn)), "has layers of different shapes"),
            ("blk.0.ffn_gate_exps.weight" in self._tensors, "is a mixture of experts"),
            ("token_embd.weight" not in self._tensors, "has no token_embd.weight"),
            (
                scaling not in ("none", "linear"),
                f"has rope scaling {scaling!r}, not none or linear",
            ),
        ):
            if refused:
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
        data, stored = self._tensors[name].data, self.stored[name]
        rows = np.ascontiguousarray(data).reshape(-1, data.shape[-1]).view(np.uint8)
        values = ggml.dequantize(stored.type, rows, stored.shape[-1])
        return self.hf_rows(name, values.reshape(stored.shape))

    def torch_tensor(self, name: str) -> torch.Tensor:
        halves = {"F16": torch.float16, "BF16": torch.bfloat16}
        stored = self.stored.get(name)
        if stored is None or stored.type not in halves:
            return super().torch_tensor(name)
        bits = np.ascontiguousarray(self._tensors[name].data).view(np.int16).reshape(stored.shape)
        # A copy: torch takes no read-only memory.
        return torch.from_numpy(np.array(self.hf_rows(name, bits))).view(halves[stored.type])


_KEYS = {"unk": "unknown", "pad": "padding"}


class GgufTokenizer(Tokenizer):
    """The tokenizer inside a GGUF, run by llama.cpp; its metadata is copied as it is.

    EdgeDtmError when the file holds no tokenizer, or one that llama.cpp refuses.
    """

    def __init__(self, path: Path, reader: gguf.GGUFReader) -> None:
        self._vocab = LlamaVocab(path)
        self._fields = {n: f for n, f in reader.fields.items() if n.startswith("tokenizer.")}
        self.vocab_size = self._vocab.n_tokens
        self.eos_ids = self._vocab.eos_ids()
        template = self._fields.get("tokenizer.chat_template")
        self.chat_template = template.contents() if template else None
        self.special = {}
        for name in SPECIAL:
            field = self._fields.get(f"tokenizer.ggml.{_KEYS.get(name, name)}_token_id")
            self.special[f"{name}_token"] = self._token(-1 if field is None else field.contents())
        self.added_bos = None
        bos = self._vocab.bos_id
        if bos is not None and self._vocab.adds_bos:
            self.special["bos_token"] = self.added_bos = self._token(bos)

    def _token(self, index: int) -> str:
        known = 0 <= index < self.vocab_size
        return str(self._fields["tokenizer.ggml.tokens"].contents(index)) if known else ""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return self._vocab.encode(text, add_special=add_special)

    def decode(self, ids: Sequence[int]) -> str:
        return self._vocab.decode(ids)

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Copy every tokenizer.* field with its type."""
        for name, field in self._fields.items():
            kind, inner = field.types[0], field.types[-1]
            if inner == GGUFValueType.STRING:  # which need not be UTF-8
                value: Any = [field.parts[i].tobytes() for i in field.data]
            else:
                value = field.contents()
            if kind == GGUFValueType.STRING:
                (value,) = value
            # The writer has no empty arrays; llama.cpp reads none the same.
            if kind != GGUFValueType.ARRAY or value:
                writer.add_key_value(name, value, kind, inner)
