"""A checkpoint on disk: its shape, its tokenizer and its tensors, read one at a time.

Tensors are named as GGUF names them. Two layouts of q and k rows exist: Hugging Face rotates
half against half, GGUF's llama rotates neighbours; `tensor` gives GGUF's, `hf_tensor` the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Component
from edge_dtm.llamacpp import ggml

if TYPE_CHECKING:
    from edge_dtm.host.checkpoint.tokenizer import Tokenizer

FloatArray = npt.NDArray[np.float32]

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama. rope_factors: float32 (head_dim / 2,), what each rotation period is
    divided by (Llama-3 scaling), or None; rope_linear: position interpolation factor, or None."""

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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Checkpoint:
    """What every source offers. Use `open_checkpoint`."""

    path: Path
    config: ModelConfig
    on_grid: str | None = None  # the grid a quantized source lies on, for the warning

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path, self.config = path, config
        self._hash: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        return open_checkpoint, (self.path,)

    # What a source has to provide.
    @property
    def tokenizer(self) -> Tokenizer:
        raise AttributeError

    def _names(self) -> set[str]:
        raise AttributeError

    def _read(self, name: str) -> FloatArray:
        """The tensor in the layout the source itself has."""
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
        return _to_gguf_rows(data, heads) if heads and self._source_is_hf else data

    def hf_tensor(self, name: str) -> FloatArray:
        """float32 in Hugging Face layout."""
        data = self._read(name)
        heads = self._rotated_heads(name)
        return _to_hf_rows(data, heads) if heads and not self._source_is_hf else data

    def _rotated_heads(self, name: str) -> int:
        if ".attn_q." in name:
            return self.config.heads
        return self.config.kv_heads if ".attn_k." in name else 0

    def gguf_rows(self, component: str, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An array whose rows are the component's in Hugging Face's order, in GGUF's order."""
        heads = self._rotated_heads(component + ".weight")
        return _to_gguf_rows(data, heads) if heads else data

    def hf_rows(self, component: str, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The other way round."""
        heads = self._rotated_heads(component + ".weight")
        return _to_hf_rows(data, heads) if heads else data

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


def _to_gguf_rows(data: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """llama.cpp's permutation of q and k rows (convert_hf_to_gguf.py, LlamaModel.permute)."""
    half = data.shape[0] // heads // 2
    return np.ascontiguousarray(
        data.reshape(heads, 2, half, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    )


def _to_hf_rows(data: FloatArray, heads: int) -> FloatArray:
    half = data.shape[0] // heads // 2
    return np.ascontiguousarray(
        data.reshape(heads, half, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """An HF folder or a GGUF file. EdgeDtmError when it is neither or not supported."""
    if path.is_dir():
        return HfCheckpoint(path)
    if path.is_file():
        return GgufCheckpoint(path)
    raise EdgeDtmError(f"{path} does not exist: give an HF checkpoint folder or a .gguf file")


class HfCheckpoint(Checkpoint):
    """A folder with config.json, one or several safetensors files, and a tokenizer."""

    def __init__(self, path: Path) -> None:
        self._files = _safetensors_files(path)
        self._where: dict[str, tuple[Path, str]] = {}
        raw = _read_json(path / "config.json")
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
        from edge_dtm.host.checkpoint.tokenizer import HfTokenizer

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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EdgeDtmError(f"{path} is missing: give a whole HF checkpoint folder") from None
    except (OSError, ValueError) as error:
        raise EdgeDtmError(f"{path} cannot be read ({error}): get it again") from None
    if not isinstance(data, dict):
        raise EdgeDtmError(f"{path} holds no JSON object: get it again")
    return data


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
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
        from edge_dtm.host.checkpoint.tokenizer import GgufTokenizer

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
