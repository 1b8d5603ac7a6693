"""Distillation lowers SDT, holds zeros and grids, never makes it worse, and goes on after a kill."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Made

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Treatment, zeros_per_row
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.distill import evaluate
from edge_dtm.host.distill.evaluate import check, divergence_and_gradient
from edge_dtm.host.distill.result import Distilled
from edge_dtm.host.distill.settings import DistillSettings
from edge_dtm.host.distill.stage import DISTILLED
from edge_dtm.host.distill.teacher import TeacherText, capture, reference_sequences
from edge_dtm.host.distill.trained import Start, TrainedMatrix
from edge_dtm.host.distill.trainer import STATE, Trainer, epoch_batches
from edge_dtm.host.quantize.treat import treated_values
from edge_dtm.llamacpp import ggml

SETTINGS = DistillSettings(
    steps=12, learning_rate=1e-3, batch_tokens=128, check_every=4, bfloat16=False
)
Starts = dict[str, Start]


class _Stopped(Exception):
    pass


def _text(made: Made) -> TeacherText:
    return capture(made.model, reference_sequences(made.reference), lambda _: None)


@pytest.fixture(scope="module")
def text(made: Made) -> TeacherText:
    return _text(made)


def _starts(made: Made, type_: str, share: float, damage: float = 0.0) -> Starts:
    """damage: standard deviation of the factors that weights are multiplied with, for a start that
    a few steps surely improve."""
    treatment = Treatment(type_, share)
    out = {}
    for c in made.components:
        if c.in_block:
            # Weighed columns, so that the importance matters to what is compared.
            importance = np.random.default_rng(c.row_length).uniform(0.5, 2, c.row_length)
            weights = importance.astype(np.float32)
            noise = np.random.default_rng(c.rows).normal(1, damage, (c.rows, c.row_length))
            spoilt = made.weights(c.name) * noise.astype(np.float32)
            out[c.name] = Start(treatment, weights, treated_values(spoilt, treatment, weights))
    return out


Distill = Callable[..., tuple[Distilled, Any]]


@pytest.fixture
def run(made: Made, text: TeacherText, tmp_path: Path) -> Distill:
    def go(
        starts: Starts,
        settings: DistillSettings = SETTINGS,
        folder: str = "run",
        progress: Callable[..., None] = lambda *_: None,
    ) -> tuple[Distilled, Any]:
        student = load_model(made.checkpoint, torch.device("cpu"))
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        head = made.model.lm_head.weight
        trainer = Trainer(student, starts, head, text, made.reference, settings, path, progress)
        return trainer.run(), student

    return go


def _killed(run: Distill, starts: Starts, settings: DistillSettings, last: int) -> None:
    """In the folder `cut`, behind that step."""

    def stop(step: int, *_: float) -> None:
        if step == last:
            raise _Stopped

    with pytest.raises(_Stopped):
        run(starts, settings, "cut", stop)


def _values(student: Any, name: str) -> np.ndarray[Any, Any]:
    weight: np.ndarray[Any, Any] = student.get_submodule(module_name(name)).weight.numpy()
    return weight


def _same(a: Distilled, b: Distilled) -> None:
    assert (a.steps, a.curve) == (b.steps, b.curve)
    for ours, theirs in ((a.blocks, b.blocks), (a.vectors, b.vectors)):
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_distillation_of_a_pruned_model(made: Made, run: Distill, tmp_path: Path) -> None:
    starts = _starts(made, "F16", 0.75)
    done: list[tuple[int, float, float]] = []
    result, student = run(starts, progress=lambda *p: done.append(p))
    curve = result.curve
    assert [p["step"] for p in curve] == [0, 4, 8, 12]
    assert result.best_step > 0 and result.steps == 12
    assert result.best["sdt"] < curve[0]["sdt"]
    assert curve[-1]["loss"] < 0.8 * curve[1]["loss"]
    assert [d[0] for d in done] == list(range(1, 13)) and done[-1][2] == curve[-1]["sdt"]
    for name, start in starts.items():
        values, row_length = _values(student, name), start.values.shape[1]
        assert ((values == 0).sum(1) == zeros_per_row(row_length, 0.75)).all()
        assert not values[start.values == 0].any()
        assert (values != start.values).any()
        blocks = result.blocks[name].numpy()
        assert np.array_equal(ggml.dequantize("F16", blocks, row_length), values)
    assert set(result.vectors) == {n for n, _ in made.checkpoint.vectors()}
    gain = result.vectors["output_norm.weight"]
    assert np.array_equal(_values(student, "output_norm"), gain)
    assert not np.array_equal(made.checkpoint.hf_tensor("output_norm.weight"), gain)
    # What was checked is what is returned, and the model is left as that.
    again = check(student, made.reference)
    assert (again.sdt, again.fdt) == (result.best["sdt"], result.best["fdt"])
    assert again.perplexity == pytest.approx(result.best["perplexity"], rel=1e-4)
    DISTILLED.save(result, tmp_path)
    _same(DISTILLED.load(tmp_path), result)
    (tmp_path / "distilled.pt").write_bytes(b"x")
    with pytest.raises(EdgeDtmError, match="--no-resume"):
        DISTILLED.load(tmp_path)


@pytest.mark.parametrize(("type_", "share"), [("Q4_0", 0.0), ("Q8_0", 0.5), ("Q4_K", 0.0)])
def test_values_lie_on_the_grid(made: Made, run: Distill, type_: str, share: float) -> None:
    starts = _starts(made, type_, share, damage=3.0)
    settings = replace(SETTINGS, steps=9, check_every=9, round_every=4)
    result, student = run(starts, settings)
    assert result.best_step == 9
    for name, start in starts.items():
        values, blocks = _values(student, name), result.blocks[name].numpy()
        row_length = values.shape[1]
        assert np.array_equal(ggml.dequantize(type_, blocks, row_length), values)
        if share:
            assert not values[start.values == 0].any()
            assert ((values == 0).sum(1) >= zeros_per_row(row_length, share)).all()


def test_rounding_weighs_columns(made: Made) -> None:
    start = _starts(made, "Q4_0", 0.0)["blk.0.ffn_up"]
    matrix = TrainedMatrix(start, torch.nn.Parameter(torch.tensor(start.values)))
    matrix.latent.data *= 1 + 0.1 * torch.randn(matrix.latent.shape)
    blocks, weights = matrix.round().numpy(), matrix.weights().numpy()
    assert np.array_equal(blocks, ggml.quantize("Q4_0", weights, start.importance))
    assert not np.array_equal(blocks, ggml.quantize("Q4_0", weights))


def test_loss_and_gradient_against_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_LOGITS", 7 * 50)  # chunks of 7 positions, the last of 2
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 23, 16, generator=random)
    head, other = torch.randn(2, 50, 16, generator=random)
    student.requires_grad_(True)
    wanted = torch.nn.functional.kl_div(
        (student @ other.T).log_softmax(-1),
        (teacher @ head.T).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    (expected,) = torch.autograd.grad(wanted, student)
    loss, gradient = divergence_and_gradient(student.detach(), other, teacher, head)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_the_original_does_not_differ_from_itself(made: Made, text: TeacherText) -> None:
    head = made.model.lm_head.weight.detach()
    ids = torch.tensor([text.sequences[2]])
    student = made.model.model(input_ids=ids).last_hidden_state[0]
    loss, gradient = divergence_and_gradient(student, head, text.hidden_states([2]), head)
    assert abs(loss) < 1e-5 and float(gradient.abs().max()) < 1e-3
    answers, ref = check(made.model, made.reference, 64), made.reference
    assert answers.sdt == 0 and answers.fdt == ref.generated_lengths.mean()
    # Perplexity of the greedy tokens, from what the reference itself has stored of them.
    counted = np.arange(ref.generated_ids.shape[1])[None] < ref.generated_lengths[:, None]
    nats = (ref.log_normalizers - ref.top_logits[:, :, 0])[counted].mean()
    assert answers.perplexity == pytest.approx(math.exp(nats), rel=1e-4)


@pytest.mark.parametrize("type_", ["F16", "Q4_K"])
def test_never_worse_than_the_start(made: Made, run: Distill, type_: str) -> None:
    starts = _starts(made, type_, 0.0)
    settings = replace(SETTINGS, steps=8, learning_rate=3.0, check_every=1, patience=2)
    result, student = run(starts, settings)
    assert result.best_step == 0 and result.steps == 2  # stopped early
    assert not result.blocks
    for name, start in starts.items():
        assert np.array_equal(_values(student, name), start.values)
    for name, value in result.vectors.items():
        assert np.array_equal(value, made.checkpoint.hf_tensor(name))


@pytest.mark.parametrize("type_", ["F16", "Q4_K"])
def test_too_large_steps_are_taken_back(run: Distill, made: Made, type_: str) -> None:
    """Two checks at a rate that ruins the model, then from the start with hardly a step at all."""
    starts = _starts(made, type_, 0.0)
    settings = replace(SETTINGS, steps=6, learning_rate=3.0, check_every=1, back_off=1e-9)
    result, _ = run(starts, settings, "whole")
    first, *ruined, third = result.curve[:4]
    assert all(p["sdt"] > first["sdt"] + 0.2 for p in ruined)
    assert third["sdt"] <= first["sdt"] + 0.05
    assert third["perplexity"] == pytest.approx(first["perplexity"], rel=0.05)
    _killed(run, starts, settings, 2)  # right behind the check that took the steps back
    _same(run(starts, settings, "cut")[0], result)


@pytest.mark.parametrize(("type_", "share"), [("F16", 0.75), ("Q4_K", 0.0)])
def test_a_killed_run_goes_on_to_the_same(
    made: Made, run: Distill, tmp_path: Path, type_: str, share: float
) -> None:
    starts = _starts(made, type_, share, damage=3.0)
    settings = replace(SETTINGS, steps=9, check_every=3, round_every=2)
    whole, _ = run(starts, settings, "whole")
    _killed(run, starts, settings, 5)  # between two checks
    for expected in (list(range(4, 10)), []):  # a finished run is not run again
        steps: list[int] = []
        again, _ = run(starts, settings, "cut", lambda s, *_, steps=steps: steps.append(s))
        assert steps == expected
        _same(again, whole)
    state = tmp_path / "cut" / STATE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(EdgeDtmError, match="--no-resume"):
        run(starts, settings, "cut")


def test_checkpointing_and_bfloat16_change_little(made: Made, run: Distill) -> None:
    starts = _starts(made, "F32", 0.5)
    settings = replace(SETTINGS, steps=2, check_every=2)
    plain, _ = run(starts, settings, "a")
    other, _ = run(starts, replace(settings, checkpointing=True), "b")
    assert other.curve[1]["loss"] == pytest.approx(plain.curve[1]["loss"], rel=1e-4)
    half, student = run(starts, replace(settings, bfloat16=True), "c")
    assert half.curve[1]["loss"] == pytest.approx(plain.curve[1]["loss"], rel=0.05)
    for name, start in starts.items():
        assert not _values(student, name)[start.values == 0].any()


def test_batches_follow_from_seed_and_epoch() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(3, 60, 40)]
    first = epoch_batches(lengths, 128, 5, 0)
    assert first == epoch_batches(lengths, 128, 5, 0) != epoch_batches(lengths, 128, 5, 1)
    assert len(first) == len(epoch_batches(lengths, 128, 5, 1))
    assert sorted(i for b in first for i in b) == list(range(40))
    for batch in first:
        assert len(batch) * max(lengths[i] for i in batch) <= 128


def test_learning_rate_rises_and_falls() -> None:
    settings = DistillSettings(steps=100, learning_rate=1.0)
    rates = [settings.rate(i) for i in range(100)]
    assert 0 < rates[0] < rates[4] < 1 and rates[5] == 1
    assert all(a > b for a, b in pairwise(rates[5:])) and 0 < rates[-1] < 0.01
    assert settings.steps_to_check == 10 and replace(settings, steps=5).steps_to_check == 1


def test_a_loss_that_is_not_finite(made: Made, run: Distill) -> None:
    with pytest.raises(EdgeDtmError, match="lower the learning rate"):
        run(_starts(made, "F16", 0.0), replace(SETTINGS, learning_rate=1e7))


@pytest.mark.parametrize("model", ["made", "tied"])
def test_embedding_and_head_are_set_and_frozen(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A tied head is the embedding."""
    of: Made = request.getfixturevalue(model)
    starts, treatment = _starts(of, "F16", 0.0), Treatment("Q4_0")
    for name in {"token_embd", "output"} & {c.name for c in of.components}:
        starts[name] = Start(treatment, None, treated_values(of.weights(name), treatment, None))
    student = load_model(of.checkpoint, torch.device("cpu"))
    head, settings = of.model.lm_head.weight, replace(SETTINGS, steps=1, bfloat16=None)
    trainer = Trainer(
        student, starts, head, _text(of), of.reference, settings, tmp_path, lambda *_: None
    )
    blocks = trainer.run().blocks
    assert not {"token_embd", "output"} & set(blocks)
    assert np.array_equal(_values(student, "token_embd"), starts["token_embd"].values)
    head_start = starts.get("output", starts["token_embd"])
    assert np.array_equal(_values(student, "output"), head_start.values)
