"""Zeros fitted in the order of the blocks, against dense least squares on inputs of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from conftest import SEED, Made

from edge_dtm.formats.plan import Treatment
from edge_dtm.host.blocks import sequential_pruning as module
from edge_dtm.host.blocks.sequential_pruning import Pruned, prune_sequentially
from edge_dtm.host.blocks.text import Text
from edge_dtm.host.checkpoint.derived import DerivedCheckpoint
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.distill.evaluate import check, check_llama
from edge_dtm.host.quantize.hessian import DampedHessian, damping_for, effective_tokens
from edge_dtm.host.quantize.masks import fit_masks, kept_weights, refit
from edge_dtm.llamacpp import ggml

CPU = torch.device("cpu")
Values = dict[str, torch.Tensor]


class _Changed(DerivedCheckpoint):
    """change: component -> other weights."""

    def _read(self, name: str) -> Any:
        stem = name.removesuffix(".weight")
        return self._change[stem].numpy() if stem in self._change else self.original.hf_tensor(name)


@pytest.fixture(scope="module")
def text(made: Made) -> Text:
    """Of unlike lengths: 3 to some 40 tokens; the first two sequences are not fitted to."""
    lengths = np.maximum(1, made.reference.generated_lengths - 3 * np.arange(8, dtype=np.int32))
    return Text(replace(made.reference, generated_lengths=lengths), 2, SEED)


def _sequences(text: Text) -> Sequence[Sequence[int]]:
    return text.sequences[text.measured :]


def _model(made: Made, change: Values | None = None) -> Any:
    return load_model(_Changed(made.checkpoint, change or {}), CPU)


def _weights(made: Made, name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(made.weights(name)))


def _kept(made: Made, name: str, share: float = 0.6) -> torch.Tensor:
    return kept_weights(_weights(made, name).abs(), share)


def _zeros(made: Made, names: Sequence[str], share: float = 0.6) -> Values:
    return {n: _weights(made, n) * _kept(made, n, share) for n in names}


def _prune(
    made: Made,
    start: Values,
    names: Sequence[str],
    text: Text,
    type_name: str = "F16",
    cut: int = 0,
    **others: Any,
) -> dict[str, np.ndarray[Any, Any]]:
    """The blocks of `names`, whose zeros are those of `start`, after so many where it is cut."""
    outputs = others.get("outputs")
    item = Pruned(type_name, others.get("token_weights"), lambda: outputs)
    blocks: dict[str, np.ndarray[Any, Any]] = {}

    def keep(name: str, data: np.ndarray[Any, Any]) -> None:
        blocks[name] = data
        if len(blocks) == cut:
            raise KeyboardInterrupt

    models = (Llama(_Changed(made.checkpoint, change), CPU) for change in ({}, start))
    done: list[int] = []
    try:
        prune_sequentially(*models, text, lambda n: item if n in names else None, keep, done.append)
    except KeyboardInterrupt:
        return blocks
    assert done == list(range(made.config.layers))
    return blocks


def _values(made: Made, blocks: Mapping[str, Any], type_name: str = "F16") -> Values:
    return {
        n: torch.from_numpy(ggml.dequantize(type_name, data, made.component(n).row_length))
        for n, data in blocks.items()
    }


def _fitted(made: Made, start: Values, name: str, text: Text, **others: Any) -> torch.Tensor:
    return _values(made, _prune(made, start, [name], text, **others))[name]


@torch.no_grad()
def _inputs(model: Any, sequences: Sequence[Sequence[int]], *modules: str) -> list[torch.Tensor]:
    """Float64 inputs of modules over all tokens, each sequence run alone through the whole model of
    transformers."""
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
def test_zeros_stay_and_nothing_else_is_fitted(made: Made, text: Text, type_name: str) -> None:
    names = ["blk.0.attn_k", "blk.0.ffn_down", "blk.1.attn_output", "blk.1.ffn_gate"]
    start = _zeros(made, names, 0.7)
    blocks = _prune(made, start, names, text, type_name)
    assert list(blocks) == names
    for name, values in _values(made, blocks, type_name).items():
        kept = start[name] != 0
        assert not values[~kept].any()
        nearly_none = 1e-3 if type_name == "F16" else 0.03  # Q8_0 rounds small ones to zero
        assert float((values[kept] == 0).float().mean()) < nearly_none


@pytest.mark.parametrize("cut", [1, 3])
def test_a_cut_run_goes_on_to_the_same_bytes(made: Made, text: Text, cut: int) -> None:
    names = ["blk.0.attn_k", "blk.0.ffn_down", "blk.1.attn_q", "blk.1.attn_output"]
    start = _zeros(made, names)
    whole = _prune(made, start, names, text, "Q8_0")
    first = _prune(made, start, names, text, "Q8_0", cut)
    assert list(first) == names[:cut]
    there = {**start, **_values(made, first, "Q8_0")}
    both = {**first, **_prune(made, there, names[cut:], text, "Q8_0")}
    assert all(np.array_equal(both[n], whole[n]) for n in names)


def test_residual_streams_are_nearer_than_with_each_matrix_fitted_alone(
    made: Made, text: Text
) -> None:
    names = [c.name for c in made.components if c.in_block]
    original, sequences, start = _model(made), _sequences(text), _zeros(made, names, 0.7)
    alone = {}
    for name in names:
        (x,) = _inputs(original, sequences, module_name(name))
        feedback = DampedHessian((x.T @ x / len(x)).float(), damping_for(len(x), x.shape[1]))
        weights, importance = _weights(made, name), torch.ones(x.shape[1])
        # The same masks, those of the magnitudes.
        made_alone = fit_masks(
            weights, [Treatment("F16", 0.7)], feedback, None, importance, "magnitude"
        )
        alone[name] = made_alone[0][1]
        assert torch.equal(alone[name] != 0, _kept(made, name, 0.7))
    fitted = _values(made, _prune(made, start, names, text))
    wanted = _streams(original, sequences)

    def distances(change: Values) -> list[float]:
        streams = _streams(_model(made, change), sequences)
        return [float((a - b).norm() / b.norm()) for a, b in zip(streams, wanted, strict=True)]

    ordered, each, zeros = distances(fitted), distances(alone), distances(start)
    assert len(ordered) == made.config.layers
    for layer, (a, b, c) in enumerate(zip(ordered, each, zeros, strict=True)):
        assert a < 0.95 * b < 0.95 * c, (layer, ordered, each, zeros)


DAMAGED = ("blk.0.attn_v", "blk.0.ffn_down")  # so that what the second block is fed differs


def _least_squares(
    weights: torch.Tensor,
    kept: torch.Tensor,
    v: torch.Tensor,
    was: torch.Tensor,
    now: torch.Tensor,
    missing: torch.Tensor | None,
) -> torch.Tensor:
    """Row by row the kept weights q that make sum_t v_t (y_t - q x_t)^2 + d |w - q|^2 least."""
    width = now.shape[1]
    damping = damping_for(effective_tokens(v), width)
    v = (v / v.sum()).double()
    damping *= float((v[:, None] * now.square()).sum(0).mean())
    weights = weights.double()
    outputs = was @ weights.T + (0 if missing is None else missing)
    system = torch.cat([v.sqrt()[:, None] * now, damping**0.5 * torch.eye(width).double()])
    sides = torch.cat([v.sqrt()[:, None] * outputs, damping**0.5 * weights.T])
    values = torch.zeros_like(weights)
    for row in range(len(weights)):
        at = kept[row]
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
    text: Text,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    norm: str | None,
    weighted: bool,
) -> None:
    monkeypatch.setattr(module, "refit", partial(refit, steps=300))  # to the end
    random, sequences = torch.Generator().manual_seed(1), _sequences(text)
    v = torch.rand(sum(map(len, sequences)), generator=random).square()
    damage, kept, weights = _zeros(made, DAMAGED, 0.5), _kept(made, name), _weights(made, name)
    site = module_name(name)
    sites = [site] if norm is None else [site, f"model.layers.1.{norm}"]
    was, now = (_inputs(_model(made, c), sequences, *sites) for c in ({}, damage))
    assert float((was[0] - now[0]).norm() / was[0].norm()) > 0.02
    missing = None if norm is None else was[1] - now[1]
    wanted = _least_squares(
        weights, kept, v if weighted else torch.ones_like(v), was[0], now[0], missing
    )
    start = {**damage, name: weights * kept}
    fitted = _fitted(made, start, name, text, token_weights=v if weighted else None)
    moved = float((wanted - weights * kept).norm())
    assert moved > 0.05 * float(wanted.norm())
    assert float((fitted - wanted).norm()) < 0.01 * moved + 1e-3 * float(wanted.norm())


def test_rows_make_up_for_each_other(
    made: Made, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With moments of the outputs, against one dense system of all weights that are kept."""
    monkeypatch.setattr(module, "refit", partial(refit, steps=2000))
    name, damage = "blk.1.attn_k", _zeros(made, DAMAGED, 0.5)
    weights = _weights(made, name)
    rows, width = weights.shape
    random = torch.Generator().manual_seed(2)
    root = torch.randn(rows + 20, rows, generator=random)
    outputs = DampedHessian(root.T @ root, 0.1)
    kept = kept_weights(torch.rand(rows, width, generator=random), 1 - 6 / width)
    assert int(kept.sum()) == 6 * rows
    models = _model(made), _model(made, damage)
    (was,), (now,) = (_inputs(m, _sequences(text), module_name(name)) for m in models)
    h = now.T @ now / len(now)
    damping = damping_for(len(now), width) * float(h.diagonal().mean())
    right = weights.double() @ (was.T @ now / len(now)) + damping * weights.double()
    h.diagonal().add_(damping)
    g = outputs.damped.double()
    r, c = kept.nonzero(as_tuple=True)
    system = g[r][:, r] * h[c][:, c]
    solved = torch.linalg.solve(system, (g @ right)[r, c])
    start = {**damage, name: weights * kept}
    fitted = _fitted(made, start, name, text, outputs=outputs)
    assert float((fitted[r, c] - solved).norm() / solved.norm()) < 5e-3
    alone = _least_squares(weights, kept, torch.ones(len(now)), was, now, None)[r, c]
    assert float((alone - solved).norm() / solved.norm()) > 0.1


