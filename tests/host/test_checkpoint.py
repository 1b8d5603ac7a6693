"""Checkpoints read here against transformers, and against llama.cpp with the GGUF made of them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import TINY_LLAMAS
from safetensors.torch import load_file, save_file

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import uniform
from edge_dtm.formats.record import RunSettings
from edge_dtm.formats.reference import HELD_OUT, TOP_K, Reference
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.gguf_checkpoint import GgufCheckpoint
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.checkpoint.pre_tokenizer import write_head
from edge_dtm.host.checkpoint.weights import hash_weights
from edge_dtm.host.export import export_gguf, fixed_bytes
from edge_dtm.llamacpp.runner import LlamaRunner

CPU = torch.device("cpu")
SEQUENCES, TOKENS, PROMPT = 3, 200, 4
UP = "model.layers.1.mlp.up_proj.weight"


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def _edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _sharpen(tensors: dict[str, torch.Tensor]) -> None:
    """Make attention depend on positions, biases count and margins large, as in a trained model."""
    generator = torch.Generator().manual_seed(1)
    for name, data in tensors.items():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            data *= 6
        elif name.endswith(".bias"):
            data += torch.randn(data.shape, generator=generator)
        elif name.endswith("norm.weight"):
            data += 0.2 * torch.rand(data.shape, generator=generator)
            if name == "model.norm.weight":
                data *= 10


@pytest.fixture(scope="session")
def folders(
    tiny_llamas: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    base, out = tmp_path_factory.mktemp("checkpoints"), {}
    for name in TINY_LLAMAS:
        out[name] = Path(shutil.copytree(tiny_llamas(name), base / name))
        _edit_weights(out[name], _sharpen)
    return out


@pytest.fixture(scope="session", params=list(TINY_LLAMAS))
def variant(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(3, 768, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the plain one that a test may spoil."""
    return Path(shutil.copytree(folders["sentencepiece"], tmp_path / "hf"))


def _transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids, use_cache=False).logits)


def _llama_cpp_logits(path: Path, ids: torch.Tensor, kv_type: str) -> np.ndarray[Any, Any]:
    """(sequences, positions from PROMPT - 1 on, vocabulary)."""
    s, n = len(ids), ids.shape[1] - PROMPT
    reference = Reference(
        prompt_ids=ids[:, :PROMPT].numpy().astype(np.int32),
        prompt_lengths=np.full(s, PROMPT, np.int32),
        generated_ids=ids[:, PROMPT:].numpy().astype(np.int32),
        generated_lengths=np.full(s, n, np.int32),
        top_ids=np.zeros((s, n, TOP_K), np.int32),
        top_logits=np.zeros((s, n, TOP_K), np.float32),
        log_normalizers=np.zeros((s, n), np.float32),
        split=np.full(s, HELD_OUT, np.uint8),
        texts=np.array([""] * s),
        provenance={},
    )
    out = np.zeros((s, n, 768), np.float32)

    def observe(row: int, position: int, logits: np.ndarray[Any, Any]) -> None:
        out[row, position] = logits

    with LlamaRunner(path, RunSettings(threads=1, kv_type=kv_type), TOKENS) as runner:
        runner.teacher_forced(reference, observe=observe)
    return out


def _export(checkpoint: Checkpoint, path: Path, kind: str) -> Path:
    plan = uniform(checkpoint.components(), kind, fixed_bytes(checkpoint))
    export_gguf(checkpoint, plan, path, {})
    return path


def test_logits_are_those_of_transformers(variant: Path, ids: torch.Tensor) -> None:
    ours = _logits(load_model(open_checkpoint(variant), CPU), ids)
    theirs = _logits(_transformers(variant), ids)
    assert theirs.std() > 1  # else the comparison would say little
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_every_weight_is_the_files(variant: Path) -> None:
    checkpoint = open_checkpoint(variant)
    state = _transformers(variant).state_dict()
    for name, shape in checkpoint.shapes().items():
        if name != "rope_freqs.weight":
            stem, _, suffix = name.rpartition(".")
            data = state.pop(f"{module_name(stem)}.{suffix}").numpy()
            assert data.shape == shape
            assert np.array_equal(checkpoint.hf_tensor(name), data)
    assert set(state) <= {"lm_head.weight"}  # of a tied one


def _same_choices(
    ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], tolerance: float
) -> None:
    """Logits (sequences, positions, vocabulary) and, where theirs are clear, their argmaxes."""
    assert np.abs(ours - theirs).max() < tolerance
    top = np.sort(theirs, axis=-1)
    clear = top[..., -1] - top[..., -2] > 0.05
    assert clear.mean() > 0.5
    assert np.array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


