"""Masks against formulas, and the fit of what they keep against solving for it in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gptq import _moments, _objective, _weights

from edge_dtm.formats import ggml_types
from edge_dtm.formats.ggml_types import SPARSE_TYPES
from edge_dtm.formats.plan import SPARSE_LEVELS, Treatment
from edge_dtm.host.quantize.hessian import DampedHessian
from edge_dtm.host.quantize.masks import SCORES, fit_masks, kept_weights, prune_scores, refit
from edge_dtm.llamacpp import ggml

Array = np.ndarray[Any, Any]
Generator = np.random.Generator
LEVELS = [Treatment(t, s) for t in SPARSE_TYPES for s in (0.25, 0.5, 0.8)]


def _feedback(random: Generator, n: int) -> DampedHessian:
    return DampedHessian(_moments(random, n), 0.1)


def _squares(feedback: DampedHessian) -> torch.Tensor:
    return feedback.damped.diagonal().clone()


def _error(error: torch.Tensor, h: DampedHessian, g: DampedHessian | None = None) -> float:
    return _objective(error, h.damped, None if g is None else g.damped)


# --- which weights go -----------------------------------------------------------------------


def test_scores_are_their_formulas() -> None:
    random = np.random.default_rng(0)
    feedback, w = _feedback(random, 24), _weights(random, 5, 24)
    squares = random.uniform(0.1, 4, 24).astype(np.float32)
    inverse = np.linalg.inv(feedback.damped.double().numpy())
    size = np.abs(w.numpy())
    expected = {
        "magnitude": size,
        "activation": size * np.sqrt(squares),
        "saliency": size / np.sqrt(np.diag(inverse)),
    }
    assert set(expected) == set(SCORES)
    for kind, wanted in expected.items():
        ours = prune_scores(w, kind, feedback, torch.from_numpy(squares))
        assert np.allclose(ours.numpy(), wanted, rtol=1e-5), kind


@given(
    st.integers(1, 5),
    st.integers(1, 70),
    st.floats(0, 0.95),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_every_row_loses_the_same_number(
    rows: int, n: int, share: float, seed: int, coarse: bool
) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (rows, n)) if coarse else random.uniform(0, 1, (rows, n))
    kept = kept_weights(torch.from_numpy(scores.astype(np.float32)), share).numpy()
    assert kept.dtype == np.bool_ and kept.shape == (rows, n)
    count = round(share * n)
    assert ((~kept).sum(1) == count).all()
    for r in range(rows):
        order = sorted(range(n), key=lambda j: (scores[r, j].astype(np.float32), j))
        assert set(np.flatnonzero(~kept[r])) == set(order[:count])


# --- what the others become -----------------------------------------------------------------


def test_rows_alone_are_solved_for() -> None:
    """Row by row on its support: H_ss q_s = H_s w, and least squares of the inputs themselves."""
    random = np.random.default_rng(2)
    n, rows = 12, 5
    feedback, w = _feedback(random, n), _weights(random, rows, n)
    kept = torch.from_numpy(random.uniform(size=(rows, n)) < 0.6)
    ours = refit(w, kept, feedback, steps=300)
    h = feedback.damped.double()
    x = torch.linalg.cholesky(h).T  # inputs with those very moments
    for r in range(rows):
        s, target = kept[r], h @ w[r].double()
        solved = torch.linalg.solve(h[s][:, s], target[s])
        squares = torch.linalg.lstsq(x[:, s], (x @ w[r].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(solved, squares)
        torch.testing.assert_close(ours[r][s].double(), solved, atol=1e-5, rtol=1e-4)
        assert not ours[r][~s].any()


def test_rows_together_are_solved_for() -> None:
    """The normal equations of the whole matrix as one vector: (G x H) on the support."""
    random = np.random.default_rng(3)
    n, rows = 6, 4
    feedback, outputs, w = _feedback(random, n), _feedback(random, rows), _weights(random, rows, n)
    kept = torch.from_numpy(random.uniform(size=(rows, n)) < 0.5)
    ours = refit(w, kept, feedback, outputs, steps=300).double().numpy().reshape(-1)
    whole = np.kron(outputs.damped.double().numpy(), feedback.damped.double().numpy())
    s = kept.numpy().reshape(-1)
    target = whole @ w.double().numpy().reshape(-1)
    solved = np.linalg.solve(whole[np.ix_(s, s)], target[s])
    assert np.allclose(ours[s], solved, atol=1e-5, rtol=1e-4)
    assert not ours[~s].any()
    alone = refit(w, kept, feedback, steps=300).double().numpy().reshape(-1)
    assert np.abs(alone - ours).max() > 1e-3  # the other rows have a say


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(0, 15), st.booleans())
@settings(max_examples=40, deadline=None)
def test_never_worse_than_the_masked_weights(
    seed: int, share: float, steps: int, together: bool
) -> None:
    random = np.random.default_rng(seed)
    n, rows = int(random.integers(2, 40)), int(random.integers(1, 20))
    feedback, w = _feedback(random, n), _weights(random, rows, n)
    outputs = _feedback(random, rows) if together else None
    kept = torch.from_numpy(random.uniform(size=(rows, n)) < share)
    values = refit(w, kept, feedback, outputs, steps=steps)
    assert values.dtype == torch.float32 and not values[~kept].any()
    before = _error(w - w * kept, feedback, outputs)
    after = _error(w - values, feedback, outputs)
    assert after <= before * (1 + 1e-5) + 1e-12
    if steps and 0 < int(kept.sum()) < kept.numel():
        more = _error(w - refit(w, kept, feedback, outputs, steps=40), feedback, outputs)
        assert more <= after * (1 + 1e-5) + 1e-12  # each step of conjugate gradients gains


# --- the blocks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, DampedHessian, DampedHessian, torch.Tensor]:
    random = np.random.default_rng(6)
    feedback = _feedback(random, 160)
    return _weights(random, 70, 160), feedback, _feedback(random, 70), _squares(feedback)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("together", [False, True])
def test_the_bytes_are_the_values_and_zeros_stay(case: Any, together: bool, score: str) -> None:
    w, feedback, outputs, squares = case
    encoded = fit_masks(w, LEVELS, feedback, outputs if together else None, squares, score)
    assert len(encoded) == len(LEVELS)
    scores = prune_scores(w, score, feedback, squares)
    for t, (data, values) in zip(LEVELS, encoded, strict=True):
        assert data.dtype == np.uint8 and data.shape == (70, ggml_types.row_bytes(t.type, 160))
        assert np.array_equal(ggml.dequantize(t.type, data, 160), values.numpy()), t
        kept = kept_weights(scores, t.zero_share)
        assert ((~kept).sum(1) == round(160 * t.zero_share)).all()
        assert not values[~kept].any(), t


@pytest.mark.parametrize("rows", [1, 201])
@pytest.mark.parametrize("together", [False, True])
def test_a_level_alone_is_the_same(rows: int, together: bool) -> None:
    """So what is exported is what was measured among others."""
    random = np.random.default_rng(rows)
    feedback, w = _feedback(random, 288), _weights(random, rows, 288)
    outputs, squares = _feedback(random, rows) if together else None, _squares(feedback)
    every = [Treatment(t, s) for t in SPARSE_TYPES for s in SPARSE_LEVELS]
    encoded = fit_masks(w, every, feedback, outputs, squares)
    for t, (data, values) in zip(every, encoded, strict=True):
        for threads in (1, 2):
            ((alone, same),) = fit_masks(w, [t], feedback, outputs, squares, threads=threads)
            assert np.array_equal(alone, data), t
            assert torch.equal(same, values), t


@pytest.mark.parametrize("together", [False, True])
def test_the_error_is_lower_than_that_of_plain_pruning(case: Any, together: bool) -> None:
    """Plain: the same weights go, the others stay as they are and are rounded."""
    w, feedback, outputs, squares = case
    g = outputs if together else None
    scores = prune_scores(w, "activation", feedback, squares)
    for t, (_, values) in zip(LEVELS, fit_masks(w, LEVELS, feedback, g, squares), strict=True):
        pruned = (w * kept_weights(scores, t.zero_share)).numpy()
        rounded = ggml.quantize(t.type, pruned, squares.numpy())
        plain = torch.from_numpy(ggml.dequantize(t.type, rounded, 160))
        assert _error(w - values, feedback, g) < 0.9 * _error(w - plain, feedback, g), t
