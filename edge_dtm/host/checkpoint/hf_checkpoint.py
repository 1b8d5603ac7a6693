"""A Hugging Face folder: config.json, safetensors files and a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import SafetensorError, safe_open

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray, ModelConfig
from edge_dtm.host.checkpoint.hf_tokenizer import HfTokenizer
from edge_dtm.host.checkpoint.json_file import read_json


class HfCheckpoint(Checkpoint):
    """A folder with config.json, one or several safetensors files, and a tokenizer."""

    def __init__(self, path: Path) -> None:
        config = _config(path)
        self._places = _places(path, config.layers)
        super().__init__(path, config, self._places)

    @cached_property
    def tokenizer(self) -> HfTokenizer:
        return HfTokenizer(self.path, self.config.vocab)

    def _read(self, name: str) -> FloatArray:
        file, key = self._places[name]
        # torch, since numpy knows no bfloat16.
        with safe_open(file, framework="pt") as tensors:
            return np.asarray(tensors.get_tensor(key).float().numpy())


def _places(path: Path, layers: int) -> dict[str, tuple[Path, str]]:
    """Full GGUF name -> the file that holds the tensor, and its name there."""
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
    places = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                keys = tensors.keys()
        except (SafetensorError, OSError) as error:
            raise EdgeDtmError(f"{file} cannot be read ({error}): get it again") from None
        for key in keys:
            if name := names.get_name(key, try_suffixes=(".weight", ".bias")):
                places[name] = (file, key)
    return places


def _config(path: Path) -> ModelConfig:
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
