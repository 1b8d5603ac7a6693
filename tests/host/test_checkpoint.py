"""Checkpoints read here against transformers, and against llama.cpp with the GGUF made of them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
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
from edge_dtm.host.checkpoint.hf_checkpoint import HfCheckpoint
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.export import export_gguf, f16_plan, fixed_bytes
from edge_dtm.llamacpp.runner import LlamaRunner

CPU = torch.device("cpu")
SEQUENCES, TOKENS, PROMPT = 3, 200, 4


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


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


@pytest.fixture
def sharded(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["bpe"], tmp_path / "hf"))


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
    for component in checkpoint.components():
        name = module_name(component.name) + ".weight"
        found = checkpoint.hf_tensor(component.name + ".weight")
        assert found.shape == (component.rows, component.row_length)
        assert np.array_equal(found, state.pop(name).numpy())
    for name, length in checkpoint.vectors():
        if name != "rope_freqs.weight":
            stem, _, suffix = name.rpartition(".")
            data = state.pop(f"{module_name(stem)}.{suffix}").numpy()
            assert data.shape == (length,)
            assert np.array_equal(checkpoint.hf_tensor(name), data)
    assert set(state) <= {"lm_head.weight"}  # of a tied one


def test_llama_cpp_computes_the_same_with_float32(
    variant: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    path = _export(open_checkpoint(variant), tmp_path / "f32.gguf", "F32")
    theirs = _logits(_transformers(variant), ids)[:, PROMPT - 1 : -1].numpy()
    found = _llama_cpp_logits(path, ids, "F32")
    assert np.abs(found - theirs).max() < 0.01
    top = np.sort(theirs, axis=-1)
    clear = top[..., -1] - top[..., -2] > 0.05
    assert clear.mean() > 0.5
    assert np.array_equal(found.argmax(-1)[clear], theirs.argmax(-1)[clear])


def test_llama_cpp_computes_nearly_the_same_with_f16(
    variant: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(variant)
    path = tmp_path / "f16.gguf"
    export_gguf(checkpoint, f16_plan(checkpoint, fixed_bytes(checkpoint)), path, {})
    theirs = _logits(_transformers(variant), ids)[:, PROMPT - 1 : -1].numpy()
    found = _llama_cpp_logits(path, ids, "F16")
    top = np.sort(theirs, axis=-1)
    clear = top[..., -1] - top[..., -2] > 0.05
    assert np.array_equal(found.argmax(-1)[clear], theirs.argmax(-1)[clear])
    # And the GGUF is itself a checkpoint.
    opened = open_checkpoint(path)
    back = pickle.loads(pickle.dumps(opened))  # as it goes to another process
    assert isinstance(back, GgufCheckpoint) and back.on_grid is None
    assert back.components() == checkpoint.components()
    assert back.vectors() == checkpoint.vectors()
    for component in checkpoint.components():
        name = component.name + ".weight"
        half = checkpoint.hf_tensor(name).astype(np.float16).astype(np.float32)
        assert np.array_equal(back.hf_tensor(name), half), name
        assert np.array_equal(back.tensor(name), checkpoint.tensor(name).astype(np.float16)), name
    for name, _ in checkpoint.vectors():
        assert np.array_equal(back.tensor(name), checkpoint.tensor(name)), name
    again = _logits(load_model(back, CPU), ids)[:, PROMPT - 1 : -1].numpy()
    # Training ends elsewhere on every CPU, and with it how much F16 rounds; a matrix in the wrong
    # place makes differences of several logits.
    assert np.abs(again - theirs).max() < 0.2
    assert np.array_equal(again.argmax(-1)[clear], theirs.argmax(-1)[clear])


def test_without_the_permutation_llama_cpp_disagrees(
    folder: Path, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "gguf_rows", lambda self, name, data: data)
    path = _export(open_checkpoint(folder), tmp_path / "wrong.gguf", "F32")
    theirs = _logits(_transformers(folder), ids)[:, PROMPT - 1 : -1].numpy()
    found = _llama_cpp_logits(path, ids, "F32")
    assert (found.argmax(-1) != theirs.argmax(-1)).mean() > 0.05


def test_llama3_factors_matter(folders: dict[str, Path], ids: torch.Tensor, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["bias_rope"], tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    without = _logits(load_model(open_checkpoint(folder), CPU), ids)
    scaled = _logits(load_model(open_checkpoint(folders["bias_rope"]), CPU), ids)
    assert (without - scaled).abs().max() > 0.1


def test_linear_rope_scaling(folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    theirs = _logits(_transformers(folder), ids)
    torch.testing.assert_close(_logits(load_model(checkpoint, CPU), ids), theirs, atol=1e-4, rtol=0)
    path = _export(checkpoint, tmp_path / "linear.gguf", "F32")
    found = _llama_cpp_logits(path, ids, "F32")
    assert np.abs(found - theirs[:, PROMPT - 1 : -1].numpy()).max() < 0.01
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


def test_hash_names_the_weights(folder: Path) -> None:
    first = HfCheckpoint(folder).check()
    read: list[int] = []
    assert HfCheckpoint(folder).check(read.append) == first
    checkpoint = HfCheckpoint(folder)
    assert sum(read) == sum(c.weights for c in checkpoint.components()) + sum(
        n for _, n in checkpoint.vectors()
    )

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3

    _edit_weights(folder, change)
    assert HfCheckpoint(folder).check() != first


def _refused(path: Path, *words: str) -> None:
    with pytest.raises(EdgeDtmError) as caught:
        checkpoint = open_checkpoint(path)
        checkpoint.check()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_truncated_safetensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    _refused(folder, "model.safetensors cannot be read")
    file.write_bytes(b"")
    _refused(folder, "model.safetensors cannot be read")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    _refused(sharded, "model-00002-of-00002.safetensors")


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "config.json")
    _refused(folder, "config.json")
    (tmp_path / "config.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    _refused(folder, "no .safetensors file")
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
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    _refused(folder, "supported", word)


UP = "model.layers.1.mlp.up_proj.weight"
SPOILT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "nan": (lambda t: t[UP][0, :3].fill_(torch.nan), "blk.1.ffn_up.weight has 3 NaN"),
    "infinite": (
        lambda t: t["model.norm.weight"][7].fill_(torch.inf), "output_norm.weight has 1 NaN"
    ),
    "missing": (lambda t: t.pop(UP), "lacks 1 tensors (blk.1.ffn_up.weight)"),
    "headless": (lambda t: t.pop("lm_head.weight"), "output.weight"),
    "short": (
        lambda t: t.update({UP: t[UP][:-1].clone()}),
        "blk.1.ffn_up.weight has shape (511, 256), not (512, 256)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_weights_are_named(folder: Path, how: str) -> None:
    change, words = SPOILT[how]
    _edit_weights(folder, change)
    _refused(folder, words)


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, -1000])
def test_truncated_gguf(tiny_gguf: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:kept])
    _refused(path, "cut.gguf")


@pytest.mark.parametrize(
    ("architecture", "words"), [("gpt2", "gpt2 GGUF"), ("llama", "has no llama.embedding_length")]
)
def test_other_ggufs(tmp_path: Path, architecture: str, words: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(b"not a GGUF at all, but long enough to be read\n" * 20)
    _refused(path, "no readable GGUF")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _refused(path, words)
