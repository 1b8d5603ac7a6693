"""Checkpoints with some tensors replaced: all others are the original's."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import Made

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import uniform
from edge_dtm.host.blocks.block_jobs import find_site_scales
from edge_dtm.host.blocks.encoded import EncodedStore
from edge_dtm.host.checkpoint.derived import (
    EditedCheckpoint,
    EqualizedCheckpoint,
    TreatedCheckpoint,
    write_edited,
)
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.export import export_gguf, fixed_bytes
from edge_dtm.host.quantize.treat import treat

CHANGED = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.2.ffn_norm.weight")


@pytest.mark.parametrize("kind", ["folder", "equalized", "gguf", "edited"])
def test_only_what_is_in_the_file_is_another(made: Made, tmp_path: Path, kind: str) -> None:
    original = made.checkpoint
    if kind == "equalized":
        names = ("blk.0.attn_q", "blk.1.ffn_down")
        original = EqualizedCheckpoint(original, {n: find_site_scales(made.jobs, n) for n in names})
    elif kind == "gguf":
        plan = uniform(original.components(), "F32", fixed_bytes(original))
        export_gguf(original, plan, tmp_path / "source.gguf", {})
        original = open_checkpoint(tmp_path / "source.gguf")
    elif kind == "edited":
        write_edited(tmp_path / "first", {"blk.1.attn_k.weight": made.weights("blk.1.attn_k") * 2})
        original = EditedCheckpoint(original, tmp_path / "first")
    random = np.random.default_rng(0)
    changes = {n: random.standard_normal(original.shapes()[n], np.float32) for n in CHANGED}
    write_edited(tmp_path / "edited", changes)
    edited = EditedCheckpoint(original, tmp_path / "edited")
    assert edited.shapes() == original.shapes()
    assert edited.tokenizer is original.tokenizer
    # Neighbours are rotated in GGUF, halves in Hugging Face: row 1 of a head of 64 was row 32.
    assert np.array_equal(edited.tensor(CHANGED[0])[1], changes[CHANGED[0]][32])
    for checkpoint in (edited, pickle.loads(pickle.dumps(edited))):  # as to another process
        for name in original.shapes():
            expected = changes.get(name, original.hf_tensor(name))
            assert np.array_equal(checkpoint.hf_tensor(name), expected), name
            assert np.array_equal(checkpoint.tensor(name), original.gguf_rows(name, expected))


def test_a_plans_values_in_the_order_of_rows(made: Made, tmp_path: Path) -> None:
    plan = uniform(made.components, "Q8_0", 0)
    store = EncodedStore(tmp_path / "encoded", made.checkpoint)
    for component, treatment in zip(plan.components, plan.treatments, strict=True):
        store.save(component, treatment, treat(made.weights(component.name), treatment, None))
    treated = TreatedCheckpoint(made.checkpoint, (plan, store))
    for checkpoint in (treated, pickle.loads(pickle.dumps(treated))):
        for name in made.checkpoint.shapes():
            original, values = made.checkpoint.hf_tensor(name), checkpoint.hf_tensor(name)
            largest = np.abs(original).max()
            assert np.allclose(values, original, rtol=0, atol=0.01 * largest), name
            assert np.array_equal(values, original) == (original.ndim == 1), name


def test_no_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(EdgeDtmError, match="free some space"):
        write_edited(tmp_path / "none" / "edited", {"a": np.zeros(3, np.float32)})
