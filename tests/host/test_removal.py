"""Removal of KV groups and neurons: costs by hand, and the model left in torch and in llama.cpp."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import SEED, Made, load_script
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Plan, Treatment, uniform
from edge_dtm.formats.record import RunSettings
from edge_dtm.formats.reference import CALIBRATION, Reference
from edge_dtm.host.blocks.calibration import Calibration
from edge_dtm.host.blocks.sensitivity import Activations
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, open_checkpoint
from edge_dtm.host.checkpoint.edited import EditedCheckpoint
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.export import export_gguf, fixed_bytes
from edge_dtm.host.quantize.equalize import EqualizedCheckpoint, find_scales
from edge_dtm.host.removal import (
    IMPORTANCES,
    Correction,
    MaskedCheckpoint,
    Option,
    Unit,
    columns_of,
    damped_moments,
    disagreements,
    kept_counts,
    margin_cost,
    masked,
    measure_units,
    read_units,
    reduce,
    saliencies,
    unit_size,
)
from edge_dtm.host.trajectory.generate import generate_reference
from edge_dtm.host.trajectory.prompts import Prompt
from edge_dtm.llamacpp.runner import LlamaRunner, check_gguf
from edge_dtm.llamacpp.tensors import describe

CPU = torch.device("cpu")
BLOCK = 32
# What the tiny model (3 layers, 2 KV groups, 512 neurons) is left with.
CASES: dict[str, dict[tuple[int, str], int]] = {
    "nothing": {},
    "fewer groups": {(1, "attn"): 1},
    "fewer in the first": {(0, "attn"): 1},
    "no attention": {(1, "attn"): 0},
    "no attention at the end": {(2, "attn"): 0},
    "fewer neurons": {(1, "ffn"): 256},
    "one block": {(2, "ffn"): 32},
    "mixed": {(0, "attn"): 1, (0, "ffn"): 480, (1, "attn"): 0, (1, "ffn"): 32, (2, "attn"): 1},
}


@pytest.fixture(scope="module")
def units(made: Made, tmp_path_factory: pytest.TempPathFactory) -> list[Unit]:
    results = tmp_path_factory.mktemp("removal") / "units.jsonl"
    return measure_units(made.checkpoint, made.activations, made.calibration, CPU, BLOCK, results)


@pytest.fixture(scope="module")
def make(made: Made, units: list[Unit], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reduced checkpoint of a case, made once."""
    folder, done = tmp_path_factory.mktemp("reduced"), {}

    def make(case: str) -> EditedCheckpoint:
        if case not in done:
            file = folder / f"{case}.safetensors"
            done[case] = reduce(made.checkpoint, units, CASES[case], made.calibration, {}, file)
        return done[case]

    return make


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids, use_cache=False).logits)


def _ids(vocab: int = 768) -> torch.Tensor:
    return torch.randint(3, vocab, (3, 60), generator=torch.Generator().manual_seed(0))


# --- the model left -------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_reduced_is_the_masked_model(
    made: Made, units: list[Unit], make: Callable[[str], EditedCheckpoint], case: str
) -> None:
    reduced, ids = make(case), _ids()
    found = _logits(load_model(reduced, CPU), ids)
    model = masked(made.checkpoint, reduced, units, CASES[case], CPU)
    whole = {n: p.shape for n, p in made.model.named_parameters()}
    assert {n: p.shape for n, p in model.named_parameters()} == whole
    torch.testing.assert_close(found, _logits(model, ids), atol=2e-5, rtol=1e-4)
    changed = (found - _logits(made.model, ids)).abs().max()
    assert (changed > 1e-3) == bool(CASES[case])
    # The mask, by hand: what was dropped is zero, what is kept is not.
    state = {n: p.numpy() for n, p in model.named_parameters()}
    for (layer, part), count in CASES[case].items():
        unit = next(u for u in units if (u.layer, u.part) == (layer, part))
        at = f"model.layers.{layer}."
        w = state[at + ("self_attn.o_proj" if part == "attn" else "mlp.down_proj") + ".weight"]
        width = 128 if part == "attn" else 1  # two query heads of 64 to a group
        for place, group in enumerate(unit.order):
            columns = w[:, group * width : (group + 1) * width]
            assert bool(columns.any()) == (place < count), (layer, part, group)
        if part == "attn" and count:
            group = unit.order[0]
            for name, size in (("q", 128), ("k", 64), ("v", 64)):
                rows = slice(group * size, (group + 1) * size)
                own = state[at + f"self_attn.{name}_proj.weight"]
                original = made.weights(f"blk.{layer}.attn_{name}")
                assert np.array_equal(own[rows], original[rows])
                assert not np.delete(own, np.arange(rows.start, rows.stop), axis=0).any()


