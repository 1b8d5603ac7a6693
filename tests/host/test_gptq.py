"""Error feedback against numpy: the factors, the sweeps written out, and what they are to make
small computed from its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import ggml_types
from edge_dtm.formats.ggml_types import ALLOWED_TYPES
from edge_dtm.host.quantize.gptq import ROWS_AT_ONCE, gptq_quantize
from edge_dtm.host.quantize.hessian import (
    MIN_DAMPING,
    DampedHessian,
    input_hessian,
    local_error,
    scaled_gradients,
)
from edge_dtm.llamacpp import ggml

Array = np.ndarray[Any, Any]
TYPES = tuple(t for t in ALLOWED_TYPES if t != "F16")
SMALL_TYPES = tuple(t for t in TYPES if ggml_types.block_size(t) == 32)


def _moments(random: np.random.Generator, n: int, tokens: int = 0) -> torch.Tensor:
    """Second moments of inputs with correlated columns of very different sizes."""
    mixing = random.standard_normal((n, n)) / np.sqrt(n) + np.eye(n)
    x = random.standard_normal((tokens or 4 * n, n)) @ mixing
    x *= np.exp(random.standard_normal(n))
    return input_hessian(torch.from_numpy(x.astype(np.float32)), None)


def _weights(random: np.random.Generator, rows: int, n: int) -> torch.Tensor:
    w = random.standard_normal((rows, n)) * np.exp(random.standard_normal((rows, 1)) / 2)
    return torch.from_numpy((w / np.sqrt(n)).astype(np.float32))


def _plain(type_name: str, w: torch.Tensor, feedback: DampedHessian) -> torch.Tensor:
    data = ggml.quantize(type_name, w.numpy(), feedback.importance)
    return torch.from_numpy(ggml.dequantize(type_name, data, w.shape[1]))


def _objective(error: torch.Tensor, h: torch.Tensor, g: torch.Tensor | None = None) -> float:
    """tr(G E H E') by the definition, float64."""
    e, moments = error.double().numpy(), h.double().numpy()
    left = e if g is None else g.double().numpy() @ e
    return float(np.trace(left @ moments @ e.T))


# --- moments --------------------------------------------------------------------------------


def test_moments_are_those_of_loops() -> None:
    random = np.random.default_rng(0)
    x, v = random.standard_normal((9, 5)), random.uniform(0, 2, 9)
    g = random.standard_normal((9, 3))
    v[4] = 0  # a token that no margin hears of
    g[4] = 0
    h, plain, outer = np.zeros((5, 5)), np.zeros((5, 5)), np.zeros((3, 3))
    for t in range(9):
        h += v[t] * np.outer(x[t], x[t]) / v.sum()
        plain += np.outer(x[t], x[t]) / 9
        if v[t]:
            outer += np.outer(g[t], g[t]) / v[t]
    f32 = [torch.from_numpy(a.astype(np.float32)) for a in (x, v, g)]
    # float32 sums of nine terms
    assert np.allclose(input_hessian(f32[0], f32[1]).numpy(), h, rtol=1e-5, atol=1e-6)
    assert np.allclose(input_hessian(f32[0], None).numpy(), plain, rtol=1e-5, atol=1e-6)
    scaled = scaled_gradients(f32[2], f32[1])
    assert np.allclose((scaled.T @ scaled).numpy(), outer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_moments_that_are_not_finite(value: float) -> None:
    h = torch.eye(64)
    h[3, 5] = value
    with pytest.raises(EdgeDtmError, match="not finite") as caught:
        DampedHessian(h, 0.1)
    assert "\n" not in str(caught.value)


# --- sweeps ---------------------------------------------------------------------------------


def _obs(
    type_name: str, w: Array, h: Array, importance: Array, sweeps: int
) -> tuple[Array, list[Array]]:
    """Block-wise OBS, then block coordinate descent, float64 and without any factor: what is
    still free is set to its best real value by solving for it. Values after each stage."""
    n, block = w.shape[1], ggml_types.block_size(type_name)

    def rounded(target: Array, here: slice) -> Array:
        data = ggml.quantize(type_name, target.astype(np.float32), importance[here])
        return ggml.dequantize(type_name, data, block).astype(np.float64)

    q = np.zeros_like(w)
    best = w.copy()  # the free columns' best values, given the rounded ones
    for a in range(0, n, block):
        here, rest = slice(a, a + block), slice(a + block, n)
        q[:, here] = rounded(best[:, here], here)
        error = w[:, : rest.start] - q[:, : rest.start]
        best[:, rest] = w[:, rest] + error @ h[: rest.start, rest] @ np.linalg.inv(h[rest, rest])
    stages = [q.copy()]
    for _ in range(sweeps):
        for a in range(0, n, block):
            here = slice(a, a + block)
            others = np.r_[0:a, a + block : n]
            target = w[:, here] + (w - q)[:, others] @ h[np.ix_(others, range(a, a + block))] @ (
                np.linalg.inv(h[here, here])
            )
            trial = q.copy()
            trial[:, here] = rounded(target, here)
            new = np.einsum("ri,ij,rj->r", w - trial, h, w - trial)
            old = np.einsum("ri,ij,rj->r", w - q, h, w - q)
            q[new < old] = trial[new < old]
        stages.append(q.copy())
    return q, stages


@pytest.mark.parametrize(
    ("type_name", "n"), [("Q4_0", 160), ("Q5_1", 128), ("Q8_0", 96), ("Q4_K", 512)]
)
def test_sweeps_are_those_written_out(type_name: str, n: int) -> None:
    random = np.random.default_rng(3)
    feedback, w = DampedHessian(_moments(random, n), 0.1), _weights(random, 24, n)
    h = feedback.damped.double().numpy()
    _, stages = _obs(type_name, w.double().numpy(), h, feedback.importance, 2)
    for sweeps, expected in enumerate(stages):
        ((_, values),) = gptq_quantize(w, [type_name], feedback, None, sweeps, threads=1)
        ours = values.double().numpy()
        # A target in float32 may round to the other side of a tie, and the blocks behind follow.
        same = (np.abs(ours - expected) < 1e-6).all(1)
        assert same.mean() > 0.8, (sweeps, same.mean())
        errors = [
            np.einsum("ri,ij,rj->r", e, h, e) for e in (w.numpy() - ours, w.numpy() - expected)
        ]
        assert errors[0].sum() == pytest.approx(errors[1].sum(), rel=0.02)


# --- the result -----------------------------------------------------------------------------


Case = tuple[torch.Tensor, DampedHessian, DampedHessian]


def _both(random: np.random.Generator, rows: int, n: int) -> Case:
    w, h, g = _weights(random, rows, n), _moments(random, n), _moments(random, rows)
    return w, DampedHessian(h, 0.1), DampedHessian(g, 0.1)


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_bytes_are_blocks_of_the_values(two_sided: bool) -> None:
    rows, n = 70, 512
    w, feedback, outputs = _both(np.random.default_rng(4), rows, n)
    encoded = gptq_quantize(w, TYPES, feedback, outputs if two_sided else None)
    assert {"Q4_K", "Q5_K", "Q6_K"} <= set(TYPES) and len(encoded) == len(TYPES)
    for type_name, (data, values) in zip(TYPES, encoded, strict=True):
        assert data.dtype == np.uint8 and data.shape == (rows, ggml_types.row_bytes(type_name, n))
        assert np.array_equal(ggml.dequantize(type_name, data, n), values.numpy()), type_name
        assert np.abs(values.numpy() - w.numpy()).max() < np.abs(w.numpy()).max()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=4, deadline=None)
def test_it_makes_small_what_it_is_to_make_small(seed: int) -> None:
    w, feedback, outputs = _both(np.random.default_rng(seed), 64, 128)
    h, g = feedback.damped, outputs.damped
    alone = gptq_quantize(w, SMALL_TYPES, feedback)
    together = gptq_quantize(w, SMALL_TYPES, feedback, outputs)
    shares = []
    for name, (_, one), (_, two) in zip(SMALL_TYPES, alone, together, strict=True):
        assert _objective(w - one, h) < _objective(w - _plain(name, w, feedback), h), name
        shares.append(_objective(w - two, h, g) / _objective(w - one, h, g))
    # Greedy rounding promises nothing about one matrix and type, but over all of them.
    assert np.log(shares).mean() < 0 and max(shares) < 1.3


def test_local_error_is_the_trace() -> None:
    random = np.random.default_rng(6)
    e, h, g = _weights(random, 20, 64), _moments(random, 64), _weights(random, 50, 20)
    assert local_error(e, h) == pytest.approx(_objective(e, h), rel=1e-5)
    assert local_error(e, h, g) == pytest.approx(_objective(e, h, g.T @ g), rel=1e-5)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("rows", [1, 33, 100, ROWS_AT_ONCE + 9])
def test_the_same_whatever_the_threads(two_sided: bool, rows: int) -> None:
    w, feedback, outputs = _both(np.random.default_rng(8), rows, 96)
    given_types = ["Q4_0", "IQ4_NL", "Q8_0"]
    first: Sequence[Any] | None = None
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        encoded = gptq_quantize(
            w, given_types, feedback, outputs if two_sided else None, 1, threads
        )
        first = first or encoded
        for (data, values), (same, equal) in zip(encoded, first, strict=True):
            assert np.array_equal(data, same) and torch.equal(values, equal)
    assert torch.get_num_threads() == before


def test_rows_without_correlation_are_rounded_alone() -> None:
    """With G a multiple of the identity the rows have nothing to say to each other."""
    random = np.random.default_rng(10)
    w, feedback = _weights(random, 70, 128), DampedHessian(_moments(random, 128), 0.1)
    outputs = DampedHessian(torch.eye(70), 0.5)
    ((alone, _),) = gptq_quantize(w, ["Q4_0"], feedback)
    ((together, _),) = gptq_quantize(w, ["Q4_0"], feedback, outputs)
    # Products of another number of rows may differ in the last bit, and a tie turn.
    assert (alone == together).mean() > 0.995


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K"])
def test_weights_on_the_grid_stay_there(type_name: str, two_sided: bool) -> None:
    """Rounding again what was rounded already is (nearly) exact; feedback must not undo that."""
    w, feedback, outputs = _both(np.random.default_rng(11), 64, 512)
    on_grid = _plain(type_name, w, feedback)
    h, g = feedback.damped, outputs.damped if two_sided else None
    scale = _objective(w - on_grid, h, g)
    plain = _objective(on_grid - _plain(type_name, on_grid, feedback), h, g)
    ((_, values),) = gptq_quantize(on_grid, [type_name], feedback, outputs if two_sided else None)
    ours = _objective(on_grid - values, h, g)
    assert ours <= plain + 1e-3 * scale


def test_a_dead_input_and_a_zero_row_do_no_harm() -> None:
    random = np.random.default_rng(12)
    h = _moments(random, 96)
    h[10] = h[:, 10] = 0
    w = _weights(random, 40, 96)
    w[7] = 0
    feedback = DampedHessian(h, MIN_DAMPING)
    for type_name, (_, values) in zip(
        SMALL_TYPES, gptq_quantize(w, SMALL_TYPES, feedback), strict=True
    ):
        assert torch.isfinite(values).all(), type_name
        assert not values[7].any(), type_name


# --- zeros that are held, and other weights for each type -----------------------------------

HELD_TYPES = ["Q8_0", "Q4_0", "Q5_0", "Q6_K", "Q8_0"]


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("rows", [40, ROWS_AT_ONCE + 9])
def test_zeros_are_held(two_sided: bool, rows: int) -> None:
    random = np.random.default_rng(13)
    w, feedback, outputs = _both(random, rows, 512)
    kept = torch.from_numpy(random.uniform(size=(len(HELD_TYPES), rows, 512)) < 0.6)
    encoded = gptq_quantize(w, HELD_TYPES, feedback, outputs if two_sided else None, kept=kept)
    h, g = feedback.damped, outputs.damped if two_sided else None
    for type_name, mask, (data, values) in zip(HELD_TYPES, kept, encoded, strict=True):
        assert np.array_equal(ggml.dequantize(type_name, data, 512), values.numpy())
        assert not values[~mask].any(), type_name
        # The others make up for the zeros, which plain rounding does not know of.
        plain = _plain(type_name, w * mask, feedback)
        assert _objective(w - values, h, g) < 0.9 * _objective(w - plain, h, g), type_name
    assert not torch.equal(encoded[0][1], encoded[4][1])  # one type, two masks


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("rows", [33, ROWS_AT_ONCE + 9])
def test_other_weights_for_each_type(two_sided: bool, rows: int) -> None:
    random = np.random.default_rng(15)
    w, feedback, outputs = _both(random, rows, 256)
    o = outputs if two_sided else None
    given_types = ["Q8_0", "Q4_K", "Q4_0", "Q8_0"]
    several = torch.stack([w, 2 * w, w.flip(0), -w])
    kept = torch.from_numpy(random.uniform(size=several.shape) < 0.7)
    for mask in (None, kept):
        together = gptq_quantize(several, given_types, feedback, o, kept=mask)
        for j, (data, values) in enumerate(together):
            own = None if mask is None else mask[j : j + 1]
            ((alone, equal),) = gptq_quantize(several[j], [given_types[j]], feedback, o, kept=own)
            assert np.array_equal(data, alone) and torch.equal(values, equal), (j, mask is None)
