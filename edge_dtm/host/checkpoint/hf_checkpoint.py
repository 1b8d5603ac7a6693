"""A Hugging Face folder: config.json, safetensors files and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray, ModelConfig, Stored
from edge_dtm.host.checkpoint.hf_tokenizer import HfTokenizer
from edge_dtm.host.checkpoint.json_file import read_json


class HfCheckpoint(Checkpoint):
    """A folder with config.json, one or several safetensors files, and a tokenizer."""

    types = frozenset({"F16", "BF16", "F32", "F64"})

    def __init__(self, path: Path) -> None:
        config = read_config(path)
        super().__init__(path, config, _stored(path, config.layers))

    @cached_property
    def tokenizer(self) -> HfTokenizer:
        return HfTokenizer(self.path, self.config.vocab)

    def _read(self, name: str) -> FloatArray:
        return np.asarray(self.torch_tensor(name).float().numpy())

    def torch_tensor(self, name: str) -> torch.Tensor:
        stored = self.stored[name]
        with safe_open(stored.file, framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(stored.key)
        return tensor


def _stored(path: Path, layers: int) -> dict[str, Stored]:
    """Full GGUF name -> tensor, by the headers of all files."""
    shards = read_json(path / "model.safetensors.index.json").get("weight_map", {}).values()
    files = sorted({path / name for name in shards} or path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise EdgeDtmError(
            f"{path} lacks {len(missing)} of {len(files)} shards ({', '.join(missing)}): download "
            "them again"
        )
    if not files:
        raise EdgeDtmError(f"{path} holds no .safetensors file: give a whole HF checkpoint folder")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    out = {}
    for file in files:
        try:
            with safe_open(file, framework="np"):  # refuses headers that do not fit the file
                head = _header(file)
        except (SafetensorError, OSError) as error:
            raise EdgeDtmError(f"{file} cannot be read ({error}): get it again") from None
        for key, stored in head.items():
            if name := names.get_name(key, try_suffixes=(".weight", ".bias")):
                out[name] = stored
    return out


def _header(file: Path) -> dict[str, Stored]:
    """Name in the file -> tensor: https://github.com/huggingface/safetensors#format."""
    with file.open("rb") as data:
        size = int.from_bytes(data.read(8), "little")
        head = json.loads(data.read(size))
    out = {}
    for key in head.keys() - {"__metadata__"}:
        start, end = head[key]["data_offsets"]
        shape = tuple(head[key]["shape"])
        out[key] = Stored(file, key, head[key]["dtype"], shape, 8 + size + start, end - start)
    return out


def read_config(path: Path) -> ModelConfig:
    """From config.json. EdgeDtmError when it is not supported."""
    from transformers import AutoConfig

    try:
        c = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a malformed file fails in many ways
        line = str(error).splitlines()[0] if str(error) else repr(error)
        raise EdgeDtmError(f"{path / 'config.json'} is not understood: {line}") from None
    architectures = c.architectures or ["model without architectures"]
    rope: dict[str, Any] = getattr(c, "rope_parameters", None) or {}
    scaling = rope.get("rope_type", "default")
    for what, value, supported in (
        ("architecture", ", ".join(architectures), ("LlamaForCausalLM", "MistralForCausalLM")),
        ("rope scaling", scaling, ("default", "linear", "llama3")),
        ("activation", getattr(c, "hidden_act", "silu"), ("silu",)),
    ):
        if value not in supported:
            raise EdgeDtmError(f"{path} has the {what} {value}; supported: {', '.join(supported)}")
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return ModelConfig(
        architecture=architectures[0],
        name=path.resolve().name,
        layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        ffn=c.intermediate_size,
        vocab=c.vocab_size,
        rms_epsilon=float(c.rms_norm_eps),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        context_length=c.max_position_embeddings,
        tied=bool(c.tie_word_embeddings),
        attention_bias=bool(getattr(c, "attention_bias", False)),
        mlp_bias=bool(getattr(c, "mlp_bias", False)),
        rope_linear=float(rope["factor"]) if scaling == "linear" else None,
        rope_factors=_llama3_factors(rope, head_dim) if scaling == "llama3" else None,
    )


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """What llama.cpp wants in rope_freqs.weight: by what each frequency is divided.

    Source: Llama 3.1's rope scaling as in transformers (_compute_llama3_parameters).
    """
    frequency = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    wavelength = 2 * np.pi / frequency
    old = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (old / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    out = np.where(wavelength > old / low, factor, between)
    out = np.where(wavelength < old / high, 1.0, out)
    return tuple(float(f) for f in out.astype(np.float32))
