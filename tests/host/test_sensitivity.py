"""Costs against brute force: ggml's own rounding, exact inner products, weights put in for real."""

from __future__ import annotations

import ctypes
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import SEED, STARTS, Made

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.host.blocks import fit
from edge_dtm.host.blocks import jobs as jobs_module
from edge_dtm.host.blocks import sensitivity as module
from edge_dtm.host.blocks.activations import SIGN_DRAWS, Activations
from edge_dtm.host.blocks.capture import BATCH_SEQUENCES
from edge_dtm.host.blocks.encoded import EncodedStore
from edge_dtm.host.blocks.fit import component_importance, edge_feedback, fit_component
from edge_dtm.host.blocks.jobs import (
    CostJobs,
    MaskJobs,
    encode_masks,
    measure_components,
    read_costs,
)
from edge_dtm.host.blocks.sensitivity import component_costs, edge_costs
from edge_dtm.host.checkpoint.derived import EqualizedCheckpoint
from edge_dtm.host.checkpoint.model import module_name
from edge_dtm.host.quantize.activations import activation_kind, round_activations
from edge_dtm.host.quantize.equalize import input_scale
from edge_dtm.host.quantize.gptq import gptq_quantize
from edge_dtm.host.quantize.masks import fit_masks
from edge_dtm.host.quantize.treat import treat, treated_values
from edge_dtm.llamacpp import ggml
from edge_dtm.search.allocation import convex_hull

CPU = torch.device("cpu")


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


# --- what is captured -----------------------------------------------------------------------


