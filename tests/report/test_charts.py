"""The page's charts: what is computed before anything is drawn."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core.metrics import Interval
from edge_dtm.report import charts


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40))
def test_survival_of_equal_lengths_is_the_plain_share(first: list[int]) -> None:
    result = charts.survival(first, [20] * len(first))
    plain = [sum(f >= t for f in first) / len(first) for t in range(21)]
    assert result == pytest.approx(plain[: len(result)])
    assert not any(plain[len(result) :])
    assert result[1:].sum() == pytest.approx(np.mean(first)), "the area below it is the mean FDT"


def test_survival_where_sequences_end() -> None:
    # Of two, one ends undiverged after 1 token; the other alone is at risk then, and diverges.
    assert charts.survival([1, 2], [1, 4]).tolist() == [1.0, 1.0, 1.0, 0.0]
    # The share of those that have ended is not lost: 2 of 3, then 1 of 2 of the rest.
    assert charts.survival([0, 1, 1, 2], [2, 1, 2, 2]) == pytest.approx([1, 3 / 4, 3 / 8])
    assert charts.survival([], []).tolist() == [1.0]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_bins_count_everything_once(counts: list[int]) -> None:
    result = charts.bins(counts)
    assert sum(n for *_, n in result) == len(counts)
    assert result[0] == (0, 0, counts.count(0))
    assert len(result) <= 12
    assert all(a[1] + 1 == b[0] for a, b in pairwise(result))


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    result = charts.ticks(low, low + span)
    assert 2 <= len(result) <= 7
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in result)


def test_log_ticks() -> None:
    assert charts.log_ticks(0.008, 0.3) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2])
    assert charts.log_ticks(1e-5, 1.0) == pytest.approx([10.0**p for p in range(-5, 1)])


def test_the_frontier_without_divergence() -> None:
    ours = charts.MeasuredFile("ours", 1e8, Interval(0.0, 0.0, 0.0))
    drawn = charts.frontier([(1e8, 0.0)], 0.0, [ours], 0.0).drawing
    assert 'class="dot"' in drawn and "nan" not in drawn
