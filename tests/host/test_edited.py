"""Checkpoints with some tensors replaced: what they offer, and what becomes of a damaged file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Made
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import uniform
from edge_dtm.host.blocks.scales import find_scales
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.edited import EditedCheckpoint, write_edited
from edge_dtm.host.checkpoint.equalized import EqualizedCheckpoint
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.export import export_gguf, fixed_bytes

CPU = torch.device("cpu")
CHANGED = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.2.ffn_norm.weight")


def _changes(checkpoint: Checkpoint, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    return {
        n: random.standard_normal(checkpoint.hf_tensor(n).shape).astype(np.float32) for n in CHANGED
    }


@pytest.fixture
def edited(made: Made, tmp_path: Path) -> EditedCheckpoint:
    path = tmp_path / "edited.safetensors"
    write_edited(path, _changes(made.checkpoint), {"why": "test"})
    return EditedCheckpoint(made.checkpoint, path)


def test_only_what_is_in_the_file_is_another(made: Made, edited: EditedCheckpoint) -> None:
    original, changes = made.checkpoint, _changes(made.checkpoint)
    assert edited.components() == original.components()
    assert edited.vectors() == original.vectors()
    assert edited.meta == {"why": "test"} and edited.on_grid is None
    assert edited.tokenizer is original.tokenizer
    for name in [c.name + ".weight" for c in original.components()] + [
        n for n, _ in original.vectors()
    ]:
        wanted = changes.get(name)
        if wanted is None:
            assert np.array_equal(edited.hf_tensor(name), original.hf_tensor(name)), name
            assert np.array_equal(edited.tensor(name), original.tensor(name)), name
        else:
            assert np.array_equal(edited.hf_tensor(name), wanted), name
            assert edited.hf_tensor(name).dtype == np.float32
    # Neighbours are rotated in GGUF, halves in Hugging Face: row 1 of a head of 64 was row 32.
    q = changes["blk.0.attn_q.weight"]
    assert np.array_equal(edited.tensor("blk.0.attn_q.weight")[1], q[32])
    assert np.array_equal(edited.gguf_rows("blk.0.attn_q", q)[1], q[32])
    model = load_model(edited, CPU)
    for name, data in changes.items():
        stem, _, suffix = name.rpartition(".")
        assert np.array_equal(model.state_dict()[f"{module_name(stem)}.{suffix}"].numpy(), data)


@pytest.mark.parametrize("kind", ["equalized", "gguf", "edited"])
def test_over_any_checkpoint(made: Made, tmp_path: Path, kind: str) -> None:
    original = made.checkpoint
    if kind == "equalized":
        scales = find_scales(made.calibration, original)
        original = EqualizedCheckpoint(original, scales)
    elif kind == "gguf":
        plan = uniform(original.components(), "F32", fixed_bytes(original))
        export_gguf(original, plan, tmp_path / "source.gguf", {})
        original = open_checkpoint(tmp_path / "source.gguf")
    else:
        write_edited(tmp_path / "first", {"blk.1.attn_k.weight": made.weights("blk.1.attn_k") * 2})
        original = EditedCheckpoint(original, tmp_path / "first")
    changes = _changes(original)
    write_edited(tmp_path / "edited", changes)
    found = EditedCheckpoint(original, tmp_path / "edited")
    for c in original.components():
        name = c.name + ".weight"
        expected = changes.get(name, original.hf_tensor(name))
        assert np.array_equal(found.hf_tensor(name), expected), name
        assert np.array_equal(found.tensor(name), original.gguf_rows(c.name, expected)), name


def test_pickled_and_hashed(made: Made, edited: EditedCheckpoint, tmp_path: Path) -> None:
    read: list[int] = []
    first = edited.check(read.append)
    assert first != made.checkpoint.check() and edited.check() == first
    back = pickle.loads(pickle.dumps(edited))
    assert isinstance(back, EditedCheckpoint) and back.check() == first
    for name in CHANGED:
        assert np.array_equal(back.tensor(name), edited.tensor(name))
    write_edited(tmp_path / "again", _changes(made.checkpoint), {"why": "test"})
    assert (tmp_path / "again").read_bytes() == edited.file.read_bytes()
    changes = _changes(made.checkpoint)
    changes[CHANGED[1]][3, 5] += 1e-3
    write_edited(tmp_path / "other", changes, {"why": "test"})
    assert EditedCheckpoint(made.checkpoint, tmp_path / "other").check() != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "edited.safetensors", "other"]


def _refused(made: Made, path: Path) -> str:
    with pytest.raises(EdgeDtmError) as caught:
        EditedCheckpoint(made.checkpoint, path).check()
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def test_damaged_file_is_one_line(made: Made, edited: EditedCheckpoint, tmp_path: Path) -> None:
    whole, path = edited.file.read_bytes(), tmp_path / "bad"
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "--no-resume" in _refused(made, path)
    assert "cannot be read" in _refused(made, tmp_path / "none")
    save_file(_changes(made.checkpoint), path)
    assert "cannot be read" in _refused(made, path)  # not ours


@given(at=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_no_flipped_bit_passes(made: Made, at: int, bit: int) -> None:
    """Whatever bit it is: refused in one line, or without any consequence."""
    folder = made.activations.folder.parent
    path = folder / "flipped.safetensors"
    changes = {"blk.1.ffn_norm.weight": np.arange(256, dtype=np.float32)}
    write_edited(path, changes)
    first = EditedCheckpoint(made.checkpoint, path).check()
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = EditedCheckpoint(made.checkpoint, path)
        if found.check() == first:
            name = "blk.1.ffn_norm.weight"
            assert np.array_equal(found.tensor(name), changes[name])
    except EdgeDtmError as error:
        assert "\n" not in str(error)
    finally:
        path.unlink()


def test_shapes_that_do_not_fit(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "edited"
    w = made.weights("blk.1.ffn_up")
    write_edited(path, {"blk.1.ffn_up.weight": w[:-32]})
    assert "(480, 256), not (512, 256)" in _refused(made, path)
    write_edited(path, {"blk.7.ffn_up.weight": w})
    assert "blk.7.ffn_up.weight has shape" in _refused(made, path)


def test_weights_that_are_not_finite(made: Made, tmp_path: Path) -> None:
    data = np.ones(256, np.float32)
    data[7] = np.inf
    write_edited(tmp_path / "edited", {"blk.1.ffn_norm.weight": data})
    assert "blk.1.ffn_norm.weight" in _refused(made, tmp_path / "edited")


def test_no_place_to_write(made: Made, tmp_path: Path) -> None:
    with pytest.raises(EdgeDtmError, match="free some space") as caught:
        write_edited(tmp_path / "none" / "edited", _changes(made.checkpoint))
    assert "\n" not in str(caught.value)
