"""Weights as bytes: what their fingerprint and their hash notice, and NaN in every type."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import uniform
from edge_dtm.host.checkpoint import weights
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.checkpoint.weights import WeightsCheck, fingerprint, hash_weights
from edge_dtm.host.export import export_gguf, fixed_bytes

UP, GGUF_UP = "model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"


@pytest.fixture
def folder(tiny_llamas: Callable[[str], Path], tmp_path: Path) -> Path:
    """One in several shards that a test may spoil."""
    return Path(shutil.copytree(tiny_llamas("bpe"), tmp_path / "hf"))


def _export(folder: Path, kind: str) -> Path:
    checkpoint, path = open_checkpoint(folder), folder.parent / f"{kind}.gguf"
    plan = uniform(checkpoint.components(), kind, fixed_bytes(checkpoint))
    export_gguf(checkpoint, plan, path, {})
    return path


def _one_file(folder: Path, dtype: torch.dtype, **changed: torch.Tensor) -> Path:
    """The same tensors in one shard."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {k: v.to(dtype) for k, v in load_file(file).items()}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors | changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _flip(checkpoint: Checkpoint, name: str, at: int) -> None:
    """The lowest bit of one byte of a tensor."""
    tensor = checkpoint.stored[name]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset + at)
        (byte,) = file.read(1)
        file.seek(tensor.offset + at)
        file.write(bytes([byte ^ 1]))


def test_the_fingerprint_notices_headers_sizes_and_samples(folder: Path) -> None:
    path = _export(folder, "F16")
    seen = [fingerprint(open_checkpoint(path))]
    assert fingerprint(open_checkpoint(path)) == seen[0]
    checkpoint = open_checkpoint(path)
    for name in (GGUF_UP, "output_norm.weight"):
        for at in (0, checkpoint.stored[name].size_bytes - 1):
            _flip(checkpoint, name, at)
            seen.append(fingerprint(checkpoint))
    path.write_bytes(path.read_bytes() + b"\0")
    seen.append(fingerprint(checkpoint))
    seen.append(fingerprint(open_checkpoint(_export(folder, "BF16"))))
    seen.append(fingerprint(open_checkpoint(folder)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-5}))
    seen.append(fingerprint(open_checkpoint(folder)))
    assert len(set(seen)) == len(seen)


def test_the_hash_notices_every_byte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(folder)
    printed, first = fingerprint(checkpoint), hash_weights(checkpoint)
    monkeypatch.setattr(weights, "PIECE_BYTES", 5000)
    assert hash_weights(checkpoint) == first
    _flip(checkpoint, GGUF_UP, 3001)
    assert fingerprint(checkpoint) == printed
    assert hash_weights(checkpoint) != first


def test_the_hash_is_the_same_in_any_shards(folder: Path) -> None:
    first = hash_weights(open_checkpoint(folder))
    moved = folder.rename(folder.with_name("elsewhere"))
    assert hash_weights(open_checkpoint(_one_file(moved, torch.float32))) == first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_infinity_are_counted(
    folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = torch.zeros(512, 256, dtype=dtype)
    largest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    up[0, :4] = torch.tensor([largest.max, largest.min, largest.tiny, -0.0])
    spoilt = up.clone()
    spoilt[7, 3], spoilt[200, 0], spoilt[-1, -1] = torch.nan, torch.inf, -torch.inf
    monkeypatch.setattr(weights, "PIECE_BYTES", 5000)
    hash_weights(open_checkpoint(_one_file(folder, dtype, **{UP: up})))
    save_file({**load_file(folder / "model.safetensors"), UP: spoilt}, folder / "model.safetensors")
    check = WeightsCheck(open_checkpoint(folder))
    check.look()
    with pytest.raises(EdgeDtmError, match="1 bad tensors: blk.1.ffn_up.weight has 3 NaN"):
        check.sha256()
    assert isinstance(check.failure(), EdgeDtmError)
    with pytest.raises(EdgeDtmError, match="3 NaN"):
        check.look()


def test_nan_in_the_scale_of_a_block(folder: Path) -> None:
    path = _export(folder, "Q4_0")
    hash_weights(open_checkpoint(path))
    (tensor,) = (t for t in gguf.GGUFReader(path, "r+").tensors if t.name == GGUF_UP)
    tensor.data[3, 18:20] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    tensor.data.flush()
    with pytest.raises(EdgeDtmError, match="blk.1.ffn_up.weight has 32 NaN"):
        hash_weights(open_checkpoint(path))


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_ggufs_sixteen_bits_are_taken_as_they_are(
    folder: Path, kind: str, dtype: torch.dtype
) -> None:
    checkpoint = open_checkpoint(_export(folder, kind))
    for name, shape in checkpoint.shapes().items():
        tensor = checkpoint.torch_tensor(name)
        assert tensor.dtype == (dtype if len(shape) == 2 else torch.float32)
        assert np.array_equal(tensor.float().numpy(), checkpoint.hf_tensor(name)), name
    block = Llama(checkpoint, torch.device("cpu")).block(1)
    assert torch.equal(
        block.tensors["attn_q.weight"],
        torch.from_numpy(checkpoint.hf_tensor("blk.1.attn_q.weight")),
    )
