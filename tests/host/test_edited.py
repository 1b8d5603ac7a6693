"""Checkpoints with some tensors replaced: what they offer, and what becomes of a damaged file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Made

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import uniform
from edge_dtm.host.blocks.scales import find_scales
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.derived import EditedCheckpoint, EqualizedCheckpoint, write_edited
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
    write_edited(path, _changes(made.checkpoint))
    return EditedCheckpoint(made.checkpoint, path)


def test_only_what_is_in_the_file_is_another(made: Made, edited: EditedCheckpoint) -> None:
    original, changes = made.checkpoint, _changes(made.checkpoint)
    assert edited.components() == original.components()
    assert edited.vectors() == original.vectors()
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


def test_pickled(edited: EditedCheckpoint) -> None:
    """As it goes to another process."""
    back = pickle.loads(pickle.dumps(edited))
    for name in CHANGED:
        assert np.array_equal(back.tensor(name), edited.tensor(name))


def test_no_place_to_write(made: Made, tmp_path: Path) -> None:
    with pytest.raises(EdgeDtmError, match="free some space") as caught:
        write_edited(tmp_path / "none" / "edited", _changes(made.checkpoint))
    assert "\n" not in str(caught.value)
