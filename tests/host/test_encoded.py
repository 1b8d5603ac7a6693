"""The bytes kept from quantizing to export: the same ones, in GGUF's order, or a line that says
what to do."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Made

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.ggml_types import DEFAULT_TYPES
from edge_dtm.formats.plan import Plan, Treatment
from edge_dtm.host.blocks.costs import Costs
from edge_dtm.host.blocks.encoded import EncodedStore, takes_feedback
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.export import export_gguf, fixed_bytes
from edge_dtm.host.quantize.treat import treat, treated_values
from edge_dtm.search.cost_table import CostTable

Array = np.ndarray[Any, Any]
KIND = Treatment("Q4_0")


@pytest.fixture
def shipped(made: Made, tmp_path: Path) -> EncodedStore:
    return EncodedStore(tmp_path / "shipped", made.checkpoint)


def _rotated(data: Array, heads: int) -> Array:
    """llama.cpp's order of q and k rows: neighbours are rotated, not halves."""
    d = len(data) // heads
    order = [h * d + s * (d // 2) + i for h in range(heads) for i in range(d // 2) for s in (0, 1)]
    return data[order]


@pytest.mark.parametrize(
    ("name", "heads"), [("blk.0.attn_q", 4), ("blk.1.attn_k", 2), ("blk.2.attn_v", 0)]
)
@pytest.mark.parametrize("treatment", [KIND, Treatment("Q8_0", 0.25)])
def test_what_is_saved_is_what_comes_out(
    made: Made, shipped: EncodedStore, name: str, heads: int, treatment: Treatment
) -> None:
    component, importance = made.component(name), np.arange(256, dtype=np.float32)
    data = treat(made.weights(name), treatment, None)
    assert not shipped.has(component, treatment) and shipped.importance(name) is None
    shipped.save(component, treatment, data, importance)
    assert shipped.has(component, treatment) and not shipped.has(component, Treatment("Q8_0", 0.5))
    found = shipped.encoded(component, treatment)
    assert found.dtype == np.uint8
    assert np.array_equal(found, _rotated(data, heads) if heads else data)
    assert np.array_equal(np.array(shipped.importance(name)), importance)
    assert not list(shipped.folder.glob("*.tmp"))


def test_the_exported_file_holds_the_values(
    made: Made, shipped: EncodedStore, tmp_path: Path
) -> None:
    """Every matrix through EncodedStore and export, read back by the GGUF reader in HF's order."""
    for c in made.components:
        shipped.save(c, KIND, treat(made.weights(c.name), KIND, None))
    treatments = (KIND,) * len(made.components)
    plan = Plan(made.components, treatments, fixed_bytes(made.checkpoint))
    export_gguf(made.checkpoint, plan, tmp_path / "m.gguf", shipped.encoded)
    back = open_checkpoint(tmp_path / "m.gguf")
    for c in made.components:
        expected = treated_values(made.weights(c.name), KIND, None)
        assert np.array_equal(back.hf_tensor(c.name + ".weight"), expected), c.name


def test_which_treatments_take_feedback() -> None:
    assert all(takes_feedback(Treatment(t)) for t in DEFAULT_TYPES if t != "F16")
    assert not takes_feedback(Treatment("F16")) and not takes_feedback(Treatment("Q8_0", 0.1))


def test_between_two_levels_of_zeros_the_upper_one_decides(
    made: Made, shipped: EncodedStore
) -> None:
    component = made.component("blk.0.ffn_up")
    measured = {
        Treatment("Q8_0"): False,
        Treatment("Q8_0", 0.25): False,
        Treatment("Q8_0", 0.5): True,
        Treatment("F16", 0.25): True,
        Treatment("F16", 0.5): False,
    }
    table = CostTable((component,), (tuple(measured),), ((1.0,) * len(measured),), 0)
    feedback = {component.name: tuple(measured.values())}
    costs = Costs(table, shipped, made.checkpoint, {}, feedback, made.data)
    for treatment, yes in measured.items():
        assert costs.uses_feedback(component, treatment) is yes
        if treatment.zero_share:
            below = Treatment(treatment.type, treatment.zero_share - 0.1)
            assert costs.uses_feedback(component, below) is yes
    assert costs.uses_feedback(component, Treatment("Q8_0", 0.6)) is False  # beyond all measured


# --- what was lost --------------------------------------------------------------------------


@pytest.mark.parametrize("left", [None, 0, 5, 0.5, 0.99])
def test_lost_and_truncated_files(made: Made, shipped: EncodedStore, left: float | None) -> None:
    component = made.component("blk.0.ffn_up")
    shipped.save(component, KIND, treat(made.weights(component.name), KIND, None))
    (path,) = shipped.folder.iterdir()
    whole = path.read_bytes()
    if left is None:
        path.unlink()
    else:
        path.write_bytes(whole[: round(left * len(whole)) if left < 1 else round(left)])
    with pytest.raises(EdgeDtmError, match="blk.0.ffn_up.Q4_0.npy.*--no-resume") as caught:
        shipped.encoded(component, KIND)
    assert "\n" not in str(caught.value) and str(shipped.folder) in str(caught.value)


def test_a_full_disk_is_one_line(
    made: Made, shipped: EncodedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(EdgeDtmError, match="No space left on device.*free some space"):
        shipped.save(made.component("blk.0.ffn_up"), KIND, np.zeros((512, 144), np.uint8))
    assert not list(shipped.folder.iterdir())
