"""What the fitting stages are given, against autograd from the logits, and runs that were cut."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import SEED, STARTS, Made
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.reference import CALIBRATION, EXTRA, HELD_OUT, PACKAGED, Reference
from edge_dtm.host.blocks import calibration as module
from edge_dtm.host.blocks.calibration import SIGN_DRAWS, Calibration
from edge_dtm.host.blocks.capture import BATCH_SEQUENCES, input_key
from edge_dtm.host.checkpoint.model import module_name
from edge_dtm.host.trajectory.reference import COST_SEQUENCES, calibration_rows

OUTPUTS = 5  # sequences whose output gradients are kept: not a whole number of batches
CALIBRATION_SEED = SEED + 2


class _Direct:
    """All inputs and gradients, sequence by sequence without padding, from the logits back."""

    def __init__(self, made: Made, seed: int) -> None:
        self.x: dict[str, list[Any]] = {}
        self.b: dict[str, list[Any]] = {}
        self.g: dict[str, list[Any]] = {}
        modules = dict(made.model.named_modules())
        blocks = [c.name for c in made.components if c.in_block]
        for row in range(len(made.reference)):
            kept: dict[str, torch.Tensor] = {}
            handles = []
            for name in blocks:
                hook = partial(self._keep, kept, name)
                handles.append(modules[module_name(name)].register_forward_hook(hook))
            handles.append(
                made.model.lm_head.register_forward_hook(
                    lambda _, args, out, kept=kept: kept.__setitem__("b.final_hidden", args[0])
                )
            )
            embedded = made.model.model.embed_tokens(made.ids(row)).detach().requires_grad_(True)
            kept["g.token_embd"] = embedded
            logits = made.model(inputs_embeds=embedded, use_cache=False).logits[0]
            for handle in handles:
                handle.remove()
            count = int(made.reference.generated_lengths[row])
            top = torch.from_numpy(made.reference.top_ids[row, :count, :2].astype(np.int64))
            at = logits[made.positions(row)]
            margins = at.gather(1, top[:, :1])[:, 0] - at.gather(1, top[:, 1:])[:, 0]
            signs = np.random.default_rng([seed, 0, row]).choice([-1.0, 1.0], count)
            total = (margins * torch.from_numpy(signs.astype(np.float32))).sum()
            for key, gradient in zip(
                kept, torch.autograd.grad(total, list(kept.values())), strict=True
            ):
                parts = self.g if key.startswith("g.") else self.b
                parts.setdefault(key[2:], []).append(gradient[0].double().numpy())
                if key.startswith("b."):
                    self.x.setdefault(key[2:], []).append(kept[key][0].detach().double().numpy())

    @staticmethod
    def _keep(kept: dict[str, torch.Tensor], name: str, _: Any, args: Any, out: Any) -> None:
        kept[f"g.{name}"] = out
        if name == input_key(name):
            kept[f"b.{name}"] = args[0]


@pytest.fixture(scope="module")
def direct(made: Made) -> _Direct:
    assert SIGN_DRAWS == 1
    return _Direct(made, CALIBRATION_SEED)


@pytest.fixture(scope="module", autouse=True)
def _few_outputs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OUTPUT_SEQUENCES", OUTPUTS)
        yield


@pytest.fixture(scope="module")
def calibration(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder = tmp_path_factory.mktemp("calibration") / "c"
    out = Calibration(folder, made.reference, made.components)
    out.capture(made.model, CALIBRATION_SEED)
    return out


def _close(found: Any, expected: Any, share: float) -> None:
    """To a share of the largest value."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < share * np.abs(expected).max()


# --- what is kept ---------------------------------------------------------------------------


def test_inputs_are_those_of_the_model(
    made: Made, calibration: Calibration, direct: _Direct
) -> None:
    for c in made.components:
        # Half precision of files whose largest value is at least 256 of 65504.
        x = calibration.inputs(c.name)
        assert x.dtype == np.float32
        _close(x, np.concatenate(direct.x[input_key(c.name)]), 1e-3)