def test_captured_inputs_are_those_of_transformers(made: Made, trained_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(trained_folder, dtype=torch.float32).eval()
    modules = dict(theirs.named_modules())
    outputs: dict[str, torch.Tensor] = {}
    for c in made.components:
        if c.name != "token_embd":
            modules[module_name(c.name)].register_forward_hook(
                lambda _, args, out, name=c.name: outputs.__setitem__(name, out[0])
            )
    edges = made.activations.edges
    for row in range(len(made.reference)):
        with torch.no_grad():
            theirs(input_ids=made.ids(row), use_cache=False)
        for name, expected in outputs.items():
            x = made.activations.inputs(name)[edges[row] : edges[row + 1]]
            found = torch.from_numpy(x @ made.weights(name).T)
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_importance_is_the_mean_square_of_inputs(made: Made) -> None:
    x = made.activations.inputs("blk.1.ffn_down").astype(np.float64)
    expected = (x * x).mean(axis=0)
    assert np.allclose(made.activations.importance("blk.1.ffn_down"), expected, rtol=1e-5)
    assert np.array_equal(
        made.activations.importance("blk.0.attn_v"), made.activations.importance("blk.0.attn_q")
    )
    assert component_importance(made.activations, made.components[0], tied=False) is None
    assert component_importance(made.activations, made.components[0], tied=True) is not None


def test_gradients_are_those_of_the_signed_margins(made: Made) -> None:
    """Against a full backward pass from the logits, one sequence alone, without padding."""
    row, names = 2, ["blk.0.attn_k", "blk.1.ffn_up", "blk.2.attn_output"]
    modules = dict(made.model.named_modules())
    kept: dict[str, torch.Tensor] = {}
    handles = [
        modules[module_name(n)].register_forward_hook(
            lambda _, args, out, name=n: kept.__setitem__(name, out)
        )
        for n in names
    ]
    ids = made.ids(row)
    embedded = made.model.model.embed_tokens(ids).detach().requires_grad_(True)
    logits = made.model(inputs_embeds=embedded, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    count = int(made.reference.generated_lengths[row])
    top = torch.from_numpy(made.reference.top_ids[row, :count, :2].astype(np.int64))
    at = logits[made.positions(row)]
    margins = at.gather(1, top[:, :1])[:, 0] - at.gather(1, top[:, 1:])[:, 0]
    edges = made.activations.edges
    for draw in range(SIGN_DRAWS):
        signs = np.random.default_rng([SEED, draw, row]).choice([-1.0, 1.0], count)
        total = (margins * torch.from_numpy(signs.astype(np.float32))).sum()
        wanted = torch.autograd.grad(
            total, [*(kept[n] for n in names), embedded], retain_graph=True
        )
        for name, gradient in zip([*names, "token_embd"], wanted, strict=True):
            found = made.activations.gradients(name)[draw, edges[row] : edges[row + 1]]
            size = float(gradient.abs().max())
            # They are kept in half precision.
            assert np.abs(found - gradient[0].numpy()).max() < 2e-3 * size, name


def test_capture_goes_on_where_it_stopped(made: Made, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        raise Stop

    second = Activations(tmp_path / "a", made.reference, made.components)
    with pytest.raises(Stop):
        second.capture(made.model, SEED, stop)
    done: list[int] = []
    third = Activations(tmp_path / "a", made.reference, made.components)
    third.capture(made.model, SEED, done.append)
    assert done == [BATCH_SEQUENCES, len(STARTS) - BATCH_SEQUENCES]
    for c in made.components:
        assert np.array_equal(third.inputs(c.name), made.activations.inputs(c.name))
        if c.name != "output":
            assert np.array_equal(third.gradients(c.name), made.activations.gradients(c.name))
    third.remove()
    assert not (tmp_path / "a").exists()


# --- costs ----------------------------------------------------------------------------------

CHOICES = [Treatment(t) for t in ("F16", "Q8_0", "Q6_K", "Q4_K", "Q4_0", "IQ4_NL")]
CHOICES += [Treatment("Q8_0", 0.3), Treatment("F16", 0.5)]


@pytest.mark.parametrize("name", ["blk.0.attn_v", "blk.1.ffn_gate", "blk.2.ffn_down"])
def test_costs_are_the_inner_products(made: Made, name: str) -> None:
    """z = <G, E> with E = X^ W^' - X W' formed as it stands, in float64."""
    weights, component = made.weights(name), made.component(name)
    importance = made.activations.importance(name)
    found = component_costs(made.activations, component, CHOICES, weights, CPU, importance)
    x = made.activations.inputs(name)
    g = made.activations.gradients(name).astype(np.float64)
    edges = made.activations.edges
    for treatment, cost in zip(CHOICES, found, strict=True):
        rounded = round_activations(torch.from_numpy(np.array(x)), activation_kind(treatment.type))
        new = treated_values(weights, treatment, importance).astype(np.float64)
        e = rounded.numpy().astype(np.float64) @ new.T - x.astype(np.float64) @ weights.T
        z = np.stack([(g[:, a:b] * e[a:b]).sum((1, 2)) for a, b in pairwise(edges)])
        expected = (z**2).sum() / SIGN_DRAWS / made.reference.generated_lengths.sum()
        assert cost == pytest.approx(expected, rel=0.02), treatment


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


@pytest.mark.parametrize("types", [("Q8_0", "Q6_K"), ("Q4_K", "Q4_0")])
def test_costs_are_the_margins_real_change(made: Made, types: tuple[str, ...]) -> None:
    before = [_margins(made, row) for row in range(len(made.reference))]
    modules = dict(made.model.named_modules())
    predicted, real = [], []
    for component in made.components:
        if not component.in_block or ".attn_k" in component.name:
            continue
        name = component.name
        weights, importance = made.weights(name), made.activations.importance(name)
        treatments = [Treatment(t) for t in types]
        predicted += component_costs(
            made.activations, component, treatments, weights, CPU, importance
        )
        target = modules[module_name(name)]
        for treatment in treatments:
            new = torch.from_numpy(treated_values(weights, treatment, importance))
            kind = activation_kind(treatment.type)
            handle = target.register_forward_pre_hook(
                lambda _, args, kind=kind: (round_activations(args[0][0], kind)[None],)
            )
            target.weight.data = new
            real.append(_margin_change(made, before))
            target.weight.data = torch.from_numpy(weights)
            handle.remove()
    assert len(real) == 2 * 18
    assert 0.5 < sum(predicted) / sum(real) < 2
    assert _spearman(np.array(predicted), np.array(real)) > 0.8


def _spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


@pytest.mark.parametrize("kind", ["made", "tied"])
def test_costs_of_the_head_are_exact(kind: str, request: pytest.FixtureRequest) -> None:
    m: Made = request.getfixturevalue(kind)
    is_tied = kind == "tied"
    name = "token_embd" if is_tied else "output"
    weights = m.weights(name)
    importance = m.activations.importance(name)
    treatments = [Treatment("Q8_0"), Treatment("Q4_K")]
    found, kept = edge_costs(
        m.activations, m.component(name), treatments, weights, importance, is_tied
    )
    assert kept == [False, False]
    gradients = m.activations.gradients("token_embd").astype(np.float64)
    for treatment, cost in zip(treatments, found, strict=True):
        new = treated_values(weights, treatment, importance)
        expected = looked_up = 0.0
        for row in range(len(m.reference)):
            with torch.no_grad():
                hidden = m.model.model(input_ids=m.ids(row), use_cache=False).last_hidden_state[0]
            at = hidden[m.positions(row)]
            rounded = round_activations(at, activation_kind(treatment.type)).numpy()
            old_logits, new_logits = at.numpy() @ weights.T, rounded @ new.T
            top = m.reference.top_ids[row, : len(at), :2]
            change = np.take_along_axis(new_logits - old_logits, top, 1)
            expected += float(np.square(change[:, 0] - change[:, 1], dtype=np.float64).sum())
            a, b = m.activations.edges[row : row + 2]
            error = (new - weights)[m.ids(row)[0].numpy()]
            z = (gradients[:, a:b] * error).sum((1, 2))
            looked_up += float((z**2).sum() / SIGN_DRAWS)
        positions = int(m.reference.generated_lengths.sum())
        wanted = (expected + is_tied * looked_up) / positions
        assert cost == pytest.approx(wanted, rel=0.01)


def test_cost_of_looked_up_rows_is_the_real_change(made: Made) -> None:
    before = [_margins(made, row) for row in range(len(made.reference))]
    weights = made.weights("token_embd")
    treatment = Treatment("Q8_0")
    (cost,), _ = edge_costs(
        made.activations, made.component("token_embd"), [treatment], weights, None, False
    )
    embedding = made.model.model.embed_tokens
    embedding.weight.data = torch.from_numpy(treated_values(weights, treatment, None))
    real = _margin_change(made, before)
    embedding.weight.data = torch.from_numpy(weights)
    assert 1 / 3 < cost / real < 3  # one number from two draws of signs in eight sequences


# --- resuming -------------------------------------------------------------------------------


@pytest.fixture
def reading(made: Made) -> tuple[list[str], Any]:
    read: list[str] = []

    def get(name: str) -> np.ndarray[Any, Any]:
        read.append(name.removesuffix(".weight"))
        return made.checkpoint.hf_tensor(name)

    return read, get


def test_a_cut_results_file_is_gone_on_with(
    made: Made, tmp_path: Path, reading: tuple[list[str], Any]
) -> None:
    read, get = reading
    # Largest first is the order in which they are measured.
    components = sorted(made.components[:8], key=lambda c: -c.weights)
    choices = [[Treatment("Q8_0"), Treatment("Q4_0")] for _ in components]
    results = tmp_path / "costs.jsonl"
    whole = measure_components(
        CostJobs(made.activations, get, CPU, False), components, choices, results
    )
    assert read == [c.name for c in components]
    assert all(len(costs) == 2 and min(costs) > 0 for costs in whole)
    text = results.read_text()
    assert [json.loads(line)["name"] for line in text.splitlines()] == read
    lines = text.splitlines()
    for kept in ("\n".join(lines[:3]), "\n".join(lines[:3]) + "\n" + lines[3][:20]):
        results.write_text(kept)
        read.clear()
        done: list[int] = []
        again = measure_components(
            CostJobs(made.activations, get, CPU, False), components, choices, results, done.append
        )
        assert again == whole
        assert read == [c.name for c in components[3:]]
        assert done[0] == sum(c.weights for c in components[:3])
        assert done[1:] == [c.weights for c in components[3:]]
        read.clear()
        assert (
            measure_components(
                CostJobs(made.activations, get, CPU, False), components, choices, results
            )
            == whole
        )
        assert read == []


def test_processes_measure_the_same(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = [made.component(n) for n in ("blk.0.attn_q", "blk.1.ffn_down", "token_embd")]
    choices = [[Treatment("Q8_0"), Treatment("Q4_0")] for _ in components]
    found, blocks = [], []
    for least in (10**9, 0):
        monkeypatch.setattr(jobs_module, "SMALL_WEIGHTS", least)
        folder = tmp_path / str(least)
        folder.mkdir()
        shipped = EncodedStore(folder / "shipped", made.checkpoint)
        found.append(
            measure_components(
                CostJobs(
                    made.activations,
                    made.checkpoint.hf_tensor,
                    CPU,
                    False,
                    calibration=made.calibration,
                    encoded=shipped,
                ),
                components,
                choices,
                folder / "costs.jsonl",
            )
        )
        blocks.append(
            {p.name: p.read_bytes() for p in (folder / "shipped").iterdir() if p.suffix == ".npy"}
        )
    assert found[0] == found[1]
    assert blocks[0] and blocks[0] == blocks[1]


def test_other_choices_are_measured_anew(
    made: Made, tmp_path: Path, reading: tuple[list[str], Any]
) -> None:
    read, get = reading
    components, results = made.components[2:4], tmp_path / "costs.jsonl"
    one = [[Treatment("Q8_0")]] * 2
    two = [[Treatment("Q8_0"), Treatment("Q4_0")]] * 2
    first = measure_components(
        CostJobs(made.activations, get, CPU, False), components, one, results
    )
    second = measure_components(
        CostJobs(made.activations, get, CPU, False), components, two, results
    )
    # One treatment and two are multiplied in products of other shapes, which float32 rounds apart.
    alike = pytest.approx([costs[0] for costs in first], rel=1e-5)
    assert [costs[0] for costs in second] == alike
    assert len(read) == 4


# --- error feedback -------------------------------------------------------------------------


def _hf_rows(data: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a GGUF's q or k, whose rotated neighbours lie next to each other, back in halves."""
    d = len(data) // heads
    order = [h * d + 2 * i + s for h in range(heads) for s in (0, 1) for i in range(d // 2)]
    return data[order]


@pytest.fixture(scope="module")
def blocks(made: Made) -> list[Component]:
    return [c for c in made.components if c.in_block and ".attn_k" not in c.name]


def test_costs_of_shipped_blocks_are_the_margins_real_change(
    made: Made, blocks: list[Component], tmp_path: Path
) -> None:
    """The bytes that export would write, put into the model for real."""
    shipped = EncodedStore(tmp_path / "shipped", made.checkpoint)
    types = [Treatment(t) for t in ("Q8_0", "Q5_K", "Q4_0")]
    results = tmp_path / "costs.jsonl"
    read = made.checkpoint.hf_tensor
    costs = measure_components(
        CostJobs(made.activations, read, CPU, False, calibration=made.calibration, encoded=shipped),
        blocks,
        [types] * len(blocks),
        results,
    )
    known = read_costs(results)
    assert [known[c.name]["costs"] for c in blocks] == costs
    kept = [yes for c in blocks for yes in known[c.name]["feedback"]]
    assert sum(kept) > 0.7 * len(kept)
    before = [_margins(made, row) for row in range(len(made.reference))]
    modules = dict(made.model.named_modules())
    predicted, real, plain = [], [], []
    for component, own in zip(blocks, costs, strict=True):
        name = component.name
        weights, target = made.weights(name), modules[module_name(component.name)]
        sizes = [component.size_bytes(t) for t in types]
        hull = convex_hull(sizes, own)
        importance = made.activations.importance(name)
        rounded = component_costs(made.activations, component, types, weights, CPU, importance)
        for j in hull:
            data = shipped.encoded(component, types[j])
            new = ggml.dequantize(types[j].type, data, component.row_length)
            if "attn_q" in name:
                new = _hf_rows(new, made.checkpoint.config.heads)
            kind = activation_kind(types[j].type)
            handle = target.register_forward_pre_hook(
                lambda _, args, kind=kind: (round_activations(args[0][0], kind)[None],)
            )
            target.weight.data = torch.from_numpy(new)
            predicted.append(own[j])
            plain.append(rounded[j])
            real.append(_margin_change(made, before))
            target.weight.data = torch.from_numpy(weights)
            handle.remove()
    assert len(real) > len(blocks)  # most matrices have two or more types on their hull
    assert 0.5 < sum(predicted) / sum(real) < 2
    assert _spearman(np.array(predicted), np.array(real)) > 0.8
    # DampedHessian is for something, both in what is said and in what is.
    assert sum(real) < 0.8 * sum(plain)


def test_a_sparse_plan_finds_its_dense_blocks(
    made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The search gives zeros back where there are too many, down to a dense Q8_0 or F16, which
    need not be the best choice of its size; its blocks have to be there all the same."""
    component = made.component("blk.1.ffn_gate")
    choices = [Treatment("Q8_0"), Treatment("Q6_K"), Treatment("F16"), Treatment("Q8_0", 0.1)]
    monkeypatch.setattr(jobs_module, "component_costs", lambda *_: [0.3, 0.2, 0.1, 0.4])
    shipped, results = EncodedStore(tmp_path / "shipped", made.checkpoint), tmp_path / "costs.jsonl"
    measure_components(
        CostJobs(
            made.activations,
            made.checkpoint.hf_tensor,
            CPU,
            False,
            calibration=made.calibration,
            encoded=shipped,
        ),
        [component],
        [choices],
        results,
    )
    assert json.loads(results.read_text())["feedback"] == [True, True, False, True]
    for treatment in choices[:3]:
        assert shipped.encoded(component, treatment).shape[0] == component.rows


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_zeros_are_made_again_as_they_were_measured(
    made: Made, tmp_path: Path, scaled: bool, given: bool
) -> None:
    """Blocks of treatments with zeros are not kept, but fitted once more where a plan has them."""
    components = [made.component(n) for n in ("blk.1.attn_q", "blk.2.ffn_up")]
    choices = [Treatment("Q8_0", s) for s in (0.25, 0.5)] + [Treatment("F16", 0.4)]
    random = np.random.default_rng(5)
    # Of the sources and the inputs of both matrices.
    scales = {
        n: random.uniform(0.5, 2, 512 if n.endswith("down") else 256).astype(np.float32)
        for n in ("blk.1.attn_q", "blk.2.ffn_gate", "blk.2.ffn_down")
    }
    activations = Activations(made.activations.folder, made.reference, made.components)
    if scaled:
        activations = activations.equalized(scales, made.checkpoint.config)
    checkpoint = EqualizedCheckpoint(made.checkpoint, activations.scales)
    vectors = {c.name: random.uniform(0.1, 3, c.row_length).astype(np.float32) for c in components}
    shipped = EncodedStore(tmp_path / "shipped", checkpoint)
    measure_components(
        CostJobs(
            activations,
            checkpoint.hf_tensor,
            CPU,
            False,
            calibration=made.calibration,
            encoded=shipped,
            imatrix=vectors if given else None,
        ),
        components,
        [choices] * 2,
        tmp_path / "costs.jsonl",
    )
    pairs = [(c, t) for c in components for t in choices]
    assert all(shipped.is_fitted(c, t) and not shipped.has(c, t) for c, t in pairs)
    with pytest.raises(EdgeDtmError, match="--no-resume"):
        shipped.encoded(*pairs[0])
    weighed: list[int] = []
    jobs = MaskJobs(
        made.calibration,
        activations.scales,
        activations.config,
        checkpoint.hf_tensor,
        CPU,
        shipped,
        vectors if given else None,
    )
    encode_masks(jobs, pairs, weighed.append)
    assert sum(weighed) == len(choices) * sum(c.weights for c in components)
    for c in components:
        vector = None
        if given:
            scale = input_scale(activations.scales, c.name)
            vector = vectors[c.name] * (1 if scale is None else np.square(scale))
        weights = checkpoint.hf_tensor(c.name + ".weight")
        _, kept = fit_component(made.calibration, activations, c, choices, weights, CPU, vector)
        for t in choices:
            found = shipped.encoded(c, t)
            if "attn_q" in c.name:
                found = _hf_rows(found, made.checkpoint.config.heads)
            assert np.array_equal(found, kept[t][0]), (c.name, t)


class _Foreign:
    """The measured inputs and gradients with signs thrown over their columns: plain rounding does
    not mind, while what feedback takes to cancel adds up for every other pair of columns."""

    def __init__(self, made: Made, component: Component) -> None:
        random, a = np.random.default_rng(0), made.activations
        self.x = a.inputs(component.name) * random.choice([-1, 1], component.row_length)
        self.g = a.gradients(component.name)[0] * random.choice([-1, 1], component.rows)
        self.output_tokens = len(self.x)

    def inputs(self, _: str) -> Any:
        return self.x.astype(np.float32)

    def token_weights(self, _: str) -> Any:
        return np.ones(len(self.x), np.float32)

    def gradients(self, _: str) -> Any:
        return self.g.astype(np.float32)

    def input_squares(self, _: str) -> Any:
        return np.square(self.x, dtype=np.float64).mean(0)


FOREIGN = [Treatment(t) for t in ("F16", "Q8_0", "Q4_K", "Q4_0")]
FOREIGN += [Treatment("Q8_0", 0.3), Treatment("F16", 0.5)]


def _local_errors(made: Made, name: str, values: list[np.ndarray[Any, Any]]) -> list[float]:
    """tr(G E H E') on the measured sequences by its definition, float64."""
    x = made.activations.inputs(name).astype(np.float64)
    g = made.activations.gradients(name).astype(np.float64)
    v = np.sqrt((g**2).mean((0, 2)))
    h, heard = (x.T * v) @ x / v.sum(), v > 0  # in the last block few tokens are heard of
    outer = (g[0][heard].T / v[heard]) @ g[0][heard]  # one draw of signs is judged by
    errors = [new.astype(np.float64) - made.weights(name) for new in values]
    return [float(np.trace(outer @ e @ h @ e.T)) for e in errors]


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("name", ["blk.0.attn_v", "blk.1.ffn_gate", "blk.2.ffn_down"])
def test_feedback_is_kept_where_the_local_error_is_smaller(
    made: Made, monkeypatch: pytest.MonkeyPatch, name: str, foreign: bool
) -> None:
    component, weights = made.component(name), made.weights(name)
    tried: dict[Treatment, tuple[Any, torch.Tensor]] = {}

    def recorded(w: Any, types: Any, *rest: Any, **named: Any) -> Any:
        out = gptq_quantize(w, types, *rest, **named)
        tried.update({Treatment(t): o for t, o in zip(types, out, strict=True)})
        return out

    def recorded_masks(w: Any, treatments: Any, *rest: Any, **named: Any) -> Any:
        out = fit_masks(w, treatments, *rest, **named)
        tried.update(zip(treatments, out, strict=True))
        return out

    monkeypatch.setattr(fit, "gptq_quantize", recorded)
    monkeypatch.setattr(fit, "fit_masks", recorded_masks)
    monkeypatch.setattr(fit, "JUDGED_STEP", 1)
    calibration: Any = made.calibration
    if foreign:
        monkeypatch.setattr(fit, "damping_for", lambda *_: 0.01)  # trust them fully
        calibration = _Foreign(made, component)
    importance, kept = fit_component(
        calibration, made.activations, component, FOREIGN, weights, CPU
    )
    assert set(tried) == set(FOREIGN[1:])  # not F16 without zeros
    expected = set()
    for treatment, (_, values) in tried.items():
        plain = treated_values(weights, treatment, importance)
        with_feedback, without = _local_errors(made, name, [values.numpy(), plain])
        assert abs(with_feedback / without - 1) > 1e-4  # no close call
        if with_feedback < without:
            expected.add(treatment)
    assert set(kept) == expected
    assert (len(kept) < len(tried)) if foreign else any(t.zero_share for t in kept)
    for treatment, (data, values) in kept.items():
        found = ggml.dequantize(treatment.type, data, component.row_length)
        assert np.array_equal(found, values.numpy())
        zeros = round(treatment.zero_share * component.row_length)
        assert ((found == 0).sum(1) >= zeros).all()
    if foreign:
        assert np.allclose(importance, np.square(calibration.x).mean(0), rtol=1e-4)


def _worse(w: torch.Tensor, types: Any, *_: Any, **__: Any) -> Any:
    """Valid blocks, but of weights a tenth too large."""
    out = []
    for kind in types:
        data = ggml.quantize(kind, 1.1 * w.numpy())
        out.append((data, torch.from_numpy(ggml.dequantize(kind, data, w.shape[1]))))
    return out


def _worse_masks(w: torch.Tensor, treatments: Any, *_: Any, **__: Any) -> Any:
    """The same for treatments with zeros, where a little more can be better."""
    out = []
    for t in treatments:
        data = treat(2 * w.numpy(), t, None)
        out.append((data, torch.from_numpy(ggml.dequantize(t.type, data, w.shape[1]))))
    return out


def test_else_costs_and_blocks_are_plain_roundings(
    made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    component, results = made.component("blk.1.ffn_gate"), tmp_path / "costs.jsonl"
    weights = made.weights(component.name)
    monkeypatch.setattr(fit, "gptq_quantize", _worse)
    monkeypatch.setattr(fit, "fit_masks", _worse_masks)
    shipped = EncodedStore(tmp_path / "shipped", made.checkpoint)
    (costs,) = measure_components(
        CostJobs(
            made.activations,
            made.checkpoint.hf_tensor,
            CPU,
            False,
            calibration=made.calibration,
            encoded=shipped,
        ),
        [component],
        [FOREIGN],
        results,
    )
    assert json.loads(results.read_text())["feedback"] == [False] * len(FOREIGN)
    importance, kept = fit_component(
        made.calibration, made.activations, component, FOREIGN, weights, CPU
    )
    assert kept == {}
    expected = component_costs(made.activations, component, FOREIGN, weights, CPU, importance)
    assert costs == expected
    for treatment in FOREIGN:
        found = shipped.encoded(component, treatment)
        assert np.array_equal(found, treat(weights, treatment, importance))


@pytest.mark.parametrize("kind", ["made", "tied"])
def test_feedback_of_the_ends(kind: str, request: pytest.FixtureRequest) -> None:
    """Kept where it lowers the cost, which is then that of its values put in for real."""
    m: Made = request.getfixturevalue(kind)
    is_tied = kind == "tied"
    name = "token_embd" if is_tied else "output"
    component, weights = m.component(name), m.weights(name)
    importance = m.activations.importance(name)
    choices = [Treatment(t) for t in ("F16", "Q8_0", "Q4_K", "Q4_0")]
    given = m.activations, component, choices, weights, importance, is_tied
    plain, none = edge_costs(*given)
    feedback = edge_feedback(m.calibration, {}, component, is_tied)
    costs, kept = edge_costs(*given, feedback)
    assert none == [False] * 4 and kept[0] is False and any(kept)
    for j, treatment in enumerate(choices):
        assert (costs[j] < plain[j]) if kept[j] else (costs[j] == plain[j]), treatment
        if not kept[j]:
            continue
        ((_, values),) = gptq_quantize(torch.from_numpy(weights), [treatment.type], feedback)
        new = values.numpy()
        total = 0.0
        for row in range(len(m.reference)):
            with torch.no_grad():
                hidden = m.model.model(input_ids=m.ids(row), use_cache=False).last_hidden_state[0]
            at = hidden[m.positions(row)]
            rounded = round_activations(at, activation_kind(treatment.type)).numpy()
            top = m.reference.top_ids[row, : len(at), :2]
            change = np.take_along_axis(rounded @ new.T - at.numpy() @ weights.T, top, 1)
            total += float(np.square(change[:, 0] - change[:, 1], dtype=np.float64).sum())
            a, b = m.activations.edges[row : row + 2]
            error = (new - weights)[m.ids(row)[0].numpy()]
            z = (m.activations.gradients("token_embd")[:, a:b] * error).sum((1, 2))
            total += is_tied * float(np.square(z, dtype=np.float64).sum() / SIGN_DRAWS)
        expected = total / int(m.reference.generated_lengths.sum())
        assert costs[j] == pytest.approx(expected, rel=0.01), treatment


@pytest.mark.parametrize("name", ["output", "token_embd"])
def test_feedback_of_the_ends_that_does_not_help_is_not_taken(
    made: Made, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    component, weights = made.component(name), made.weights(name)
    choices = [Treatment("Q8_0"), Treatment("Q4_0")]
    given = made.activations, component, choices, weights, None, False
    plain = edge_costs(*given)[0]
    monkeypatch.setattr(module, "gptq_quantize", _worse)
    feedback = edge_feedback(made.calibration, {}, component, False)
    assert edge_costs(*given, feedback) == (plain, [False, False])


def test_given_importance_takes_the_place_of_our_own(made: Made, tmp_path: Path) -> None:
    """An imatrix is of the original model: the equalized one's inputs are larger by the scales."""
    component = made.component("blk.1.ffn_gate")
    vector = np.random.default_rng(2).uniform(0.1, 3, 256).astype(np.float32)
    choices, weights = [Treatment("Q4_0"), Treatment("F16")], made.weights(component.name)
    scale = np.random.default_rng(3).uniform(0.5, 2, 256).astype(np.float32)
    for scales, effective in (({}, vector), ({"blk.1.ffn_gate": scale}, vector * scale * scale)):
        activations = Activations(made.activations.folder, made.reference, made.components)
        activations = activations.equalized(scales, made.checkpoint.config)
        for calibration in (None, made.calibration):
            results = tmp_path / f"{len(scales)}-{calibration is None}.jsonl"
            shipped = EncodedStore(results.with_suffix(""), made.checkpoint)
            (costs,) = measure_components(
                CostJobs(
                    activations,
                    made.checkpoint.hf_tensor,
                    CPU,
                    False,
                    calibration=calibration,
                    encoded=shipped,
                    imatrix={component.name: vector},
                ),
                [component],
                [choices],
                results,
            )
            with np.load(shipped.folder / f"{component.name}.npz") as head:
                assert np.allclose(head["importance"], effective, rtol=1e-6)
            if calibration is None:
                expected = component_costs(activations, component, choices, weights, CPU, effective)
                assert costs == pytest.approx(expected, rel=1e-6)
                assert json.loads(results.read_text())["feedback"] == [False, False]
