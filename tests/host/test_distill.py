"""Distillation lowers SDT, holds zeros and grids, never makes it worse, and goes on after a kill."""

from __future__ import annotations

import json
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
from edge_dtm.host.distill import distill as module
from edge_dtm.host.distill import evaluate
from edge_dtm.host.distill.distill import distill, epoch_batches
from edge_dtm.host.distill.evaluate import check, divergence_and_gradient
from edge_dtm.host.distill.result import Distilled
from edge_dtm.host.distill.settings import DistillSettings
from edge_dtm.host.distill.state import STATE
from edge_dtm.host.distill.teacher import TeacherText, reference_sequences
from edge_dtm.host.distill.trained import Trained
from edge_dtm.host.quantize.treat import treated_values
from edge_dtm.llamacpp import ggml

SETTINGS = DistillSettings(
    steps=12, learning_rate=1e-3, batch_tokens=128, check_every=4, precision="float32"
)


class _Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def text(made: Made, tmp_path_factory: pytest.TempPathFactory) -> TeacherText:
    found = TeacherText(
        tmp_path_factory.mktemp("text"),
        reference_sequences(made.reference),
        made.checkpoint.config.hidden,
    )
    found.capture(made.model)
    return found


def _components(made: Made, type_: str, share: float, damage: float = 0.0) -> dict[str, Trained]:
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
            start = treated_values(spoilt, treatment, weights)
            out[c.name] = Trained(treatment, weights, start)
    return out


Distill = Callable[..., tuple[Distilled, Any]]


@pytest.fixture
def run(made: Made, text: TeacherText, tmp_path: Path) -> Distill:
    def go(
        components: dict[str, Trained], settings: DistillSettings = SETTINGS, **options: Any
    ) -> tuple[Distilled, Any]:
        student = load_model(made.checkpoint, torch.device("cpu"))
        folder = options.pop("folder", tmp_path / "run")
        found = distill(
            student,
            components,
            made.model.lm_head.weight,
            options.pop("text", text),
            made.reference,
            settings,
            folder,
            **options,
        )
        return found, student

    return go


def _same(a: Distilled, b: Distilled) -> None:
    assert (a.best_step, a.steps, a.types) == (b.best_step, b.steps, b.types)
    assert np.array_equal(
        [list(p.values()) for p in a.curve], [list(p.values()) for p in b.curve], equal_nan=True
    )
    for name in ("values", "blocks", "vectors"):
        ours, theirs = getattr(a, name), getattr(b, name)
        assert set(ours) == set(theirs)
        assert all(np.array_equal(ours[k], theirs[k]) for k in ours), name


def test_distillation_of_a_pruned_model(made: Made, run: Distill, tmp_path: Path) -> None:
    components = _components(made, "F16", 0.75)
    done: list[tuple[int, float, float]] = []
    found, student = run(components, progress=lambda *p: done.append(p))
    curve = found.curve
    assert [p["step"] for p in curve] == [0, 4, 8, 12]
    assert found.best_step > 0 and found.steps == 12
    assert min(p["sdt"] for p in curve) < curve[0]["sdt"]
    assert curve[-1]["loss"] < 0.8 * curve[1]["loss"]
    assert [d[0] for d in done] == list(range(1, 13)) and done[-1][2] == curve[-1]["sdt"]
    for name, trained in components.items():
        values = found.values[name]
        zeros = trained.start == 0
        assert not values[zeros].any()
        wanted = zeros_per_row(values.shape[1], 0.75)
        assert ((values == 0).sum(1) == wanted).all()
        assert (values != trained.start).any()
        assert np.array_equal(ggml.dequantize("F16", found.blocks[name], values.shape[1]), values)
    assert set(found.vectors) == {n for n, _ in made.checkpoint.vectors()}
    first = made.checkpoint.hf_tensor("output_norm.weight")
    assert (found.vectors["output_norm.weight"] != first).any()
    # What was checked is what is returned, and the model is left as that.
    best = next(p for p in curve if p["step"] == found.best_step)
    for _ in range(2):
        again = check(student, made.reference)
        assert (again.sdt, again.fdt) == (best["sdt"], best["fdt"])
        assert again.perplexity == pytest.approx(best["perplexity"], rel=1e-4)
        student = load_model(made.checkpoint, torch.device("cpu"))
        modules = dict(student.named_modules())
        for key, value in [*found.values.items(), *found.vectors.items()]:
            stem = module_name(key.removesuffix(".weight"))
            modules[stem].weight.data = torch.from_numpy(value)
    lines = (tmp_path / "run" / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["sdt"] for line in lines] == [p["sdt"] for p in curve]
    found.save(tmp_path / "saved")
    _same(Distilled.load(tmp_path / "saved"), found)
    (tmp_path / "saved" / "distilled.safetensors").write_bytes(b"x")
    with pytest.raises(EdgeDtmError, match="no readable distillation"):
        Distilled.load(tmp_path / "saved")