def test_gradients_are_those_of_the_first_sequences(
    made: Made, calibration: Calibration, direct: _Direct
) -> None:
    assert calibration.output_tokens == int(calibration.edges[OUTPUTS]) < calibration.tokens
    for c in made.components:
        if c.in_block:
            found = calibration.gradients(c.name)
            _close(found, np.concatenate(direct.g[c.name][:OUTPUTS]), 2e-3)


def test_sums_are_those_of_autograd(made: Made, calibration: Calibration, direct: _Direct) -> None:
    for c in made.components:
        key = input_key(c.name)
        x, b = np.concatenate(direct.x[key]), np.concatenate(direct.b[key])
        _close(calibration.input_squares(c.name), (x**2).mean(0), 1e-3)
        _close(calibration.gradient_squares(c.name), (b**2).mean(0), 2e-3)
        if c.in_block:
            g = np.concatenate(direct.g[c.name])
            _close(calibration.token_weights(c.name), np.sqrt((g**2).mean(1)), 2e-3)
            _close(calibration.output_squares(c.name), (g**2).mean(0), 2e-3)


def test_moments_of_the_ends(made: Made, calibration: Calibration, direct: _Direct) -> None:
    """A looked-up row's error moves the margins by its gradient, the head's by the final hidden
    states, once for either row of a margin."""
    positions = int(made.reference.generated_lengths.sum())
    g = np.concatenate(direct.g["token_embd"])
    h = np.concatenate([direct.x["final_hidden"][r][made.positions(r)] for r in range(len(STARTS))])
    assert len(h) == positions
    looked_up, head = g.T @ g / positions, 2 * h.T @ h / positions
    for name, tied, expected in (
        ("token_embd", False, looked_up),
        ("output", False, head),
        ("token_embd", True, looked_up + head),
    ):
        _close(calibration.edge_hessian(name, tied).double().numpy(), expected, 2e-3)


def test_size_is_what_the_files_take(calibration: Calibration) -> None:
    files = list(calibration.folder.glob("*.bin"))
    assert sum(f.stat().st_size for f in files) == calibration.size_bytes
    others = {p.name for p in calibration.folder.iterdir()} - {f.name for f in files}
    assert others == {"sums.npz"}


# --- runs that were cut ---------------------------------------------------------------------


class _Stop(Exception):
    pass


def _state(calibration: Calibration) -> dict[str, bytes]:
    out = {p.name: p.read_bytes() for p in calibration.folder.glob("*.bin")}
    with np.load(calibration.folder / "sums.npz") as data:
        return out | {k: data[k].tobytes() for k in data.files}


@pytest.mark.parametrize("where", ["between batches", "first write", "within a batch", "saving"])
def test_goes_on_where_it_stopped(
    made: Made,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def stop(_: int) -> None:
        raise _Stop

    cut = Calibration(tmp_path / "c", made.reference, made.components)
    if where == "between batches":
        with pytest.raises(_Stop):
            cut.capture(made.model, CALIBRATION_SEED, stop)
    else:
        name, call = {
            "first write": ("_write", 1),
            "within a batch": ("_write", 60),
            "saving": ("_save", 2),
        }[where]
        real, count = getattr(Calibration, name), 0

        def spoilt(*args: Any) -> None:
            nonlocal count
            count += 1
            if count == call:
                raise _Stop
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Calibration, name, spoilt)
            with pytest.raises(_Stop):
                cut.capture(made.model, CALIBRATION_SEED)
    again = Calibration(tmp_path / "c", made.reference, made.components)
    done: list[int] = []
    again.capture(made.model, CALIBRATION_SEED, done.append)
    assert sum(done) == len(STARTS) and set(done) == {BATCH_SEQUENCES}
    assert _state(again) == _state(calibration)
    # A third run has nothing to do, and one that only reads finds the same.
    before = _state(again)
    Calibration(tmp_path / "c", made.reference, made.components).capture(made.model, 99)
    assert _state(again) == before


