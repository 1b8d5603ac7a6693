"""Zeros fitted in the order of the layers, against dense least squares on inputs of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from conftest import Made

from edge_dtm.formats.plan import Treatment
from edge_dtm.host.blocks import sequential_pruning as module
from edge_dtm.host.blocks.sequential_pruning import Pruned, prune_sequentially
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.distill.teacher import reference_sequences
from edge_dtm.host.quantize.hessian import DampedHessian, damping_for, effective_tokens
from edge_dtm.host.quantize.masks import fit_masks, kept_weights, refit
from edge_dtm.llamacpp import ggml

Values = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def sequences(made: Made) -> list[list[int]]:
    """Of unlike lengths: 3 to some 40 tokens."""
    texts = reference_sequences(made.reference)
    return [s[: max(3, len(s) - 6 * i)] for i, s in enumerate(texts)]


def _model(made: Made) -> Any:
    return load_model(made.checkpoint, torch.device("cpu"))


def _weight(model: Any, name: str) -> torch.Tensor:
    return model.get_submodule(module_name(name)).weight


def _kept(made: Made, name: str, share: float) -> torch.Tensor:
    return kept_weights(torch.from_numpy(made.weights(name)).abs(), share)


def _pruned(
    made: Made, names: Sequence[str], share: float = 0.6, type_name: str = "F16", **others: Any
) -> dict[str, Pruned]:
    return {
        n: Pruned(
            Treatment(type_name, share),
            torch.from_numpy(made.weights(n)),
            _kept(made, n, share),
            others.get("outputs"),
            others.get("token_weights"),
        )
        for n in names
    }


def _with_zeros(made: Made, pruned: Mapping[str, Pruned]) -> Any:
    """The model with nothing but the zeros set."""
    student = _model(made)
    for name, item in pruned.items():
        _weight(student, name).mul_(item.kept)
    return student


def _blocks(made: Made) -> list[str]:
    return [c.name for c in made.components if c.in_block]


@torch.no_grad()
def _inputs(model: Any, sequences: Sequence[Sequence[int]], *modules: str) -> list[torch.Tensor]:
    """Float64 inputs of modules over all tokens, each sequence run alone through the whole model."""
    inputs: list[list[torch.Tensor]] = [[] for _ in modules]
    hooks = [
        model.get_submodule(m).register_forward_pre_hook(
            lambda _, args, into=into: into.append(args[0][0].double())
        )
        for m, into in zip(modules, inputs, strict=True)
    ]
    for ids in sequences:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in inputs]


@torch.no_grad()
def _streams(model: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What each layer leaves, over all tokens."""
    names = [f"model.layers.{i}" for i in range(1, len(model.model.layers))]
    return _inputs(model, sequences, *names, "model.norm")


@pytest.mark.parametrize("type_name", ["F16", "Q8_0"])
def test_zeros_blocks_and_what_is_left_alone(
    made: Made, sequences: list[list[int]], type_name: str
) -> None:
    names = ["blk.0.attn_k", "blk.0.ffn_down", "blk.1.attn_output", "blk.1.ffn_gate"]
    pruned = _pruned(made, names, 0.7, type_name)
    original, student = _model(made), _with_zeros(made, pruned)
    progress: list[int] = []
    fitted = prune_sequentially(original, student, pruned, sequences, progress.append)
    assert progress == [1] * made.checkpoint.config.layers
    assert set(fitted) == set(names)
    for name, (blocks, values) in fitted.items():
        kept = pruned[name].kept
        assert not values[~kept].any()
        nearly_none = 1e-3 if type_name == "F16" else 0.03  # Q8_0 rounds small ones to zero
        assert float((values[kept] == 0).float().mean()) < nearly_none
        assert np.array_equal(ggml.dequantize(type_name, blocks, kept.shape[1]), values.numpy())
        assert torch.equal(_weight(student, name), values)
    untouched = _model(made).state_dict()
    changed = {module_name(n) + ".weight" for n in names}
    for model, different in ((original, set()), (student, changed)):
        state = model.state_dict()
        assert {k for k in state if not torch.equal(state[k], untouched[k])} == different


def test_residual_streams_are_nearer_than_with_each_matrix_fitted_alone(
    made: Made, sequences: list[list[int]]
) -> None:
    names = _blocks(made)
    pruned = _pruned(made, names, 0.7)
    original, plain, alone = _model(made), _with_zeros(made, pruned), _model(made)
    for name, item in pruned.items():
        (x,) = _inputs(original, sequences, module_name(name))
        feedback = DampedHessian((x.T @ x / len(x)).float(), damping_for(len(x), x.shape[1]))
        importance = torch.ones(x.shape[1])
        # The same masks, those of the magnitudes.
        made_alone = fit_masks(
            item.weights, [item.treatment], feedback, None, importance, "magnitude"
        )
        assert torch.equal(made_alone[0][1] != 0, item.kept)
        _weight(alone, name).copy_(made_alone[0][1])
    student = _with_zeros(made, pruned)
    prune_sequentially(original, student, pruned, sequences)
    wanted = _streams(original, sequences)

    def distances(model: Any) -> list[float]:
        streams = _streams(model, sequences)
        return [float((a - b).norm() / b.norm()) for a, b in zip(streams, wanted, strict=True)]

    ordered, each, zeros = distances(student), distances(alone), distances(plain)
    assert len(ordered) == made.checkpoint.config.layers
    for layer, (a, b, c) in enumerate(zip(ordered, each, zeros, strict=True)):
        assert a < 0.95 * b < 0.95 * c, (layer, ordered, each, zeros)