@pytest.mark.parametrize(("type_", "share"), [("Q4_0", 0.0), ("Q8_0", 0.5), ("Q4_K", 0.0)])
def test_values_lie_on_the_grid(made: Made, run: Distill, type_: str, share: float) -> None:
    components = _components(made, type_, share, damage=3.0)
    settings = replace(SETTINGS, steps=9, check_every=9, round_every=4)
    kept: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        keep = module.Trainer._keep

        def spy(self: Any, blocks: Any) -> None:
            kept.update({m.name: m.weights().clone() for m in self.matrices})
            keep(self, blocks)

        patch.setattr(module.Trainer, "_keep", spy)
        found, _ = run(components, settings)
    assert found.best_step == 9
    for name, trained in components.items():
        blocks, values = found.blocks[name], found.values[name]
        assert np.array_equal(ggml.dequantize(type_, blocks, values.shape[1]), values)
        # The blocks are ggml's own of the latents, with the component's importance.
        assert np.array_equal(ggml.quantize(type_, kept[name].numpy(), trained.importance), blocks)
        if share:
            assert not values[trained.start == 0].any()
            assert ((values == 0).sum(1) >= zeros_per_row(values.shape[1], share)).all()


def test_a_type_without_a_zero_holds_none(made: Made, run: Distill) -> None:
    components = _components(made, "Q8_0", 0.5)
    spoilt = {n: replace(t, treatment=Treatment("IQ4_NL", 0.5)) for n, t in components.items()}
    with pytest.raises(EdgeDtmError, match="cannot hold zeros"):
        run(spoilt)


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
    (gradient,) = torch.autograd.grad(wanted, student)
    loss, found = divergence_and_gradient(student.detach(), other, teacher, head)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.allclose(found, gradient, atol=1e-6)


def test_the_original_does_not_differ_from_itself(made: Made, text: TeacherText) -> None:
    head = made.model.lm_head.weight.detach()
    ids = torch.tensor([text.sequences[2]])
    student = made.model.model(input_ids=ids).last_hidden_state[0]
    loss, gradient = divergence_and_gradient(student, head, text.hidden_states([2]), head)
    assert abs(loss) < 1e-5 and float(gradient.abs().max()) < 1e-3
    found = check(made.model, made.reference, 64)
    assert found.sdt == 0 and found.fdt == made.reference.generated_lengths.mean()
    # Perplexity of the greedy tokens, from what the reference itself has stored of them.
    ref = made.reference
    counted = np.arange(ref.generated_ids.shape[1])[None] < ref.generated_lengths[:, None]
    nats = (ref.log_normalizers - ref.top_logits[:, :, 0])[counted].mean()
    assert found.perplexity == pytest.approx(math.exp(nats), rel=1e-4)


@pytest.mark.parametrize("type_", ["F16", "Q4_K"])
def test_never_worse_than_the_start(made: Made, run: Distill, tmp_path: Path, type_: str) -> None:
    components = _components(made, type_, 0.0)
    settings = replace(SETTINGS, steps=8, learning_rate=3.0, check_every=1, patience=2)
    found, student = run(components, settings)
    assert found.best_step == 0 and found.steps == 2  # stopped early
    assert not found.blocks
    modules = dict(student.named_modules())
    for name, trained in components.items():
        assert np.array_equal(found.values[name], trained.start)
        assert np.array_equal(modules[module_name(name)].weight.numpy(), trained.start)
    for name, value in found.vectors.items():
        assert np.array_equal(value, made.checkpoint.hf_tensor(name))
    found.save(tmp_path / "saved")
    _same(Distilled.load(tmp_path / "saved"), found)


@pytest.mark.parametrize("type_", ["F16", "Q4_K"])
def test_too_large_steps_are_taken_back(
    run: Distill, made: Made, type_: str, tmp_path: Path
) -> None:
    """Two checks at a rate that ruins the model, then from the start with hardly a step at all."""
    components = _components(made, type_, 0.0)
    settings = replace(SETTINGS, steps=6, learning_rate=3.0, check_every=1, back_off=1e-9)
    found, _ = run(components, settings, folder=tmp_path / "whole")
    first, *ruined, third = found.curve[:4]
    assert all(p["sdt"] > first["sdt"] + 0.2 for p in ruined)
    assert third["sdt"] <= first["sdt"] + 0.05
    assert third["perplexity"] == pytest.approx(first["perplexity"], rel=0.05)

    def stop(step: int, loss: float, sdt: float) -> None:
        if step == 2:  # right behind the check that took the steps back
            raise _Stopped

    with pytest.raises(_Stopped):
        run(components, settings, folder=tmp_path / "cut", progress=stop)
    _same(run(components, settings, folder=tmp_path / "cut")[0], found)