def test_removed(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    small = Calibration(folder, made.reference.rows(np.arange(2)), made.components)
    small.capture(made.model, 0)
    small.remove()
    assert not folder.exists()


@pytest.mark.parametrize("stage", ["activations", "calibration"])
def test_half_removed_is_not_taken_for_whole(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Killed while the folder was being removed: what is left must not vouch for what is gone."""
    from edge_dtm.host.blocks.activations import Activations

    few = made.reference.rows(np.arange(2))
    kind: Any = Calibration if stage == "calibration" else Activations
    whole = kind(tmp_path / "c", few, made.components)
    whole.capture(made.model, 0)
    expected = whole.inputs("blk.0.attn_q").copy()

    def killed(folder: Path, **_: Any) -> None:
        (Path(folder) / "x.blk.0.attn_q.bin").unlink()
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(_Stop):
            whole.remove()
    again = kind(tmp_path / "c", few, made.components)
    again.capture(made.model, 0)
    assert np.array_equal(again.inputs("blk.0.attn_q"), expected)


# --- the disk and the range -----------------------------------------------------------------


def test_a_disk_too_small(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_here = Calibration(tmp_path / "c", made.reference, made.components)
    usage = SimpleNamespace(free=made_here.size_bytes)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EdgeDtmError, match="free some space") as caught:
        made_here.capture(made.model, 0)
    assert "\n" not in str(caught.value) and str(tmp_path / "c") in str(caught.value)
    assert list((tmp_path / "c").iterdir()) == []
    usage.free = round(made_here.size_bytes * 1.06)
    made_here.check_disk()


def test_what_is_there_needs_no_room(
    made: Made, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    Calibration(calibration.folder, made.reference, made.components).check_disk()


def test_inputs_of_too_different_sizes(made: Made, tmp_path: Path) -> None:
    here = Calibration(tmp_path / "c", made.reference, made.components)
    here.check_disk()
    here._write("x.blk.0.attn_q", 0, torch.ones(3, 256))
    here._write("x.blk.0.attn_q", 3, torch.full((3, 256), 250.0))
    assert np.array_equal(here.inputs("blk.0.attn_q")[:6, 0], [1, 1, 1, 250, 250, 250])
    with pytest.raises(EdgeDtmError, match="differ too much in size"):
        here._write("x.blk.0.attn_q", 6, torch.full((3, 256), 300.0))


# --- which sequences ------------------------------------------------------------------------

_SPLITS = st.lists(
    st.sampled_from([CALIBRATION, HELD_OUT, EXTRA, PACKAGED]), min_size=1, max_size=160
)


@given(_SPLITS.filter(lambda split: CALIBRATION in split))
def test_what_is_fitted_to_is_not_measured(split: list[int]) -> None:
    reference = cast(Reference, SimpleNamespace(split=np.array(split, np.uint8)))
    measured, fitted = (set(rows.tolist()) for rows in calibration_rows(reference))
    own = {i for i, s in enumerate(split) if s == CALIBRATION}
    extra = {i for i, s in enumerate(split) if s == EXTRA}
    assert measured and fitted
    assert measured <= own and fitted <= own | extra
    assert measured | fitted == own | extra  # none is wasted
    assert len(measured) <= COST_SEQUENCES
    if len(own | extra) > 1:
        assert not measured & fitted
    else:
        assert measured == fitted == own


def test_damaged_sums_are_one_line(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    whole = Calibration(folder, made.reference, made.components)
    whole.capture(made.model, CALIBRATION_SEED)
    path = folder / "sums.npz"
    data = path.read_bytes()
    for bad in (data[: len(data) // 2], b"no zip at all", b""):
        path.write_bytes(bad)
        with pytest.raises(EdgeDtmError, match="sums.npz is damaged.*--no-resume"):
            Calibration(folder, made.reference, made.components)