def _damaged(made: Made) -> Any:
    """A student whose first layer is wrong, so that what the second is fed differs."""
    student = _model(made)
    for name in ("blk.0.attn_v", "blk.0.ffn_down"):
        _weight(student, name).mul_(_kept(made, name, 0.5))
    return student


def _least_squares(
    item: Pruned, was: torch.Tensor, now: torch.Tensor, missing: torch.Tensor | None
) -> torch.Tensor:
    """Row by row the kept weights q that make sum_t v_t (y_t - q x_t)^2 + d |w - q|^2 least."""
    tokens, width = now.shape
    v = torch.ones(tokens) if item.token_weights is None else item.token_weights
    damping = damping_for(effective_tokens(v), width)
    v = (v / v.sum()).double()
    damping *= float((v[:, None] * now.square()).sum(0).mean())
    weights = item.weights.double()
    outputs = was @ weights.T + (0 if missing is None else missing)
    system = torch.cat([v.sqrt()[:, None] * now, damping**0.5 * torch.eye(width).double()])
    sides = torch.cat([v.sqrt()[:, None] * outputs, damping**0.5 * weights.T])
    values = torch.zeros_like(weights)
    for row in range(len(weights)):
        at = item.kept[row]
        values[row, at] = torch.linalg.lstsq(system[:, at], sides[:, row, None]).solution[:, 0]
    return values


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("blk.1.attn_k", None),
        ("blk.1.attn_output", "input_layernorm"),
        ("blk.1.ffn_up", None),
        ("blk.1.ffn_down", "post_attention_layernorm"),
    ],
)
def test_one_matrix_against_least_squares(
    made: Made,
    sequences: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    norm: str | None,
    weighted: bool,
) -> None:
    monkeypatch.setattr(module, "refit", partial(refit, steps=300))  # to the end
    random = torch.Generator().manual_seed(1)
    weights = torch.rand(sum(map(len, sequences)), generator=random).square()
    (item,) = _pruned(made, [name], token_weights=weights if weighted else None).values()
    original, student = _model(made), _damaged(made)
    site = module_name(name)
    sites = [site] if norm is None else [site, f"model.layers.1.{norm}"]
    was, now = _inputs(original, sequences, *sites), _inputs(student, sequences, *sites)
    assert float((was[0] - now[0]).norm() / was[0].norm()) > 0.02
    _weight(student, name).mul_(item.kept)  # comes after its inputs
    wanted = _least_squares(item, was[0], now[0], None if norm is None else was[1] - now[1])
    fitted = prune_sequentially(original, student, {name: item}, sequences)[name][1]
    moved = float((wanted - item.weights * item.kept).norm())
    assert moved > 0.05 * float(wanted.norm())
    assert float((fitted - wanted).norm()) < 0.01 * moved + 1e-3 * float(wanted.norm())


def test_rows_make_up_for_each_other(
    made: Made, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With moments of the outputs, against one dense system of all weights that are kept."""
    monkeypatch.setattr(module, "refit", partial(refit, steps=2000))
    name = "blk.1.attn_k"
    rows, width = made.weights(name).shape
    random = torch.Generator().manual_seed(2)
    root = torch.randn(rows + 20, rows, generator=random)
    outputs = DampedHessian(root.T @ root, 0.1)
    kept = kept_weights(torch.rand(rows, width, generator=random), 1 - 6 / width)
    assert int(kept.sum()) == 6 * rows
    weights = torch.from_numpy(made.weights(name))
    item = Pruned(Treatment("F16", 0.9), weights, kept, outputs)
    original, student = _model(made), _damaged(made)
    (was,), (now,) = (_inputs(m, sequences, module_name(name)) for m in (original, student))
    _weight(student, name).mul_(kept)
    h = now.T @ now / len(now)
    damping = damping_for(len(now), width) * float(h.diagonal().mean())
    right = weights.double() @ (was.T @ now / len(now)) + damping * weights.double()
    h.diagonal().add_(damping)
    g = outputs.damped.double()
    r, c = kept.nonzero(as_tuple=True)
    system = g[r][:, r] * h[c][:, c]
    solved = torch.linalg.solve(system, (g @ right)[r, c])
    fitted = prune_sequentially(original, student, {name: item}, sequences)[name][1]
    assert float((fitted[r, c] - solved).norm() / solved.norm()) < 5e-3
    alone = _least_squares(item, was, now, None)[r, c]
    assert float((alone - solved).norm() / solved.norm()) > 0.1


def test_padding_and_batches_do_not_matter(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long and a short sequence, the short one not the first in length's order, and tokens that
    count unlike, so that mixing them up would show."""
    texts = sorted(reference_sequences(made.reference), key=len)
    sequences = [texts[-1], texts[0][:5], texts[-2][:12]]
    random = torch.Generator().manual_seed(3)
    weights = torch.rand(sum(map(len, sequences)), generator=random)
    names = ["blk.0.attn_q", "blk.0.ffn_down", "blk.1.attn_output"]
    pruned = _pruned(made, names, token_weights=weights)
    results = []
    for tokens in (1, 2048):
        monkeypatch.setattr(module, "BATCH_TOKENS", tokens)
        fitted = prune_sequentially(_model(made), _with_zeros(made, pruned), pruned, sequences)
        results.append({name: values for name, (_, values) in fitted.items()})
    for name in names:
        one, two = results[0][name], results[1][name]
        assert float((one - two).norm() / one.norm()) < 1e-4, name