@pytest.mark.parametrize(("type_", "share"), [("F16", 0.75), ("Q4_K", 0.0)])
def test_a_killed_run_goes_on_to_the_same(
    made: Made, run: Distill, tmp_path: Path, type_: str, share: float
) -> None:
    components = _components(made, type_, share, damage=3.0)
    settings = replace(SETTINGS, steps=9, check_every=3, round_every=2)
    whole, _ = run(components, settings, folder=tmp_path / "whole")

    def stop(step: int, loss: float, sdt: float) -> None:
        if step == 5:  # between two checks
            raise _Stopped

    with pytest.raises(_Stopped):
        run(components, settings, folder=tmp_path / "cut", progress=stop)
    steps: list[int] = []
    again, _ = run(
        components, settings, folder=tmp_path / "cut", progress=lambda s, *_: steps.append(s)
    )
    assert steps == list(range(4, 10))
    _same(again, whole)
    # A finished run is not run again.
    steps.clear()
    third, _ = run(
        components, settings, folder=tmp_path / "cut", progress=lambda s, *_: steps.append(s)
    )
    assert not steps
    _same(third, whole)
    state = tmp_path / "cut" / STATE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(EdgeDtmError, match="--no-resume"):
        run(components, settings, folder=tmp_path / "cut")


def test_checkpointing_and_bfloat16_change_little(made: Made, run: Distill, tmp_path: Path) -> None:
    components = _components(made, "F32", 0.5)
    settings = replace(SETTINGS, steps=2, check_every=2)
    plain, _ = run(components, settings, folder=tmp_path / "a")
    other, _ = run(components, replace(settings, checkpointing=True), folder=tmp_path / "b")
    assert other.curve[1]["loss"] == pytest.approx(plain.curve[1]["loss"], rel=1e-4)
    half, _ = run(components, replace(settings, precision="bfloat16"), folder=tmp_path / "c")
    assert half.curve[1]["loss"] == pytest.approx(plain.curve[1]["loss"], rel=0.05)
    for name, trained in components.items():
        for found in (plain, half):
            assert not found.values[name][trained.start == 0].any()


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


def test_errors_say_what_to_do(made: Made, run: Distill, text: TeacherText, tmp_path: Path) -> None:
    components = _components(made, "F16", 0.0)
    with pytest.raises(EdgeDtmError, match="lower the learning rate"):
        run(components, replace(SETTINGS, learning_rate=1e7))
    empty = TeacherText(tmp_path / "empty", text.sequences, text.hidden)
    with pytest.raises(EdgeDtmError, match="not complete"):
        run(components, text=empty)
    for wrong in ({"steps": 0}, {"learning_rate": math.nan}, {"precision": "int3"}):
        with pytest.raises(EdgeDtmError):
            replace(SETTINGS, **wrong)  # type: ignore[arg-type]


def test_embedding_and_head_are_set_and_frozen(made: Made, run: Distill) -> None:
    components = _components(made, "F16", 0.0)
    for name in ("token_embd", "output"):
        start = treated_values(made.weights(name), Treatment("Q4_0"), None)
        components[name] = Trained(Treatment("Q4_0"), None, start)
    found, student = run(components, replace(SETTINGS, steps=2, precision="auto"))
    assert np.array_equal(student.model.embed_tokens.weight.numpy(), components["token_embd"].start)
    assert np.array_equal(student.lm_head.weight.numpy(), components["output"].start)
    assert not {"token_embd", "output"} & set(found.values)


def test_a_tied_head_is_the_embedding(tied: Made, tmp_path: Path) -> None:
    text = TeacherText(
        tmp_path / "text", reference_sequences(tied.reference), tied.checkpoint.config.hidden
    )
    text.capture(tied.model)
    start = treated_values(tied.weights("token_embd"), Treatment("Q4_0"), None)
    student = load_model(tied.checkpoint, torch.device("cpu"))
    distill(
        student,
        {"token_embd": Trained(Treatment("Q4_0"), None, start)},
        tied.model.lm_head.weight,
        text,
        tied.reference,
        replace(SETTINGS, steps=1),
        tmp_path / "run",
    )
    assert np.array_equal(student.model.embed_tokens.weight.numpy(), start)
    assert np.array_equal(student.lm_head.weight.numpy(), start)
