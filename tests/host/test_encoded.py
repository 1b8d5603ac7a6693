"""The blocks kept from measuring to export: the same ones, in GGUF's order, or a line that says
what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Made

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import ggml_types
from edge_dtm.formats.ggml_types import DEFAULT_TYPES
from edge_dtm.formats.plan import Plan, Treatment
from edge_dtm.host.blocks.encoded import EncodedStore, takes_feedback
from edge_dtm.host.blocks.fit import component_importance, edge_feedback
from edge_dtm.host.blocks.sensitivity import edge_costs
from edge_dtm.host.checkpoint.derived import EqualizedCheckpoint
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.export import export_gguf, fixed_bytes
from edge_dtm.host.quantize.equalize import sites
from edge_dtm.host.quantize.gptq import gptq_quantize
from edge_dtm.host.quantize.hessian import DampedHessian, input_hessian
from edge_dtm.host.quantize.treat import treat

Array = np.ndarray[Any, Any]
KIND = Treatment("Q4_0")


def _vector(n: int) -> Array:
    return np.random.default_rng(n).uniform(0.1, 2, n).astype(np.float32)


def _feedback(made: Made, name: str) -> DampedHessian:
    x = torch.from_numpy(made.calibration.inputs(name))
    return DampedHessian(input_hessian(x, None), 0.3)


def _blocks(made: Made, name: str, kind: str = "Q4_0") -> tuple[Array, Array]:
    """Bytes and values, rows as Hugging Face orders them."""
    w = torch.from_numpy(made.weights(name))
    ((data, values),) = gptq_quantize(w, [kind], _feedback(made, name))
    return data, values.numpy()


@pytest.fixture
def shipped(made: Made, tmp_path: Path) -> EncodedStore:
    return EncodedStore(tmp_path / "shipped", made.checkpoint)


@pytest.fixture
def kept(made: Made, shipped: EncodedStore) -> EncodedStore:
    """With blocks of one matrix in it."""
    component = made.component("blk.0.ffn_up")
    shipped.save(component, KIND, _blocks(made, component.name)[0])
    shipped.save_component(component.name, _vector(component.row_length), ["Q4_0", "Q8_0"])
    return shipped


def _rotated(data: Array, heads: int) -> Array:
    """llama.cpp's order of q and k rows: neighbours are rotated, not halves."""
    d = len(data) // heads
    order = [h * d + s * (d // 2) + i for h in range(heads) for i in range(d // 2) for s in (0, 1)]
    return data[order]


@pytest.mark.parametrize(
    ("name", "heads"), [("blk.0.attn_q", 4), ("blk.1.attn_k", 2), ("blk.2.attn_v", 0)]
)
def test_what_is_saved_is_what_comes_out(
    made: Made, shipped: EncodedStore, name: str, heads: int
) -> None:
    data, _ = _blocks(made, name)
    component = made.component(name)
    shipped.save(component, KIND, data)
    shipped.save_component(name, _vector(component.row_length), ["Q4_0"])
    found = shipped.encoded(component, KIND)
    assert found.dtype == np.uint8
    assert np.array_equal(found, _rotated(data, heads) if heads else data)
    assert not list(shipped.folder.glob("*.tmp"))


def test_the_exported_file_holds_the_values(
    made: Made, shipped: EncodedStore, tmp_path: Path
) -> None:
    """Every matrix through EncodedStore and export, read back by the GGUF reader in HF's order."""
    values, treatments = {}, []
    for c in made.components:
        if c.in_block:
            data, values[c.name] = _blocks(made, c.name)
            shipped.save(c, KIND, data)
            shipped.save_component(c.name, _vector(c.row_length), ["Q4_0"])
        else:
            shipped.save_component(c.name, None, [])
        treatments.append(KIND if c.in_block else Treatment("Q8_0"))
    plan = Plan(made.components, tuple(treatments), fixed_bytes(made.checkpoint))
    export_gguf(made.checkpoint, plan, tmp_path / "m.gguf", shipped.encoded)
    back = open_checkpoint(tmp_path / "m.gguf")
    for name, expected in values.items():
        assert np.array_equal(back.hf_tensor(name + ".weight"), expected), name


@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize(
    "treatment", [Treatment("Q5_1"), Treatment("F16"), Treatment("Q8_0", 0.3), Treatment("Q4_K")]
)
def test_types_without_feedback_are_rounded_plainly(
    made: Made, shipped: EncodedStore, treatment: Treatment, importance: bool
) -> None:
    component = made.component("blk.1.attn_q")
    vector = _vector(component.row_length) if importance else None
    # Q8_0 was measured with feedback, but not with zeros.
    shipped.save_component(component.name, vector, ["Q8_0", "Q4_0"])
    expected = treat(_rotated(made.weights(component.name), 4), treatment, vector)
    assert np.array_equal(shipped.encoded(component, treatment), expected)


def test_weights_are_the_equalized_ones(made: Made, tmp_path: Path) -> None:
    config = made.checkpoint.config
    scales = {n: 1 + _vector(config.ffn if "down" in n else config.hidden) for n in sites(config)}
    equalized = EqualizedCheckpoint(made.checkpoint, scales)
    shipped = EncodedStore(tmp_path / "shipped", equalized)
    component, vector = made.component("blk.0.ffn_gate"), _vector(256)
    shipped.save_component(component.name, vector, [])
    w = made.weights(component.name) / scales["blk.0.ffn_gate"]
    assert np.array_equal(shipped.encoded(component, KIND), treat(w, KIND, vector))


@pytest.mark.parametrize(("name", "is_tied"), [("output", False), ("token_embd", True)])
def test_of_the_ends_the_measured_rows_are_shipped(
    made: Made, shipped: EncodedStore, name: str, is_tied: bool
) -> None:
    """Costs are measured on the rows that occur, export makes all of them from the moments."""
    component, weights = made.component(name), made.weights(name)
    feedback = edge_feedback(made.calibration, {}, component, is_tied)
    importance = component_importance(made.activations, component, is_tied)
    choices = [Treatment(t) for t in DEFAULT_TYPES]
    _, which = edge_costs(
        made.activations, component, choices, weights, importance, is_tied, feedback
    )
    types = [t.type for t, yes in zip(choices, which, strict=True) if yes]
    assert len(types) > 3
    shipped.save_component(name, importance, types, feedback)
    rows = np.random.default_rng(0).permutation(len(weights))[:300]  # any, cut otherwise
    measured = gptq_quantize(torch.from_numpy(weights[rows]), types, feedback)
    for kind, (data, _) in zip(types, measured, strict=True):
        found = shipped.encoded(component, Treatment(kind))
        assert found.shape == (component.rows, ggml_types.row_bytes(kind, component.row_length))
        assert np.array_equal(found[rows], data), (kind, (found[rows] != data).mean())
    plain = shipped.encoded(component, Treatment("F16"))
    assert np.array_equal(plain, treat(weights, Treatment("F16"), None))


def test_which_treatments_take_feedback() -> None:
    assert all(takes_feedback(Treatment(t)) for t in DEFAULT_TYPES if t != "F16")
    assert not takes_feedback(Treatment("F16")) and not takes_feedback(Treatment("Q8_0", 0.1))


def test_which_treatments_with_zeros_are_fitted(made: Made, shipped: EncodedStore) -> None:
    """Between two measured levels the upper one decides."""
    component = made.component("blk.0.ffn_up")
    levels = {("Q8_0", 0.25): False, ("Q8_0", 0.5): True, ("F16", 0.25): True, ("F16", 0.5): False}
    sparse = {Treatment(t, s): yes for (t, s), yes in levels.items()}
    shipped.save_component(component.name, None, [], None, sparse)
    for (kind, share), yes in levels.items():
        assert shipped.is_fitted(component, Treatment(kind, share)) is yes
        assert shipped.is_fitted(component, Treatment(kind, share - 0.1)) is yes
    assert shipped.is_fitted(component, Treatment("Q8_0", 0.6)) is False  # beyond all measured
    shipped.save_component(component.name, None, [])
    assert shipped.is_fitted(component, Treatment("Q8_0", 0.25)) is False
    (shipped.folder / f"{component.name}.npz").write_bytes(b"PK")
    with pytest.raises(EdgeDtmError, match="lost blk.0.ffn_up as Q8_0.*--no-resume"):
        shipped.is_fitted(component, Treatment("Q8_0", 0.25))


def test_blocks_with_zeros_are_the_stored_ones(made: Made, shipped: EncodedStore) -> None:
    component = made.component("blk.1.attn_q")
    fitted, plain = Treatment("Q8_0", 0.25), Treatment("Q8_0", 0.5)
    vector = _vector(component.row_length)
    shipped.save_component(component.name, vector, ["Q8_0"], None, {fitted: True, plain: False})
    assert not shipped.has(component, fitted)
    with pytest.raises(EdgeDtmError, match="--no-resume"):
        shipped.encoded(component, fitted)
    data = treat(made.weights(component.name), fitted, None)
    shipped.save(component, fitted, data)
    assert shipped.has(component, fitted) and not shipped.has(component, plain)
    assert np.array_equal(shipped.encoded(component, fitted), _rotated(data, 4))
    assert np.array_equal(shipped.load(component, fitted), _rotated(data, 4))
    expected = treat(_rotated(made.weights(component.name), 4), plain, vector)
    assert np.array_equal(shipped.encoded(component, plain), expected)
    with pytest.raises(EdgeDtmError, match="cannot be read.*--no-resume"):
        shipped.load(component, plain)
    assert np.array_equal(shipped.importance(component.name), vector)
    shipped.save_component(component.name, None, [])
    assert shipped.importance(component.name) is None


# --- what was lost --------------------------------------------------------------------------


def _lost(shipped: EncodedStore, made: Made) -> None:
    with pytest.raises(EdgeDtmError, match="--no-resume") as caught:
        shipped.encoded(made.component("blk.0.ffn_up"), KIND)
    text = str(caught.value)
    assert "\n" not in text and "blk.0.ffn_up as Q4_0" in text and str(shipped.folder) in text


@pytest.mark.parametrize("name", ["blk.0.ffn_up.npz", "blk.0.ffn_up.Q4_0.npy"])
@pytest.mark.parametrize("left", [None, 0, 5, 0.5, 0.99])
def test_lost_and_truncated_files(
    made: Made, kept: EncodedStore, name: str, left: float | None
) -> None:
    path = kept.folder / name
    assert kept.encoded(made.component("blk.0.ffn_up"), KIND).any()
    whole = path.read_bytes()
    if left is None:
        path.unlink()
    else:
        path.write_bytes(whole[: round(left * len(whole)) if left < 1 else round(left)])
    _lost(kept, made)
    path.write_bytes(whole)
    assert kept.encoded(made.component("blk.0.ffn_up"), KIND).any()


def test_a_type_that_was_not_kept(made: Made, kept: EncodedStore) -> None:
    with pytest.raises(EdgeDtmError, match="lost blk.0.ffn_up as Q8_0.*--no-resume"):
        kept.encoded(made.component("blk.0.ffn_up"), Treatment("Q8_0"))


def test_a_full_disk_is_one_line(
    made: Made, kept: EncodedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {p.name: p.read_bytes() for p in kept.folder.iterdir()}
    monkeypatch.setattr(np, "save", full)
    monkeypatch.setattr(np, "savez", full)
    component = made.component("blk.0.ffn_up")
    with pytest.raises(EdgeDtmError, match="No space left on device.*free some space"):
        kept.save(component, KIND, np.zeros((512, 144), np.uint8))
    with pytest.raises(EdgeDtmError, match="No space left on device.*free some space"):
        kept.save_component(component.name, None, [])
    assert {p.name: p.read_bytes() for p in kept.folder.iterdir()} == before
