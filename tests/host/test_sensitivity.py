"""Costs against brute force: ggml's own rounding, exact inner products, weights put in for real."""

from __future__ import annotations

import ctypes
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import SEED, Made

from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.host.blocks import block_jobs, edges
from edge_dtm.host.blocks.block_jobs import BlockJobs, QuantizeJobs, measure_matrix, quantize_matrix
from edge_dtm.host.blocks.cost_records import corrected, read_costs
from edge_dtm.host.blocks.edges import edge_bytes, edge_costs, edge_feedback, edge_importance
from edge_dtm.host.blocks.encoded import EncodedStore
from edge_dtm.host.blocks.fit import fit_of, importance_of, part_of
from edge_dtm.host.blocks.sensitivity import Cost, Measured, costs_of
from edge_dtm.host.blocks.statistics import Statistics, sampled_rows
from edge_dtm.host.blocks.text import MEASURED_DRAWS
from edge_dtm.host.checkpoint.derived import EqualizedCheckpoint
from edge_dtm.host.checkpoint.model import module_name
from edge_dtm.host.quantize.activations import activation_kind, round_activations
from edge_dtm.host.quantize.equalize import input_scale
from edge_dtm.host.quantize.treat import treat, treated_values
from edge_dtm.llamacpp import ggml

# --- rounding of inputs ---------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("q8_0", "Q8_0"), ("q8_K", "Q8_K")])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rounding_is_that_of_ggml(kind: str, name: str, scale: float) -> None:
    random = np.random.default_rng(0)
    x = (random.standard_normal((64, 512)) * scale).astype(np.float32)
    x[0] = 0
    x[1, :256] = 0
    x[2] = random.integers(-127, 128, 512) * scale
    x[3, 5] = 40 * scale  # an outlier
    x[4, 5] = -40 * scale
    quantize = getattr(ggml.library(), f"quantize_row_{kind}_ref")
    quantize.restype = None
    quantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = np.zeros((64, 512 // block * size), np.uint8)
    for row in range(64):
        quantize(x[row].ctypes.data, data[row].ctypes.data, 512)
    if kind == "q8_0":
        expected = ggml.dequantize(name, data, 512)
        steps = data.reshape(64, -1, size)[:, :, :2].copy().view(np.float16).astype(np.float32)
    else:  # block_q8_K: float scale, 256 int8, 16 int16 sums; ggml offers no to_float for it
        blocks = data.reshape(64, -1, size)
        steps = blocks[:, :, :4].copy().view(np.float32)
        expected = (steps * blocks[:, :, 4:260].copy().view(np.int8)).reshape(64, 512)
    found = round_activations(torch.from_numpy(x), kind).numpy()
    difference = np.abs(found - expected).reshape(64, -1, block)
    step = np.abs(steps)
    # A tie may round to the other side; all else agrees to the last bits.
    other = difference > 1e-5 * step * 127 + 1e-12
    assert (difference <= step * 1.01 + 1e-12).all()
    assert other.mean() < 1e-3
    assert np.abs(found - x).max() > 0


def test_half_is_half_and_kinds_are_the_kernels() -> None:
    x = torch.randn(4, 64)
    assert torch.equal(round_activations(x, "half"), x.half().float())
    kinds = {t: activation_kind(t) for t in ("F16", "Q8_0", "Q4_0", "IQ4_NL", "Q6_K", "Q4_K")}
    assert list(kinds.values()) == ["half", "q8_0", "q8_0", "q8_0", "q8_K", "q8_K"]


# --- costs ----------------------------------------------------------------------------------

CHOICES = [Treatment(t) for t in ("F16", "Q8_0", "Q6_K", "Q4_K", "Q4_0", "IQ4_NL")]
CHOICES += [Treatment("Q8_0", 0.3), Treatment("F16", 0.5)]
NAMES = ("blk.0.attn_v", "blk.1.ffn_gate", "blk.2.ffn_down")


def _measured(made: Made, component: Component) -> Measured:
    statistics = made.statistics[block_jobs.layer_of(component)]
    return Measured.of(statistics, component, {}, made.config, made.jobs.edges, made.jobs.positions)


def _costs(
    made: Made, name: str, values: Sequence[Any], choices: Sequence[Treatment]
) -> list[Cost]:
    component, weights = made.component(name), torch.from_numpy(made.weights(name))
    new = [torch.as_tensor(v) for v in values]
    return costs_of(_measured(made, component), choices, weights, new, component.rows)


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_the_inner_products(made: Made, name: str) -> None:
    """z = <G, X^ (W^ - W)'> and <G, (X^ - X) W'> formed as they stand, in float64."""
    weights, measured = made.weights(name), _measured(made, made.component(name))
    values = [treated_values(weights, t, None) for t in CHOICES]
    x, g = measured.inputs, measured.gradients.double()
    for treatment, new, cost in zip(
        CHOICES, values, _costs(made, name, values, CHOICES), strict=True
    ):
        rounded = round_activations(x, activation_kind(treatment.type))
        w, delta = (torch.from_numpy(a).double() for a in (weights, new - weights))
        for found, e in (
            (cost.by_weights, rounded.double() @ delta.T),
            (cost.by_inputs, (rounded - x).double() @ w.T),
        ):
            z = [(g[:, a:b] * e[a:b]).sum((1, 2)) for a, b in pairwise(measured.edges)]
            expected = float(torch.stack(z).square().sum()) / MEASURED_DRAWS / measured.positions
            assert found == pytest.approx(expected, rel=0.02), treatment


def _margin_change(made: Made, before: list[torch.Tensor]) -> float:
    """Mean square of what the margins are now, less what they were."""
    total = 0.0
    for row, old in enumerate(before):
        total += float((_margins(made, row) - old).double().square().sum())
    return total / int(made.reference.generated_lengths.sum())


@torch.no_grad()
def _margins(made: Made, row: int) -> torch.Tensor:
    logits = made.model(input_ids=made.ids(row), use_cache=False).logits[0]
    at = logits[made.positions(row)]
    top = torch.from_numpy(made.reference.top_ids[row, : len(at), :2].astype(np.int64))
    return at.gather(1, top[:, :1])[:, 0] - at.gather(1, top[:, 1:])[:, 0]


@contextmanager
def _put_in(made: Made, name: str, type_name: str, values: Any) -> Iterator[None]:
    """A matrix's values in transformers' model, which also rounds its inputs."""
    target, kind = made.model.get_submodule(module_name(name)), activation_kind(type_name)
    handle = target.register_forward_pre_hook(
        lambda _, args: (round_activations(args[0][0], kind)[None],)
    )
    target.weight.data = torch.from_numpy(np.ascontiguousarray(values))
    try:
        yield
    finally:
        target.weight.data = torch.from_numpy(made.weights(name))
        handle.remove()


def _spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


@pytest.fixture(scope="module")
def shipped(made: Made, tmp_path_factory: pytest.TempPathFactory) -> EncodedStore:
    return EncodedStore(tmp_path_factory.mktemp("shipped"), made.checkpoint)


@pytest.fixture(scope="module")
def jobs(made: Made) -> BlockJobs:
    return dataclasses.replace(made.jobs, equalize=False)


def _every(made: Made) -> list[Component]:
    return [c for c in made.components if c.in_block and ".attn_k" not in c.name]


@pytest.fixture(scope="module")
def records(made: Made, jobs: BlockJobs) -> dict[str, dict[str, Any]]:
    """Of all matrices: costs on all rows, and by how much a sample's local error differs."""
    out = {}
    for c in _every(made):
        out[c.name] = measure_matrix(jobs, (c, PLAIN, sampled_rows(c, 0.125, SEED)))
    return out


PLAIN = [Treatment(t) for t in ("Q8_0", "Q5_K", "Q4_0")]


def test_costs_of_shipped_bytes_are_the_margins_real_change(
    made: Made, jobs: BlockJobs, records: dict[str, dict[str, Any]], shipped: EncodedStore
) -> None:
    """The bytes that export would write, put into the model for real."""
    before = [_margins(made, row) for row in range(len(made.reference))]
    predicted, real, plain = [], [], []
    for c in _every(made):
        record, weights = records[c.name], made.weights(c.name)
        importance = importance_of(made.statistics[block_jobs.layer_of(c)], c, {})
        rounded = [treated_values(weights, t, importance) for t in PLAIN]
        for j, cost in enumerate(_costs(made, c.name, rounded, PLAIN)):
            quantize_matrix(QuantizeJobs(jobs, shipped), (c, PLAIN[j], record["feedback"][j]))
            data = made.checkpoint.hf_rows(c.name, shipped.encoded(c, PLAIN[j]))
            with _put_in(
                made, c.name, PLAIN[j].type, ggml.dequantize(PLAIN[j].type, data, c.row_length)
            ):
                real.append(_margin_change(made, before))
            predicted.append(record["by_weights"][j] + record["by_inputs"][j])
            plain.append(cost.by_weights + cost.by_inputs)
    assert 0.5 < sum(predicted) / sum(real) < 2
    assert _spearman(np.array(predicted), np.array(real)) > 0.8
    fitted = [yes for r in records.values() for yes in r["feedback"]]
    assert sum(fitted) > 0.7 * len(fitted)
    # Error feedback is for something, both in what is said and in what is.
    assert sum(real) < 0.8 * sum(plain)


def test_costs_of_sampled_rows_are_those_of_all(
    made: Made, jobs: BlockJobs, records: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """In size and in rank, once corrected by three blocks that are measured on all rows."""
    sampled = dataclasses.replace(jobs, folder=tmp_path)
    known: dict[str, dict[str, Any]] = {}
    for c in _every(made):
        layer, part = block_jobs.layer_of(c), part_of(c.name)
        rows = torch.from_numpy(sampled_rows(c, 0.125, SEED))
        tensors = dict(made.statistics[layer].tensors)
        tensors |= {
            f"rows.{part}": rows,
            f"gradients.{part}": tensors[f"gradients.{part}"][..., rows],
        }
        fitted, measured = Statistics(tensors).parts()
        fitted.save(sampled.fitted_file(layer))
        measured.save(sampled.measured_file(layer))
        known[c.name] = measure_matrix(sampled, (c, PLAIN, rows.numpy()))
        assert "ratios" not in known[c.name] and len(records[c.name]["ratios"]) == len(PLAIN)
        assert known[c.name]["by_inputs"] == pytest.approx(records[c.name]["by_inputs"], rel=1e-5)
        if layer == 1:
            known[c.name]["ratios"] = records[c.name]["ratios"]
            known[c.name]["by_weights"] = records[c.name]["by_weights"]
    found = corrected(known)
    whole = corrected(records)
    ours, theirs = (np.array([t[c.name] for c in _every(made)]) for t in (found, whole))
    assert 0.7 < ours.sum() / theirs.sum() < 1.4
    assert _spearman(ours.ravel(), theirs.ravel()) > 0.95


def test_sampled_rows_are_whole_groups() -> None:
    one = Component("blk.0.ffn_up", 1000, 64)
    rows = sampled_rows(one, 0.125, 0)
    assert np.array_equal(rows, sampled_rows(one, 0.125, 0))
    assert not np.array_equal(rows, sampled_rows(one, 0.125, 1))
    assert (np.diff(rows) > 0).all() and 100 < len(rows) < 200
    assert set(rows[::32] % 32) == {0}
    assert np.array_equal(sampled_rows(one, 1, 0), np.arange(1000))


# --- error feedback -------------------------------------------------------------------------

MIXED = [Treatment(t) for t in ("F16", "Q8_0", "Q4_K", "Q4_0")]
MIXED += [Treatment("Q8_0", 0.3), Treatment("F16", 0.5)]


def _local_errors(made: Made, name: str, values: Sequence[Any]) -> list[float]:
    """tr(G E H E') on the measured sequences by its definition, float64."""
    measured = _measured(made, made.component(name))
    x, g = measured.inputs.double(), measured.gradients.double()
    v = g.square().mean((0, 2)).sqrt()
    h, heard = (x.T * v) @ x / v.sum(), v > 0  # in the last block few tokens are heard of
    outer = (g[0][heard].T / v[heard]) @ g[0][heard]  # one draw of signs is judged by
    deltas = [torch.as_tensor(n).double() - torch.from_numpy(made.weights(name)) for n in values]
    return [float(torch.trace(outer @ e @ h @ e.T)) for e in deltas]


@pytest.mark.parametrize("name", NAMES)
def test_feedback_is_kept_where_the_local_error_is_smaller(
    made: Made, jobs: BlockJobs, shipped: EncodedStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(block_jobs, "JUDGED_STEP", 1)
    component, weights = made.component(name), made.weights(name)
    record = measure_matrix(jobs, (component, MIXED, np.arange(component.rows)))
    assert "ratios" not in record
    importance = importance_of(made.statistics[block_jobs.layer_of(component)], component, {})
    values = []
    for treatment, better in zip(MIXED, record["feedback"], strict=True):
        plain = treated_values(weights, treatment, importance)
        values.append(plain)
        if treatment == Treatment("F16"):
            assert not better
            continue
        quantize_matrix(QuantizeJobs(jobs, shipped), (component, treatment, True))
        data = made.checkpoint.hf_rows(name, shipped.encoded(component, treatment))
        fitted = ggml.dequantize(treatment.type, data, component.row_length)
        ours, without = _local_errors(made, name, [fitted, plain])
        assert better == (ours < without), treatment
        if better:
            values[-1] = fitted
    assert any(record["feedback"])
    expected = _costs(made, name, values, MIXED)
    assert record["by_weights"] == pytest.approx([c.by_weights for c in expected], rel=1e-4)
    assert record["by_inputs"] == pytest.approx([c.by_inputs for c in expected], rel=1e-4)


def _worse(w: torch.Tensor, types: Any, *_: Any, **__: Any) -> Any:
    """Valid bytes, but of weights a tenth too large."""
    data = [ggml.quantize(kind, 1.1 * w.numpy()) for kind in types]
    values = [ggml.dequantize(k, d, w.shape[1]) for k, d in zip(types, data, strict=True)]
    return [(d, torch.from_numpy(v)) for d, v in zip(data, values, strict=True)]


def _worse_masks(w: torch.Tensor, treatments: Any, *_: Any, **__: Any) -> Any:
    return [e for t in treatments for e in _worse(2 * w, [t.type])]


@pytest.mark.parametrize("feedback", [True, False])
def test_else_costs_and_bytes_are_plain_roundings(
    made: Made,
    jobs: BlockJobs,
    shipped: EncodedStore,
    monkeypatch: pytest.MonkeyPatch,
    feedback: bool,
) -> None:
    component, weights = made.component("blk.1.ffn_gate"), made.weights("blk.1.ffn_gate")
    monkeypatch.setattr(block_jobs, "gptq_quantize", _worse)
    monkeypatch.setattr(block_jobs, "fit_masks", _worse_masks)
    jobs = dataclasses.replace(jobs, feedback=feedback)
    record = measure_matrix(jobs, (component, MIXED, np.arange(component.rows)))
    assert record["feedback"] == [False] * len(MIXED)
    importance = importance_of(made.statistics[1], component, {})
    plain = [treated_values(weights, t, importance) for t in MIXED]
    expected = [c.by_weights for c in _costs(made, component.name, plain, MIXED)]
    assert record["by_weights"] == pytest.approx(expected, rel=1e-6)
    for treatment in MIXED:
        quantize_matrix(QuantizeJobs(jobs, shipped), (component, treatment, False))
        data = treat(weights, treatment, importance)
        assert np.array_equal(shipped.encoded(component, treatment), data)


@pytest.mark.parametrize("given", [False, True])
def test_scales_and_importance_are_worked_in(
    made: Made, jobs: BlockJobs, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """Inputs and gradients are gathered of the base: those of the equalized model are larger and
    smaller by the scales, and so is a given imatrix, which is of the original."""
    config, random = made.config, np.random.default_rng(3)
    component = made.component("blk.1.ffn_up")
    scales = {
        f"blk.1.{part}": random.uniform(0.5, 2, n).astype(np.float32)
        for part, n in (("ffn_gate", config.hidden), ("ffn_down", config.ffn))
    }
    vector = random.uniform(0.1, 3, config.hidden).astype(np.float32)
    monkeypatch.setattr(BlockJobs, "scales", lambda *_: scales)
    jobs = dataclasses.replace(jobs, imatrix={component.name: vector} if given else None)
    equalized = EqualizedCheckpoint(made.checkpoint, scales)
    weights = torch.from_numpy(equalized.hf_tensor(component.name + ".weight"))
    scale = input_scale(scales, component.name)
    assert scale is not None
    expected = vector * scale * scale
    fit = fit_of(
        made.statistics[1], component, scales, config, jobs.importance(component.name, scales)
    )
    if not given:
        x = made.statistics[1]["inputs.ffn_gate"].numpy() * scale
        v = made.statistics[1]["token_weights.ffn_up"].numpy()[:, None]
        expected = (v * x * x).sum(0) / v.sum()
    assert np.allclose(fit.importance, expected, rtol=1e-3)
    # Of whatever error E the cost is that of E in the base's units.
    measured = Measured.of(
        made.statistics[1], component, scales, config, jobs.edges, jobs.positions
    )
    base = _measured(made, component)
    s, o = torch.from_numpy(scale), torch.from_numpy(scales["blk.1.ffn_down"])
    assert torch.allclose(measured.inputs, base.inputs * s)
    assert torch.allclose(measured.gradients, base.gradients / o)
    assert torch.allclose(measured.back, base.back / s)
    both = measured.gradients @ weights
    assert torch.allclose(measured.back, both, atol=1e-4 * float(both.abs().max()))


# --- the ends -------------------------------------------------------------------------------


def _end_cost(m: Made, name: str, is_tied: bool, treatment: Treatment, new: Any) -> float:
    """By the real change of the margins at the head, and the gradients at looked-up rows."""
    weights, total = m.weights(name), 0.0
    for row in range(len(m.reference)):
        if name == "output" or is_tied:
            with torch.no_grad():
                hidden = m.model.model(input_ids=m.ids(row), use_cache=False).last_hidden_state[0]
            at = hidden[m.positions(row)]
            rounded = round_activations(at, activation_kind(treatment.type)).numpy()
            top = m.reference.top_ids[row, : len(at), :2]
            change = np.take_along_axis(rounded @ new.T - at.numpy() @ weights.T, top, 1)
            total += float(np.square(change[:, 0] - change[:, 1], dtype=np.float64).sum())
        if name == "token_embd":
            a, b = m.jobs.edges[row : row + 2]
            error = (new - weights)[m.ids(row)[0].numpy()]
            z = (m.edge_inputs.embedded[:, a:b] * error).sum((1, 2), dtype=np.float64)
            total += float(np.square(z).sum() / MEASURED_DRAWS)
    return total / int(m.reference.generated_lengths.sum())


ENDS = pytest.mark.parametrize(
    ("kind", "name"), [("made", "output"), ("made", "token_embd"), ("tied", "token_embd")]
)
END_CHOICES = [Treatment(t) for t in ("F16", "Q8_0", "Q4_K", "Q4_0")]


@ENDS
def test_costs_of_the_ends_are_exact(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    """Of plain rounding and of feedback, which is kept where the cost is lower; all rows are then
    made as those were that were measured."""
    m: Made = request.getfixturevalue(kind)
    is_tied, component, weights = kind == "tied", m.component(name), m.weights(name)
    given = m.edge_inputs, component, END_CHOICES, weights, is_tied, {}
    importance = edge_importance(m.edge_inputs, component, is_tied, {})
    assert (importance is None) == (kind == "made" and name == "token_embd")
    plain, none = edge_costs(*given, False)
    found, kept = edge_costs(*given, True)
    assert none == [False] * 4 and kept[0] is False and any(kept)
    hessian = edge_feedback(m.edge_inputs, component, is_tied, {})
    for j, t in enumerate(END_CHOICES):
        new = treated_values(weights, t, importance)
        assert plain[j] == pytest.approx(_end_cost(m, name, is_tied, t, new), rel=0.01), t
        assert (found[j] < plain[j]) if kept[j] else (found[j] == plain[j]), t
        data = edge_bytes(weights, t, hessian if kept[j] else None, importance)
        new = ggml.dequantize(t.type, data, component.row_length)
        assert found[j] == pytest.approx(_end_cost(m, name, is_tied, t, new), rel=0.01), t


def test_cost_of_looked_up_rows_is_the_real_change(made: Made) -> None:
    before = [_margins(made, row) for row in range(len(made.reference))]
    weights, treatment = made.weights("token_embd"), Treatment("Q8_0")
    component = made.component("token_embd")
    (cost,), _ = edge_costs(made.edge_inputs, component, [treatment], weights, False, {}, False)
    embedding = made.model.model.embed_tokens
    embedding.weight.data = torch.from_numpy(treated_values(weights, treatment, None))
    real = _margin_change(made, before)
    embedding.weight.data = torch.from_numpy(weights)
    assert 1 / 3 < cost / real < 3  # one number from two draws of signs in eight sequences


@ENDS
def test_feedback_of_the_ends_that_does_not_help_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    m: Made = request.getfixturevalue(kind)
    given = m.edge_inputs, m.component(name), END_CHOICES, m.weights(name), kind == "tied", {}
    plain = edge_costs(*given, False)
    monkeypatch.setattr(edges, "gptq_quantize", _worse)
    assert edge_costs(*given, True) == plain


# --- the file of costs ----------------------------------------------------------------------


def test_a_cut_file_of_costs_is_read_up_to_the_cut(tmp_path: Path) -> None:
    lines = [json.dumps({"name": f"blk.{i}.attn_q", "by_weights": [i]}) for i in range(3)]
    path = tmp_path / "costs.jsonl"
    assert read_costs(path) == {}
    path.write_text("\n".join(lines)[:-5] + "\n" + lines[0])
    assert list(read_costs(path)) == ["blk.0.attn_q", "blk.1.attn_q"]
