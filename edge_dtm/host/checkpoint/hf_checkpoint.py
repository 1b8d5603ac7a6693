"""A Hugging Face folder: config.json, safetensors files and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray
from edge_dtm.host.checkpoint.config import ModelConfig
from edge_dtm.host.checkpoint.json_file import read_json

if TYPE_CHECKING:
    from edge_dtm.host.checkpoint.tokenizer import Tokenizer

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


class HfCheckpoint(Checkpoint):
    """A folder with config.json, one or several safetensors files, and a tokenizer."""

    def __init__(self, path: Path) -> None:
        self._files = _safetensors_files(path)
        self._where: dict[str, tuple[Path, str]] = {}
        raw = read_json(path / "config.json", required=True)
        names = raw.get("architectures") or []
        if len(names) != 1 or names[0] not in SUPPORTED_ARCHITECTURES:
            raise EdgeDtmError(
                f"{path} is a {', '.join(names) or 'model without architectures'}; supported are "
                f"{', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        super().__init__(path, _config_from_hf(path, names[0]))
        self._map_names()
        c = self.config
        if not c.tied and "output.weight" not in self._where:
            raise EdgeDtmError(f"{path} has no lm_head.weight and is not tied: get it again")

    def _map_names(self) -> None:
        from safetensors import SafetensorError, safe_open

        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self.config.layers)
        for file in self._files:
            try:
                with safe_open(file, framework="np") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a dict)
                        mapped = table.get_name(name, try_suffixes=(".weight", ".bias"))
                        if mapped:
                            self._where[mapped] = (file, name)
            except (SafetensorError, OSError) as error:
                raise EdgeDtmError(f"{file} cannot be read ({error}): get it again") from None

    @property
    def tokenizer(self) -> Tokenizer:
        from edge_dtm.host.checkpoint.hf_tokenizer import HfTokenizer

        if not hasattr(self, "_tokenizer"):
            self._tokenizer = HfTokenizer.from_folder(self.path, self.config.vocab)
        return self._tokenizer

    def _names(self) -> set[str]:
        return set(self._where)

    def _read(self, name: str) -> FloatArray:
        from safetensors import safe_open

        file, key = self._where[name]
        # torch, since numpy knows no bfloat16.
        with safe_open(file, framework="pt") as tensors:
            return np.asarray(tensors.get_tensor(key).float().numpy())


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [n for n in names if not (path / n).is_file()]
        if missing:
            raise EdgeDtmError(
                f"{path} lacks {len(missing)} of {len(names)} shards ({', '.join(missing)}): "
                "download them again"
            )
        return [path / n for n in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise EdgeDtmError(f"{path} holds no .safetensors file: give a whole HF checkpoint folder")
    return files


def _config_from_hf(path: Path, architecture: str) -> ModelConfig:
    from transformers import AutoConfig

    try:
        c = AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        line = str(error).splitlines()[0] if str(error) else repr(error)
        raise EdgeDtmError(f"{path / 'config.json'} is not understood: {line}") from None
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = dict(getattr(c, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    factors, linear = None, None
    if kind == "llama3":
        factors = tuple(float(f) for f in _llama3_factors(rope, head_dim))
    elif kind == "linear":
        linear = float(rope["factor"])
    elif kind != "default":
        raise EdgeDtmError(
            f"{path}: rope scaling {kind!r} is not supported (default, linear, llama3)"
        )
    if getattr(c, "hidden_act", "silu") != "silu":
        raise EdgeDtmError(f"{path}: activation {c.hidden_act!r} is not supported, only silu")
    return ModelConfig(
        architecture=architecture,
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
        rope_linear=linear,
        rope_factors=factors,
    )


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> FloatArray:
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
    return np.where(wavelength < old / high, 1.0, out).astype(np.float32)
