"""FDT and SDT against their definitions, spelled out as loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.core import metrics


def brute_fdt(reference, candidate, length):
    for t in range(length):
        if reference[t] != candidate[t]:
            return t
    return length


def brute_sdt(reference, candidate, lengths):
    different = total = 0
    for row, length in enumerate(lengths):
        for t in range(length):
            total += 1
            different += reference[row][t] != candidate[row][t]
    return different / total if total else 0.0


@st.composite
def token_pairs(draw):
    sequences = draw(st.integers(1, 6))
    tokens = draw(st.integers(1, 9))
    ids = st.lists(
        st.lists(st.integers(0, 2), min_size=tokens, max_size=tokens),
        min_size=sequences,
        max_size=sequences,
    )
    lengths = draw(st.lists(st.integers(0, tokens), min_size=sequences, max_size=sequences))
    return np.array(draw(ids)), np.array(draw(ids)), np.array(lengths)


def random_pair(seed, sequences=40, tokens=32, rate=0.1):
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, 1000, (sequences, tokens))
    candidate = np.where(rng.random(reference.shape) < rate, reference + 1, reference)
    return reference, candidate, rng.integers(1, tokens + 1, sequences)


@settings(max_examples=60, deadline=None)
@given(token_pairs())
def test_compare_equals_the_definitions(pair):
    reference, candidate, lengths = pair
    result = metrics.compare(reference, candidate, lengths)
    first = [brute_fdt(r, c, n) for r, c, n in zip(reference, candidate, lengths, strict=True)]
    assert result.sdt.value == pytest.approx(brute_sdt(reference, candidate, lengths))
    assert result.fdt.value == pytest.approx(sum(first) / len(first))
    assert result.sequences == len(lengths)
    assert result.tokens == sum(lengths)
    assert result.divergent_tokens == round(result.sdt.value * result.tokens)
    assert result.near_tie_share == 0
    identical = sum(f == n for f, n in zip(first, lengths, strict=True)) / len(first)
    assert result.identical_share == pytest.approx(identical)
    assert result == metrics.compare(reference, candidate, lengths), "deterministic"
    for interval in (result.sdt, result.fdt):
        assert interval.low <= interval.value + 1e-12
        assert interval.value <= interval.high + 1e-12


def test_what_lies_beyond_a_length_changes_nothing():
    reference, candidate, lengths = random_pair(1)
    beyond = np.arange(reference.shape[1])[None, :] >= lengths[:, None]
    changed = np.where(beyond, -1, candidate)
    assert metrics.compare(reference, candidate, lengths) == metrics.compare(
        reference, changed, lengths
    )


def test_no_sequences():
    empty = np.zeros((0, 4), dtype=int)
    result = metrics.compare(empty, empty, np.zeros(0, dtype=int))
    assert (result.sequences, result.tokens, result.sdt.value, result.fdt.value) == (0, 0, 0, 0)


def test_sdt_interval_has_the_width_of_the_normal_approximation():
    # Independent positions and equal lengths, so the standard error is that of a proportion.
    sequences, tokens, rate = 400, 25, 0.2
    reference, candidate, _ = random_pair(4, sequences, tokens, rate)
    interval = metrics.compare(reference, candidate, np.full(sequences, tokens)).sdt
    p = interval.value
    expected = 2 * 1.96 * math.sqrt(p * (1 - p) / (sequences * tokens))
    assert interval.high - interval.low == pytest.approx(expected, rel=0.2)


def test_near_ties_are_divergences_within_the_margin():
    reference = np.array([[1, 1, 1, 1]])
    candidate = np.array([[2, 2, 1, 2]])
    margins = np.array([[0.1, 0.5, 0.1, 0.2]], dtype=np.float32)
    lengths = np.array([3])
    result = metrics.compare(reference, candidate, lengths, margins, near_tie_margin=0.25)
    assert result.near_tie_share == pytest.approx(1 / 3)
    assert result.near_tie_margin == 0.25
    assert result.to_json()["sdt"]["value"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("candidate_shape", "lengths"),
    [((2, 4), [3, 3]), ((2, 3), [3]), ((6,), [3, 3])],
)
def test_shapes_that_do_not_fit_are_refused(candidate_shape, lengths):
    with pytest.raises(ValueError, match=r"shape|length"):
        metrics.divergent_mask(
            np.zeros((2, 3), dtype=int), np.zeros(candidate_shape, dtype=int), np.array(lengths)
        )


def test_perplexity_of_equal_chances_is_their_number():
    log_probabilities = np.full((2, 4), -math.log(7))
    log_probabilities[0, 3] = -math.inf  # beyond the length
    assert metrics.perplexity(log_probabilities, np.array([3, 4])) == pytest.approx(7)


def test_kl_is_that_of_the_renormalized_top():
    host, device = np.random.default_rng(8).normal(size=(2, 5, 8))
    p, q = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) for logits in (host, device))
    assert metrics.top_kl(host, device) == pytest.approx((p * np.log(p / q)).sum(axis=1))
    assert metrics.top_kl(host, host + 5) == pytest.approx(0, abs=1e-12)