def test_every_component_that_exists_has_its_module(
    made: Made, make: Callable[[str], EditedCheckpoint]
) -> None:
    reduced = make("mixed")
    assert [reduced.config.layer_kv_heads(i) for i in range(3)] == [1, 0, 1]
    assert [reduced.config.layer_ffn(i) for i in range(3)] == [480, 32, 512]
    model, seen = load_model(reduced, CPU), {}
    modules = dict(model.named_modules())
    for c in reduced.components():
        modules[module_name(c.name)].register_forward_hook(
            lambda _, args, out, name=c.name: seen.__setitem__(name, (args[0], out))
        )
    _logits(model, _ids())
    assert set(seen) == {c.name for c in reduced.components()}
    for c in reduced.components():
        if c.in_block:
            assert seen[c.name][0].shape[-1] == c.row_length
            assert seen[c.name][1].shape[-1] == c.rows
    # All stages that measure run on it.
    activations = Activations(
        made.activations.folder.with_name("reduced"), made.reference, reduced.components()
    )
    activations.capture(model, 1)
    assert activations.gradients("blk.1.ffn_down").any()
    assert activations.inputs("blk.0.attn_output").shape[1] == 128
    activations.remove()


def test_hash_and_pickle(
    made: Made, units: list[Unit], make: Callable[[str], EditedCheckpoint], tmp_path: Path
) -> None:
    reduced = make("mixed")
    again = reduce(made.checkpoint, units, CASES["mixed"], made.calibration, {}, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == reduced.file.read_bytes()
    back = pickle.loads(pickle.dumps(reduced))
    assert back.config == reduced.config and back.components() == reduced.components()
    hashes = {make(case).check() for case in CASES}
    assert len(hashes) == len(CASES) and made.checkpoint.check() not in hashes
    assert back.check() == again.check() == reduced.check()
    assert reduced.meta["kept"] == {
        f"{layer}.{part}": n for (layer, part), n in CASES["mixed"].items()
    }
    mask = MaskedCheckpoint(made.checkpoint, reduced, units, CASES["mixed"])
    mask = pickle.loads(pickle.dumps(mask))
    assert mask.tokenizer.eos_ids == made.checkpoint.tokenizer.eos_ids
    assert mask.check() != made.checkpoint.check()


def test_what_cannot_be_kept(made: Made, units: list[Unit], tmp_path: Path) -> None:
    for kept in ({(0, "attn"): 0}, {(1, "ffn"): 0}, {(1, "ffn"): 513}, {(9, "ffn"): 32}):
        with pytest.raises(ValueError, match="keep|first layer|nothing was measured"):
            reduce(made.checkpoint, units, kept, made.calibration, {}, tmp_path / "reduced")
    with pytest.raises(EdgeDtmError, match="free some space"):
        reduce(
            made.checkpoint, units, CASES["mixed"], made.calibration, {}, tmp_path / "no" / "file"
        )
    assert not list(tmp_path.iterdir())


# --- llama.cpp ------------------------------------------------------------------------------


def _export(checkpoint: Checkpoint, path: Path, kind: str) -> Plan:
    plan = uniform(checkpoint.components(), kind, fixed_bytes(checkpoint))
    export_gguf(checkpoint, plan, path, {})
    assert path.stat().st_size == plan.size_bytes
    return plan


def _replay(path: Path, reference: Reference, kv_type: str) -> Any:
    check_gguf(path)
    with LlamaRunner(path, RunSettings(threads=1, kv_type=kv_type), 128) as runner:
        return runner.teacher_forced(reference)


@pytest.mark.parametrize("case", list(CASES))
def test_llama_cpp_runs_what_is_left(
    made: Made,
    units: list[Unit],
    make: Callable[[str], EditedCheckpoint],
    tmp_path: Path,
    case: str,
) -> None:
    reduced, path = make(case), tmp_path / "reduced.gguf"
    _export(reduced, path, "F32")
    record = _replay(path, made.reference, "F32")
    model = masked(made.checkpoint, reduced, units, CASES[case], CPU)
    # float32 on both sides; a position with a margin that small says nothing.
    clear = [d for d in disagreements(model, made.reference, record.ids) if d.margin > 1e-3]
    assert clear == []
    if CASES[case]:
        original = disagreements(made.model, made.reference, record.ids)
        assert len(original) > 0 or case not in ("mixed", "no attention")
    reader = gguf.GGUFReader(path)
    architecture = "deci" if CASES[case] else "llama"
    assert reader.get_field("general.architecture").contents() == architecture
    heads = reader.get_field(f"{architecture}.attention.head_count").contents()
    groups = reader.get_field(f"{architecture}.attention.head_count_kv").contents()
    neurons = reader.get_field(f"{architecture}.feed_forward_length").contents()
    if CASES[case]:
        kept = CASES[case]
        assert groups == [kept.get((i, "attn"), 2) for i in range(3)]
        assert heads == [2 * n for n in groups]
        assert neurons == [kept.get((i, "ffn"), 512) for i in range(3)]
    else:
        assert (heads, groups, neurons) == (4, 2, 512)
    assert reader.get_field(f"{architecture}.attention.key_length").contents() == 64
    assert reader.get_field(f"{architecture}.attention.value_length").contents() == 64
    matrices = [t for t in describe(path) if t.is_matrix]
    assert [(t.component, *t.shape) for t in matrices] == [
        (c.name, c.rows, c.row_length) for c in reduced.components()
    ]


def test_nothing_removed_is_the_very_file(
    made: Made, make: Callable[[str], EditedCheckpoint], tmp_path: Path
) -> None:
    _export(made.checkpoint, tmp_path / "original.gguf", "Q8_0")
    _export(make("nothing"), tmp_path / "nothing.gguf", "Q8_0")
    first, second = (tmp_path / n for n in ("original.gguf", "nothing.gguf"))
    assert first.read_bytes() == second.read_bytes()


def test_mixed_types(
    made: Made, units: list[Unit], make: Callable[[str], EditedCheckpoint], tmp_path: Path
) -> None:
    reduced, path = make("mixed"), tmp_path / "mixed.gguf"
    components = reduced.components()
    plan = Plan(
        components,
        tuple(Treatment("Q8_0" if i % 2 else "F16") for i in range(len(components))),
        fixed_bytes(reduced),
    )
    export_gguf(reduced, plan, path, {})
    assert path.stat().st_size == plan.size_bytes
    assert plan.size_bytes < _export(make("nothing"), tmp_path / "whole.gguf", "Q8_0").size_bytes
    record = _replay(path, made.reference, "F16")
    model = masked(made.checkpoint, reduced, units, CASES["mixed"], CPU)
    counted = int(made.reference.generated_lengths.sum())
    found = disagreements(model, made.reference, record.ids)
    assert len(found) < 0.1 * counted and all(d.margin < 0.3 for d in found)


def test_disagreements_are_all_and_only_those(made: Made) -> None:
    ids = made.reference.generated_ids.copy()
    none = disagreements(made.model, made.reference, ids)
    assert all(d.margin < 1e-3 for d in none)
    ids[2, 3], ids[5, 0] = 7, 9
    found = {(d.row, d.position): d.margin for d in disagreements(made.model, made.reference, ids)}
    assert set(found) - {(d.row, d.position) for d in none} == {(2, 3), (5, 0)}
    assert found[2, 3] == pytest.approx(float(made.reference.margins[2, 3]), abs=1e-3)


def test_a_deci_file_is_no_source(make: Callable[[str], EditedCheckpoint], tmp_path: Path) -> None:
    _export(make("mixed"), tmp_path / "deci.gguf", "F16")
    with pytest.raises(EdgeDtmError, match="deci.*give the original") as caught:
        open_checkpoint(tmp_path / "deci.gguf")
    assert "\n" not in str(caught.value)


# --- biases, and other sources --------------------------------------------------------------


class _Biased(Made):
    """As Made, of an untrained model with biases everywhere and scaled rotations."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.checkpoint = open_checkpoint(folder)
        self.model = load_model(self.checkpoint, CPU)
        self.components = self.checkpoint.components()
        self.reference = generate_reference(
            self.model,
            [Prompt((1, 300 + i, 400 + i), f"{i}") for i in range(6)],
            tokens=16,
            eos_ids=[2],
            split=np.full(6, CALIBRATION, np.uint8),
            provenance={},
            parts=work / "parts",
        )
        self.activations = Activations(work / "activations", self.reference, self.components)
        self.activations.capture(self.model, 0)
        self.calibration = Calibration(work / "calibration", self.reference, self.components)
        self.calibration.capture(self.model, 1)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Made:
    from transformers import AutoConfig, LlamaForCausalLM

    work = tmp_path_factory.mktemp("biased")
    folder = load_script("make_tiny_llama").make_tiny_llama(
        work / "hf", steps=0, layers=3, attention_bias=True, rope_scaling="llama3"
    )
    config = AutoConfig.from_pretrained(folder)
    config.mlp_bias = True
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for name, data in model.named_parameters():
        noise = torch.randn(data.shape, generator=generator)
        if name.endswith("norm.weight"):
            data.data = 1 + 0.3 * noise
        else:
            data.data = 0.3 * noise if name.endswith(".bias") else noise / data.shape[1] ** 0.5
    model.save_pretrained(folder)
    return _Biased(folder, work)


@pytest.mark.parametrize("kind", ["original", "equalized", "gguf"])
def test_biases_and_other_sources(biased: Made, tmp_path: Path, kind: str) -> None:
    checkpoint, activations = biased.checkpoint, biased.activations
    assert checkpoint.config.attention_bias and checkpoint.config.mlp_bias
    if kind == "equalized":
        scales = find_scales(biased.calibration, checkpoint)
        activations = Activations(activations.folder, biased.reference, biased.components)
        activations.scales, activations.config = scales, checkpoint.config
        checkpoint = EqualizedCheckpoint(checkpoint, scales)
    elif kind == "gguf":
        _export(checkpoint, tmp_path / "source.gguf", "F32")
        checkpoint = open_checkpoint(tmp_path / "source.gguf")
    units = measure_units(
        checkpoint, activations, biased.calibration, CPU, 64, tmp_path / "units.jsonl"
    )
    kept = {(0, "attn"): 1, (0, "ffn"): 448, (1, "attn"): 0, (1, "ffn"): 64, (2, "ffn"): 256}
    reduced = reduce(
        checkpoint, units, kept, biased.calibration, activations.scales, tmp_path / "reduced"
    )
    vectors = dict(reduced.vectors())
    assert (vectors["blk.0.attn_q.bias"], vectors["blk.0.attn_k.bias"]) == (128, 64)
    assert "blk.1.attn_output.bias" not in vectors and vectors["blk.2.ffn_up.bias"] == 256
    model = masked(checkpoint, reduced, units, kept, CPU)
    expected = _logits(model, _ids())
    torch.testing.assert_close(
        _logits(load_model(reduced, CPU), _ids()), expected, atol=5e-5, rtol=1e-3
    )
    assert not model.model.layers[1].self_attn.o_proj.bias.any()
    _export(reduced, tmp_path / "reduced.gguf", "F32")
    record = _replay(tmp_path / "reduced.gguf", biased.reference, "F32")
    found = disagreements(model, biased.reference, record.ids)
    assert [d for d in found if d.margin > 1e-3] == []


def test_a_bias_goes_with_its_attention(biased: Made, tmp_path: Path) -> None:
    units = measure_units(
        biased.checkpoint, biased.activations, biased.calibration, CPU, 64, tmp_path / "units"
    )
    name, activations = "blk.1.attn_output", biased.activations
    option = next(u for u in units if u.component == name).options[-1]
    assert option.kept == 0
    output = activations.inputs(name).astype(np.float64) @ biased.weights(name).T
    output += biased.checkpoint.hf_tensor(name + ".bias")
    each = (activations.gradients(name) * output).sum(-1)
    z = np.add.reduceat(each, activations.edges[:-1], axis=1)
    expected = (z**2).sum() / 2 / biased.reference.generated_lengths.sum()
    assert option.cost == pytest.approx(expected, rel=1e-3)


def test_twice(made: Made, make: Callable[[str], EditedCheckpoint], tmp_path: Path) -> None:
    """What is left may be reduced again, with activations of its own."""
    first = make("mixed")
    model, components = load_model(first, CPU), first.components()
    activations = Activations(tmp_path / "a", made.reference, components)
    calibration = Calibration(tmp_path / "c", made.reference, components)
    activations.capture(model, 0)
    calibration.capture(model, 1)
    units = measure_units(first, activations, calibration, CPU, BLOCK, tmp_path / "units")
    # One group in the first layer, no attention and one block in the second: nothing to remove.
    assert [u.component for u in units] == ["blk.0.ffn_down", "blk.2.attn_output", "blk.2.ffn_down"]
    kept = {(0, "ffn"): 256, (2, "attn"): 0}
    second = reduce(first, units, kept, calibration, {}, tmp_path / "second")
    assert second.config.kept_kv_heads == (1, 0, 0) and second.config.kept_ffn == (256, 32, 512)
    expected = _logits(masked(first, second, units, kept, CPU), _ids())
    torch.testing.assert_close(
        _logits(load_model(second, CPU), _ids()), expected, atol=2e-5, rtol=1e-4
    )
    _export(second, tmp_path / "second.gguf", "Q8_0")
    assert len(_replay(tmp_path / "second.gguf", made.reference, "F16")) == len(made.reference)


def test_tied_embeddings(tied: Made, tmp_path: Path) -> None:
    units = measure_units(
        tied.checkpoint, tied.activations, tied.calibration, CPU, BLOCK, tmp_path / "units"
    )
    kept = {(0, "attn"): 1, (0, "ffn"): 64}
    reduced = reduce(tied.checkpoint, units, kept, tied.calibration, {}, tmp_path / "reduced")
    model = masked(tied.checkpoint, reduced, units, kept, CPU)
    _export(reduced, tmp_path / "reduced.gguf", "F32")
    record = _replay(tmp_path / "reduced.gguf", tied.reference, "F32")
    assert [d for d in disagreements(model, tied.reference, record.ids) if d.margin > 1e-3] == []


def test_equalization_hardly_matters_to_costs(
    made: Made, units: list[Unit], tmp_path: Path
) -> None:
    """The same removal of the same function: only the damping sees other columns."""
    scales = find_scales(made.calibration, made.checkpoint)
    activations = Activations(made.activations.folder, made.reference, made.components)
    activations.scales, activations.config = scales, made.checkpoint.config
    found = measure_units(
        EqualizedCheckpoint(made.checkpoint, scales),
        activations,
        made.calibration,
        CPU,
        BLOCK,
        tmp_path / "units.jsonl",
    )
    for a, b in zip(units, found, strict=True):
        if a.part == "attn":
            for x, y in zip(a.options, b.options, strict=True):
                assert y.cost == pytest.approx(x.cost, rel=0.3), (a.layer, x.kept)


# --- costs ----------------------------------------------------------------------------------


def _moments(made: Made, name: str) -> np.ndarray[Any, Any]:
    """Damped H in float64, from its definition."""
    x = made.calibration.inputs(name).astype(np.float64)
    v = made.calibration.token_weights(name).astype(np.float64)
    h = (x * (v / v.sum())[:, None]).T @ x
    h /= np.diagonal(h).mean()
    tokens = v.sum() ** 2 / (v**2).sum()
    return h + np.eye(len(h)) * np.clip(3 * len(h) / tokens, 0.03, 5.0)


@pytest.mark.parametrize(("layer", "part"), [(1, "ffn"), (0, "attn"), (2, "attn")])
def test_costs_are_the_definition(made: Made, units: list[Unit], layer: int, part: str) -> None:
    unit = next(u for u in units if (u.layer, u.part) == (layer, part))
    name, width = unit.component, 128 if part == "attn" else 1
    w, h = made.weights(name).astype(np.float64), _moments(made, name)
    x = made.activations.inputs(name).astype(np.float64)
    g = made.activations.gradients(name).astype(np.float64)
    for option in unit.options:
        kept = [c for u in unit.order[: option.kept] for c in range(u * width, (u + 1) * width)]
        new = np.zeros_like(w)
        if kept:
            new[:, kept] = w @ h[:, kept] @ np.linalg.inv(h[np.ix_(kept, kept)])
        moved = x @ (new - w).T
        total = sum(
            float((g[draw, a:b] * moved[a:b]).sum()) ** 2
            for draw in range(2)
            for a, b in pairwise(made.activations.edges)
        )
        expected = total / 2 / made.reference.generated_lengths.sum()
        assert option.cost == pytest.approx(expected, rel=2e-2, abs=1e-9), option


@pytest.mark.parametrize(("layer", "part"), [(2, "attn"), (0, "ffn")])
def test_a_cost_is_what_the_margins_do(
    made: Made, units: list[Unit], tmp_path: Path, layer: int, part: str
) -> None:
    """Against the margins of a model with a little of the removal, where first order is exact, with
    so many draws of signs that their noise does not matter."""
    unit = next(u for u in units if (u.layer, u.part) == (layer, part))
    option, little = unit.options[-1 if part == "ffn" else 0], 0.02
    kept = {(layer, part): option.kept}
    reduced = reduce(made.checkpoint, units, kept, made.calibration, {}, tmp_path / "reduced")
    model, squares = masked(made.checkpoint, reduced, units, kept, CPU), []
    # Only the corrected matrix matters: all that else is zero feeds zeros.
    own = dict(model.named_modules())[module_name(unit.component)].weight
    original = load_model(made.checkpoint, CPU)
    weight = dict(original.named_modules())[module_name(unit.component)].weight
    error = (own - weight).clone()
    weight.data += little * error
    for row in range(len(made.reference)):
        at = made.positions(row)
        before, after = (_logits(m, made.ids(row))[0, at] for m in (made.model, original))
        change = (after - before).double().gather(1, before.topk(2).indices)
        squares.append((change[:, 0] - change[:, 1]).square())
    found = float(torch.cat(squares).mean()) / little**2
    costs = []
    component = made.component(unit.component)
    for seed in range(24):
        activations = Activations(tmp_path / f"{seed}", made.reference, [component])
        activations.capture(made.model, seed)
        x, g = activations.inputs(component.name), activations.gradients(component.name)
        costs.append(
            margin_cost(activations, torch.from_numpy(x), torch.from_numpy(g), error.detach())
        )
        if seed == SEED:
            assert costs[-1] == pytest.approx(option.cost, rel=1e-3)
    assert np.mean(costs) == pytest.approx(found, rel=0.3)


def test_more_removed_costs_more(units: list[Unit]) -> None:
    for unit in units:
        kept = [o.kept for o in unit.options]
        assert kept == sorted(set(kept), reverse=True)
        for less, more in pairwise(unit.options):
            assert more.cost > 0.7 * less.cost, (unit.layer, unit.part, more.kept)
        if len(unit.options) > 2:
            assert unit.options[-1].cost > 3 * unit.options[0].cost


def test_the_most_important_are_kept(made: Made, units: list[Unit]) -> None:
    """Keeping the other end of the order costs more."""
    for unit in units:
        width, option = (128, 0) if unit.part == "attn" else (1, 3)
        w = torch.from_numpy(made.weights(unit.component).copy())
        x = torch.from_numpy(made.activations.inputs(unit.component).copy())
        g = torch.from_numpy(made.activations.gradients(unit.component))
        moments = damped_moments(made.calibration, {}, unit.component, CPU)
        columns = columns_of(np.array(unit.order[::-1]), width)
        count = unit.options[option].kept * width
        error = -w
        error[:, torch.from_numpy(columns[:count])] += Correction(w, moments, columns)(count)
        assert margin_cost(made.activations, x, g, error) > 1.2 * unit.options[option].cost


@pytest.mark.parametrize("name", ["blk.0.ffn_down", "blk.1.attn_output"])
def test_least_squares_beats_plain_dropping(made: Made, name: str) -> None:
    w = torch.from_numpy(made.weights(name).copy())
    moments = damped_moments(made.calibration, {}, name, CPU)
    assert np.allclose(moments.numpy(), _moments(made, name), rtol=1e-3, atol=1e-4)
    columns = np.random.default_rng(0).permutation(w.shape[1])
    correct = Correction(w, moments, columns)
    x = torch.from_numpy(made.calibration.inputs(name).copy())
    v = torch.from_numpy(made.calibration.token_weights(name))[:, None]
    whole = x @ w.T
    before = None
    for count in (len(columns) - 1, len(columns) // 2, len(columns) // 8):
        kept = torch.from_numpy(columns[:count])
        plain = ((x[:, kept] @ w[:, kept].T - whole).square() * v).sum()
        fitted = float(((x[:, kept] @ correct(count).T - whole).square() * v).sum())
        assert fitted < plain
        assert before is None or fitted > before
        before = fitted
        # Nothing near it is better in the metric it is fitted in.
        error = torch.zeros_like(w)
        error[:, kept] = correct(count)
        error -= w
        least = float(((error @ moments) * error).sum())
        for seed in range(3):
            other = error.clone()
            noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
            other[:, kept] += 1e-2 * w.std() * noise[:, kept]
            assert float(((other @ moments) * other).sum()) > least
    assert torch.equal(correct(w.shape[1]), w[:, torch.from_numpy(columns)])
    assert correct(0).shape == (w.shape[0], 0)


@pytest.mark.parametrize("width", [1, 128])
def test_saliencies_are_what_they_say(made: Made, width: int) -> None:
    """Each group dropped by itself, written out."""
    name = "blk.1.ffn_down" if width == 1 else "blk.1.attn_output"
    w, h = made.weights(name).astype(np.float64), _moments(made, name)
    x = made.activations.inputs(name).astype(np.float64)
    g = made.activations.gradients(name).astype(np.float64)
    squares = made.calibration.output_squares(name)
    n, edges = w.shape[1], made.activations.edges

    def tensor(a: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(a, dtype=np.float32))

    found = {
        kind: saliencies(
            kind, tensor(w), tensor(h), width, tensor(x), tensor(g), edges.tolist(), tensor(squares)
        ).numpy()
        for kind in IMPORTANCES
    }
    for group in range(0, n // width, 1 if width > 1 else 60):
        gone = np.arange(group * width, (group + 1) * width)
        kept = np.setdiff1d(np.arange(n), gone)
        plain, corrected = -w.copy(), -w.copy()
        plain[:, kept] = 0
        corrected[:, kept] += w @ h[:, kept] @ np.linalg.inv(h[np.ix_(kept, kept)])

        def cost(error: np.ndarray[Any, Any]) -> float:
            each = (g * (x @ error.T)).sum(-1)
            z = np.add.reduceat(each, edges[:-1], axis=1)
            return float((z**2).mean())

        assert found["gradient"][group] == pytest.approx(cost(plain), rel=2e-2, abs=1e-9)
        assert found["corrected"][group] == pytest.approx(cost(corrected), rel=2e-2, abs=1e-9)
        # The surgeon's error is that of the corrected weights in H.
        error = corrected * np.sqrt(squares)[:, None]
        assert found["moments"][group] == pytest.approx(
            float(((error @ h) * error).sum()), rel=1e-2
        )
    with pytest.raises(ValueError, match="choose among"):
        saliencies(
            "none",
            tensor(w),
            tensor(h),
            width,
            tensor(x),
            tensor(g),
            edges.tolist(),
            tensor(squares),
        )


# --- results on disk ------------------------------------------------------------------------


def test_resume(made: Made, units: list[Unit], tmp_path: Path) -> None:
    results, done = tmp_path / "new" / "units.jsonl", []

    def measure(progress: Callable[[int], None] | None = None, **options: Any) -> list[Unit]:
        return measure_units(
            made.checkpoint,
            made.activations,
            made.calibration,
            CPU,
            options.pop("block", BLOCK),
            results,
            progress,
            **options,
        )

    def stop(count: int) -> None:
        done.append(count)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(stop)
    text = results.read_text()
    assert len(text.splitlines()) == 3
    results.write_text(text[:-20])  # killed amid the third line
    done.clear()
    assert measure(done.append) == units
    assert done == [2, 1, 1, 1, 1]
    before = results.read_bytes()
    done.clear()
    assert measure(done.append) == units and done == [6]
    assert results.read_bytes() == before
    assert list(read_units(results).values()) == units
    # Another block or importance is another measurement.
    done.clear()
    other = measure(done.append, block=64)
    assert len(done) == 6 and other[1].options[-1].kept == 64
    done.clear()
    measure(done.append, importance="gradient", block=64)
    assert len(done) == 6
    done.clear()
    assert measure(done.append) == units and done == [6]


def test_units_through_json(units: list[Unit]) -> None:
    for unit in units:
        assert Unit.from_json(json.loads(json.dumps(unit.to_json()))) == unit
        assert sorted(unit.order) == list(range(2 if unit.part == "attn" else 512))
    assert [(u.layer, u.part) for u in units] == [(i, p) for i in range(3) for p in ("attn", "ffn")]


# --- which are kept -------------------------------------------------------------------------


@given(st.permutations(range(12)), st.integers(0, 12), st.integers(1, 5))
def test_kept_indices(order: list[int], kept: int, width: int) -> None:
    unit = Unit(0, "ffn", tuple(order), (Option(1, 0.0),))
    found = unit.kept_indices(kept)
    assert found.dtype == np.int64 and len(found) == kept
    assert (np.diff(found) > 0).all() and set(found.tolist()) == set(order[:kept])
    columns = columns_of(found, width)
    assert len(columns) == kept * width and (np.diff(columns) > 0).all()
    assert set((columns // width).tolist()) == set(order[:kept])
    for wrong in (-1, 13):
        with pytest.raises(ValueError, match="cannot keep"):
            unit.kept_indices(wrong)


@given(st.integers(1, 12000), st.sampled_from([32, 64, 256]))
def test_ffn_counts(neurons: int, block: int) -> None:
    from edge_dtm.host.checkpoint.checkpoint import ModelConfig

    config = ModelConfig(
        "LlamaForCausalLM", "m", 2, 64, 4, 2, 16, neurons, 100, 1e-5, 1e4, 64, True
    )
    found = kept_counts(config, 0, "ffn", block)
    assert found == sorted(set(found), reverse=True)
    assert all(k % block == 0 and 0 < k < neurons for k in found)
    assert (found[-1:] == [block]) == (neurons > block)
    if neurons % (16 * block) == 0:
        assert found[:1] == [neurons * 15 // 16]
    assert unit_size(config, 0, "ffn") == neurons
    assert kept_counts(config, 0, "attn", block) == [1]
    assert kept_counts(config, 1, "attn", block) == [1, 0]