def test_padding_and_batches_do_not_matter(made: Made) -> None:
    """A long and a short sequence, the short one not the first in length's order, and tokens that
    count unlike, so that mixing them up would show."""
    rows = sorted(range(8), key=lambda i: len(made.text.sequences[i]))
    some = made.reference.rows(np.array([rows[-1], rows[0], rows[-2]]))
    some.generated_lengths[1:] = 1, 6
    names = ["blk.0.attn_q", "blk.0.ffn_down", "blk.1.attn_output"]
    start, results = _zeros(made, names), []
    for tokens in (1, 2048):
        text = Text(some, 0, SEED, tokens)
        assert len(text.batches) == (3 if tokens == 1 else 1)
        random = torch.Generator().manual_seed(3)
        weights = torch.rand(text.tokens, generator=random)
        results.append(_values(made, _prune(made, start, names, text, token_weights=weights)))
    for name in names:
        one, two = results[0][name], results[1][name]
        assert float((one - two).norm() / one.norm()) < 1e-4, name


def test_the_check_is_that_of_the_whole_model(made: Made) -> None:
    damaged = _zeros(made, DAMAGED, 0.9)
    whole = check(_model(made, damaged), made.reference)
    blocks = check_llama(Llama(_Changed(made.checkpoint, damaged), CPU), made.reference)
    assert whole.sdt > 0
    assert (blocks.sdt, blocks.fdt) == (whole.sdt, whole.fdt)
    assert blocks.perplexity == pytest.approx(whole.perplexity, rel=1e-4)
