"""Zeros by score, and that the quantizers keep them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.formats.ggml_types import SPARSE_TYPES
from edge_dtm.formats.plan import SPARSE_LEVELS, Treatment
from edge_dtm.host.quantize.treat import prune_rows, treat, treated_values
from edge_dtm.llamacpp import ggml


def matrix(seed, rows=24, row_length=256):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(rows, row_length)).astype(np.float32)
    return weights, rng.gamma(0.3, size=row_length).astype(np.float32)


def brute_prune(weights, importance, count):
    """The count columns of least w^2 x^2 of each row, the lower column first among equals."""
    out = weights.copy()
    for row in out:
        scores = [
            (np.float32(w * w) * (np.float32(1) if importance is None else importance[j]), j)
            for j, w in enumerate(row)
        ]
        for _, j in sorted(scores)[:count]:
            row[j] = 0
    return out


@pytest.mark.parametrize("zero_share", SPARSE_LEVELS)
@pytest.mark.parametrize("with_importance", [True, False])
def test_lowest_scores_are_pruned(zero_share, with_importance):
    weights, importance = matrix(1, rows=6)
    importance = importance if with_importance else None
    before = weights.copy()
    pruned = prune_rows(weights, importance, zero_share)
    np.testing.assert_array_equal(pruned, brute_prune(weights, importance, round(256 * zero_share)))
    np.testing.assert_array_equal(weights, before)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 1000))
def test_share_is_exact_in_every_row(row_length, zero_share, seed):
    weights, importance = matrix(seed, rows=3, row_length=row_length)
    pruned = prune_rows(weights, importance, zero_share)
    assert (pruned == 0).sum(axis=1).tolist() == [round(row_length * zero_share)] * 3
    kept = pruned != 0
    np.testing.assert_array_equal(pruned[kept], weights[kept])


@pytest.mark.parametrize("type_name", SPARSE_TYPES)
@pytest.mark.parametrize("zero_share", SPARSE_LEVELS)
def test_zeros_survive_the_quantizer(type_name, zero_share):
    weights, importance = matrix(2)
    pruned = prune_rows(weights, importance, zero_share)
    values = treated_values(weights, Treatment(type_name, zero_share), importance)
    assert values.dtype == np.float32
    assert not values[pruned == 0].any()
    # Half a step of Q8_0, whose scale is at most the largest weight over 127.
    assert np.abs(values - pruned).max() <= np.abs(weights).max() / 127


def test_without_zeros_treat_is_the_plain_quantizer():
    weights, importance = matrix(3)
    np.testing.assert_array_equal(
        treat(weights, Treatment("Q4_K"), importance), ggml.quantize("Q4_K", weights, importance)
    )
