"""The size search against devices whose true divergence is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.search.allocation import FrontierPoint
from edge_dtm.search.target import NEAR, TRIES, Attempt, Target, smallest

POINTS = [
    FrontierPoint(1.0, 20.0 / size**1.1, min(96.0, size / 20), size) for size in range(100, 1000)
]


def truth(sdt_factor: float, fdt_factor: float = 1.0) -> Callable[[int], Attempt]:
    """A device on which every prediction is wrong by a factor."""

    def attempt(limit: int) -> Attempt:
        p = [p for p in POINTS if p.size_bytes <= limit][-1]
        return Attempt(p.size_bytes, p.sdt, p.fdt, p.sdt * sdt_factor, p.fdt * fdt_factor)

    return attempt


@given(
    sdt=st.floats(0.02, 0.12),
    factor=st.floats(0.5, 1.6),
    fdt=st.one_of(st.none(), st.floats(5, 30)),
    fdt_factor=st.floats(0.7, 1.4),
)
@settings(max_examples=200)
def test_finds_the_smallest_size_that_meets_the_target(sdt, factor, fdt, fdt_factor):
    target = Target(sdt, fdt)
    wanted = [
        p.size_bytes for p in POINTS if target.met(p.sdt * factor, p.fdt * fdt_factor)
    ]  # what the device would really say
    best, tried = smallest(POINTS, target, truth(factor, fdt_factor), POINTS[-1].size_bytes)
    assert len(tried) <= TRIES
    assert len({a.size_bytes for a in tried}) == len(tried)
    if best is None:
        assert not wanted or tried[-1].size_bytes >= wanted[0] * (1 - 2 * NEAR)
        return
    assert target.met(best.sdt, best.fdt)
    assert wanted[0] <= best.size_bytes <= wanted[0] * (1 + 2 * NEAR) + 2


@pytest.mark.parametrize("limit", [300, 99])
def test_a_target_out_of_reach_has_no_answer(limit):
    best, tried = smallest(POINTS, Target(max_sdt=0.005), truth(1.0), limit)
    assert best is None
    assert all(a.size_bytes <= limit for a in tried)
    # The best there is was tried, so that the message can say how far off it is.
    assert bool(tried) == (limit >= 100) and (not tried or tried[0].size_bytes == limit)