def test_llama_cpp_computes_the_same(variant: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(variant)
    theirs = _logits(_transformers(variant), ids)[:, PROMPT - 1 : -1].numpy()
    path = _export(checkpoint, tmp_path / "f32.gguf", "F32")
    _same_choices(_llama_cpp_logits(path, ids, "F32"), theirs, 0.01)
    path = _export(checkpoint, tmp_path / "f16.gguf", "F16")
    # Training ends elsewhere on every CPU, and with it how much F16 rounds; a matrix in the wrong
    # place makes differences of several logits.
    _same_choices(_llama_cpp_logits(path, ids, "F16"), theirs, 1.0)
    # And the GGUF is itself a checkpoint.
    back = pickle.loads(pickle.dumps(open_checkpoint(path)))  # as it goes to another process
    assert isinstance(back, GgufCheckpoint) and back.on_grid is None
    assert back.shapes() == checkpoint.shapes()
    for name, shape in checkpoint.shapes().items():
        kind = np.float16 if len(shape) == 2 else np.float32
        assert np.array_equal(back.hf_tensor(name), checkpoint.hf_tensor(name).astype(kind)), name
        assert np.array_equal(back.tensor(name), checkpoint.tensor(name).astype(kind)), name
    again = _logits(load_model(back, CPU), ids)[:, PROMPT - 1 : -1].numpy()
    _same_choices(again, theirs, 0.2)


def test_linear_rope_scaling(folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    _edit_config(folder, rope_parameters=rope)
    checkpoint = open_checkpoint(folder)
    theirs = _logits(_transformers(folder), ids)
    torch.testing.assert_close(_logits(load_model(checkpoint, CPU), ids), theirs, atol=1e-4, rtol=0)
    path = _export(checkpoint, tmp_path / "linear.gguf", "F32")
    ours = _llama_cpp_logits(path, ids, "F32")
    assert np.abs(ours - theirs[:, PROMPT - 1 : -1].numpy()).max() < 0.01
    assert open_checkpoint(path).config.rope_linear == 4.0


def test_quantized_gguf_is_on_a_grid(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.on_grid is None
    path = _export(checkpoint, tmp_path / "q4.gguf", "Q4_0")
    back = open_checkpoint(path)
    assert back.on_grid == "Q4_0"
    error = np.abs(
        back.hf_tensor("blk.0.attn_q.weight") - checkpoint.hf_tensor("blk.0.attn_q.weight")
    )
    assert 0 < error.max() < 0.2 * np.abs(checkpoint.hf_tensor("blk.0.attn_q.weight")).max()


def _refused(path: Path, words: str) -> None:
    with pytest.raises(EdgeDtmError) as caught:
        hash_weights(open_checkpoint(path))
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("size", [None, 0, -1000])
def test_spoilt_safetensors(folders: dict[str, Path], tmp_path: Path, size: int | None) -> None:
    file = shutil.copytree(folders["bpe"], tmp_path / "hf") / "model-00002-of-00002.safetensors"
    data = file.read_bytes()
    file.unlink()
    if size is None:
        return _refused(file.parent, f"lacks 1 of 2 shards ({file.name})")
    file.write_bytes(data[:size])
    return _refused(file.parent, f"{file.name} cannot be read")


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    _refused(folder, "no .safetensors file")
    (folder / "config.json").unlink()
    _refused(folder, "config.json")
    _refused(tmp_path / "nothing", "does not exist")


@pytest.mark.parametrize("text", ["{", "[]", "\xff\xfe"])
def test_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    _refused(folder, "config.json")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_unsupported_config(folder: Path, change: dict[str, Any], word: str) -> None:
    _edit_config(folder, **change)
    _refused(folder, word)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[UP][0, :3].fill_(torch.nan), "blk.1.ffn_up.weight has 3 NaN"),
        (lambda t: t["model.norm.weight"][7].fill_(torch.inf), "output_norm.weight has 1 NaN"),
        (lambda t: t.pop(UP), "lacks 1 tensors (blk.1.ffn_up.weight)"),
        (lambda t: t.pop("lm_head.weight"), "output.weight"),
        (lambda t: t.update({UP: t[UP][:-1].clone()}), "blk.1.ffn_up.weight has shape (511, 256)"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), "blk.1.ffn_up.weight has type I8"),
    ],
)
def test_spoilt_weights_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], words: str
) -> None:
    _edit_weights(folder, change)
    _refused(folder, words)


@pytest.mark.parametrize("size", [0, 3, 100, 5000, -1000, -1])
def test_truncated_gguf(tiny_gguf: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:size])
    _refused(path, "cut.gguf is no readable GGUF")


@pytest.mark.parametrize(
    ("architecture", "words"), [("gpt2", "gpt2 GGUF"), ("llama", "has no llama.embedding_length")]
)
def test_other_ggufs(tmp_path: Path, architecture: str, words: str) -> None:
    with closing(gguf.GGUFWriter(tmp_path / "other.gguf", architecture)) as writer:
        write_head(writer)
    _refused(tmp_path / "other.gguf", words)
