"""The search against brute force over all plans, the predictor against drawn normals."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import (
    Component,
    Plan,
    Treatment,
    candidate_treatments,
    least_bytes_with_zeros,
)
from edge_dtm.search.allocation import convex_hull, frontier, least_divergent_share, search
from edge_dtm.search.cost_table import CostTable, Predictor

TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_0", "Q4_0")


@st.composite
def tables(draw):
    """Small tables with any costs at all, also ones that rise with the bytes."""
    components, treatments, costs = [], [], []
    for i in range(draw(st.integers(1, 4))):
        components.append(Component(f"blk.{i}.ffn_up", draw(st.integers(1, 6)), 256))
        types = draw(st.lists(st.sampled_from(TYPES), min_size=1, max_size=5, unique=True))
        treatments.append(tuple(Treatment(t) for t in types))
        # Whole numbers, so that sums are exact.
        costs.append(tuple(float(draw(st.integers(0, 60))) for _ in types))
    return CostTable(tuple(components), tuple(treatments), tuple(costs), 1000)


def options_of(table):
    """(bytes, cost) of every treatment, a list a component."""
    return [
        [(c.size_bytes(t), cost) for t, cost in zip(ts, cs, strict=True)]
        for c, ts, cs in zip(table.components, table.treatments, table.costs, strict=True)
    ]


def all_plans(table):
    """(bytes, cost) of every combination."""
    return [
        (table.fixed_bytes + sum(size for size, _ in chosen), sum(cost for _, cost in chosen))
        for chosen in itertools.product(*options_of(table))
    ]


def linear_relaxation(table, max_bytes):
    """Least cost when treatments may be mixed: the Lagrange dual, at all slopes between two."""
    options = options_of(table)
    prices = {0.0} | {
        (cost_a - cost_b) / (b - a)
        for option in options
        for (a, cost_a), (b, cost_b) in itertools.permutations(option, 2)
        if b > a and cost_a > cost_b
    }
    return max(
        sum(min(cost + price * size for size, cost in option) for option in options)
        - price * (max_bytes - table.fixed_bytes)
        for price in prices
    )


def brute_hull(options):
    """Points that no other point dominates and no segment between two others lies below."""
    points = sorted({(s, c) for s, c in options if math.isfinite(c)})
    hull = []
    for s, c in points:
        if any((a, x) != (s, c) and a <= s and x <= c for a, x in points):
            continue
        if any(
            a < s < b and (x * (b - s) + y * (s - a)) <= c * (b - a)
            for a, x in points
            for b, y in points
        ):
            continue
        hull.append((s, c))
    return hull


def largest_step(table):
    hulls = map(brute_hull, options_of(table))
    return max((a[1] - b[1] for hull in hulls for a, b in itertools.pairwise(hull)), default=0.0)


points_lists = st.lists(
    st.tuples(st.integers(1, 30), st.sampled_from([*map(float, range(20)), math.inf, math.nan])),
    max_size=9,
)


@given(points_lists)
def test_hull_equals_brute_force(points):
    sizes, costs = [p[0] for p in points], [p[1] for p in points]
    hull = convex_hull(sizes, costs)
    assert [(sizes[i], costs[i]) for i in hull] == brute_hull(points)


@settings(max_examples=150, deadline=None)
@given(tables(), st.floats(0, 1))
def test_search_is_optimal_up_to_one_step(table, position):
    plans = all_plans(table)
    smallest, largest = min(s for s, _ in plans), max(s for s, _ in plans)
    budget = round(smallest + position * (largest - smallest))
    plan = search(table, budget)
    assert plan.size_bytes <= budget
    cost = table.cost(plan)
    optimum = min(c for s, c in plans if s <= budget)
    relaxed = linear_relaxation(table, budget)
    assert relaxed - 1e-9 <= optimum <= cost <= relaxed + largest_step(table) + 1e-9
    # No step that still fits is left out.
    chosen = zip(table.components, plan.treatments, options_of(table), strict=True)
    for component, treatment, options in chosen:
        size = component.size_bytes(treatment)
        larger = [s for s, _ in brute_hull(options) if s > size]
        assert not larger or plan.size_bytes - size + larger[0] > budget


@given(tables())
def test_budget_below_the_smallest_plan(table):
    smallest = min(s for s, _ in all_plans(table))
    with pytest.raises(EdgeDtmError, match="raise --max-bytes by 1 "):
        search(table, smallest - 1)
    assert search(table, smallest).size_bytes == smallest


# --- zeros ---------------------------------------------------------------------------------------


def sparse_table(seed, components=6):
    """Costs as real ones: fewer bits and more zeros cost more, convexly, by component factors."""
    rng = np.random.default_rng(seed)
    bits = {"F16": 1e-4, "Q8_0": 1e-2, "Q6_K": 0.1, "Q4_K": 1.0, "Q4_0": 1.5}
    parts = [Component("token_embd", 40, 256)]
    for i in range(components):
        rows, row_length = int(rng.integers(3, 30)), int(rng.choice([256, 288, 512]))
        parts.append(Component(f"blk.{i}.ffn_up", rows, row_length))
    treatments, costs = [], []
    for part in parts:
        options = candidate_treatments(part, bits)
        factor = rng.lognormal(0, 1.5)
        treatments.append(tuple(options))
        costs.append(
            tuple(factor * (bits[t.type] + 20 * t.zero_share ** rng.uniform(2, 4)) for t in options)
        )
    return CostTable(tuple(parts), tuple(treatments), tuple(costs), 500)


def zero_count(plan):
    return sum(c.zeros(t) for c, t in zip(plan.components, plan.treatments, strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("zero_share", [0.02, 0.1, 0.25, 0.4])
def test_zero_share_is_met_up_to_a_weight_a_row(seed, zero_share):
    table = sparse_table(seed)
    dense = Plan(table.components, tuple(Treatment("Q8_0") for _ in table.components), 500)
    budget = int(dense.size_bytes * 1.1)
    plan = search(table, budget, zero_share)
    assert plan.size_bytes <= budget
    weights = sum(c.weights for c in table.components if c.in_block)
    excess = zero_count(plan) - round(zero_share * weights)
    granularity = min(
        c.rows for c, t in zip(plan.components, plan.treatments, strict=True) if t.zero_share
    )
    assert 0 <= excess < granularity
    assert all(
        c.in_block or not t.zero_share
        for c, t in zip(plan.components, plan.treatments, strict=True)
    )
    assert math.isfinite(table.cost(plan))


def test_zeros_are_given_back_where_that_saves_most():
    # One level only, so that the search finds 25 % or 50 % and has to give back down to 30 %.
    levels = (Treatment("Q8_0"), Treatment("Q8_0", 0.5))
    cheap, dear = Component("blk.0.ffn_up", 4, 320), Component("blk.1.ffn_up", 4, 320)
    table = CostTable((cheap, dear), (levels, levels), ((0.0, 1.0), (0.0, 2.0)), 0)
    plan = search(table, 10**6, 0.3)
    assert plan.treatments == (levels[1], Treatment("Q8_0", 0.1))
    assert table.cost(plan) == pytest.approx(1.4)
    assert zero_count(search(table, 10**6)) == 0


def test_zeros_that_do_not_fit():
    table = sparse_table(13)
    with pytest.raises(EdgeDtmError, match="raise --max-bytes or lower --sparsity"):
        search(table, 10**9, 0.97)
    smallest = search(table, 10**9).fixed_bytes + sum(
        min(c.size_bytes(t) for t in ts)
        for c, ts in zip(table.components, table.treatments, strict=True)
    )
    with pytest.raises(EdgeDtmError, match="does not fit"):
        search(table, smallest, 0.3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("zero_share", [0.05, 0.3, 0.6, 0.9])
def test_least_bytes_with_zeros_is_a_lower_bound(seed, zero_share):
    """No plan of the search is smaller, and one little larger than that exists."""
    table = sparse_table(seed)
    least = table.fixed_bytes + least_bytes_with_zeros(table.components, table.types, zero_share)
    # Shares are met up to a weight a row, so up to a thousandth of the bytes.
    with pytest.raises(EdgeDtmError):
        search(table, round(least * 0.999), zero_share)
    largest = max(c.size_bytes(Treatment("F16")) for c in table.components if c.in_block)
    plan = search(table, round(least + largest), zero_share)
    assert least * 0.999 < plan.size_bytes <= least + largest
    assert plan.zero_share >= zero_share - 1e-3


def test_zeros_that_no_budget_holds():
    blocks = [Component("blk.0.ffn_up", 4, 320), Component("token_embd", 9, 320)]
    assert least_bytes_with_zeros(blocks, ("Q4_0", "Q5_0"), 0.01) == math.inf
    assert least_bytes_with_zeros(blocks, ("Q4_0", "Q8_0"), 0.96) == math.inf
    assert math.isfinite(least_bytes_with_zeros(blocks, ("Q4_0", "Q8_0"), 0.95))
    # One of two matrices takes no type with zeros: a half is the most there is.
    odd = [Component("blk.0.ffn_up", 8, 320), Component("blk.1.ffn_up", 8, 320)]
    assert math.isfinite(least_bytes_with_zeros(odd, ("F16", "Q4_0"), 0.95))


def test_zeros_that_stay_are_not_given_back():
    """Where 30 % are held, the search may give back more of the others only down to them."""
    held, free = Component("blk.0.ffn_up", 4, 320), Component("blk.1.ffn_up", 4, 320)
    options = [candidate_treatments(c, ["Q8_0"], True, h) for c, h in ((held, 0.3), (free, 0.0))]
    assert min(t.zero_share for t in options[0]) == 0.3
    costs = tuple(tuple(10 * t.zero_share**2 for t in ts) for ts in options)
    table = CostTable((held, free), tuple(map(tuple, options)), costs, 0)
    plan = search(table, 10**6, 0.2)
    assert plan.treatments[0].zero_share >= 0.3
    assert plan.zero_share == pytest.approx(0.2, abs=1 / 320)
    # As many as are held anyway: nothing more, and nothing less.
    assert search(table, 10**6, 0.1).treatments == (Treatment("Q8_0", 0.3), Treatment("Q8_0"))


# --- the paper's experiment ----------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.8, 1])
def test_the_least_divergent_share(share):
    random = np.random.default_rng(30)
    parts = [Component("token_embd", 40, 256)]
    parts += [Component(f"blk.{i}.ffn_up", int(random.integers(1, 30)), 256) for i in range(11)]
    costs = [tuple(random.permutation([1.0, 2.0, 3.0]) * random.uniform(1, 9)) for _ in parts]
    kinds = (Treatment("Q8_0"), Treatment("F16"), Treatment("Q4_0"))
    table = CostTable(tuple(parts), tuple(kinds for _ in parts), tuple(costs), 500)
    plan = least_divergent_share(table, "Q8_0", "F16", share)
    coarse = [i for i, t in enumerate(plan.treatments) if t.type == "Q8_0"]
    assert plan.by_name()["token_embd"] == Treatment("F16") and plan.fixed_bytes == 500
    assert {t.type for t in plan.treatments} <= {"Q8_0", "F16"}
    assert len(coarse) == round(share * 11)  # components, whatever their size
    order = sorted(range(1, 12), key=lambda i: costs[i][0])
    assert set(coarse) == set(order[: len(coarse)])


# --- cost table ----------------------------------------------------------------------------------


def one_component(shares_and_costs, type_name="Q8_0"):
    component = Component("blk.0.ffn_up", 2, 256)
    return CostTable(
        (component,),
        (tuple(Treatment(type_name, s) for s, _ in shares_and_costs),),
        (tuple(c for _, c in shares_and_costs),),
        0,
    )


def test_cost_between_two_levels_is_interpolated():
    table = one_component([(0.2, 3.0), (0.0, 1.0), (0.1, 1.5), (0.3, math.inf)])
    shares = (0, 0.05, 0.1, 0.15, 0.2)
    costs = [table.cost_of(0, Treatment("Q8_0", share)) for share in shares]
    assert costs == pytest.approx([1, 1.25, 1.5, 2.25, 3])
    for unmeasured in (Treatment("Q8_0", 0.4), Treatment("F16")):
        with pytest.raises(KeyError, match="no measured"):
            table.cost_of(0, unmeasured)


def test_restricted_keeps_types_and_drops_zeros():
    table = sparse_table(14)
    only = table.restricted(["Q8_0", "Q4_0"], sparse=False)
    assert {t for ts in only.treatments for t in ts} == {Treatment("Q8_0"), Treatment("Q4_0")}
    for ts, cs, all_ts, all_cs in zip(
        only.treatments, only.costs, table.treatments, table.costs, strict=True
    ):
        costs = dict(zip(all_ts, all_cs, strict=True))
        assert [costs[t] for t in ts] == list(cs)
    with pytest.raises(EdgeDtmError, match="allow a type with blocks of 32"):
        table.restricted(["Q5_1"], sparse=False)


def test_component_without_a_finite_cost():
    with pytest.raises(EdgeDtmError, match="no usable treatment"):
        search(one_component([(0.0, math.inf)], "F16"), 10**9)


# --- prediction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_prediction_equals_drawn_normals(sigma):
    rng = np.random.default_rng(20)
    margins = rng.gamma(1.5, 1.0, (6, 12))
    lengths = np.array([12, 12, 3, 7, 1, 12])
    draws = 20_000
    sdt, fdt = np.zeros(draws), np.zeros(draws)
    for row, length in enumerate(lengths):
        flips = margins[row, :length] + sigma * rng.normal(size=(draws, length)) < 0
        sdt += flips.sum(axis=1) / lengths.sum()
        fdt += np.where(flips.any(axis=1), flips.argmax(axis=1), length) / len(lengths)
    prediction = Predictor(margins, lengths).predict(sigma**2)
    assert prediction.sigma == pytest.approx(sigma)
    # Five standard errors of the simulation.
    assert prediction.sdt == pytest.approx(sdt.mean(), abs=5 * sdt.std() / draws**0.5)
    assert prediction.fdt == pytest.approx(fdt.mean(), abs=5 * fdt.std() / draws**0.5)


def test_no_change_diverges_nowhere():
    prediction = Predictor(np.array([[0.0, 1.0], [2.0, 9.0]]), np.array([2, 1])).predict(-1e-18)
    assert (prediction.sigma, prediction.sdt, prediction.fdt) == (0, 0, 1.5)


@settings(max_examples=60, deadline=None)
@given(tables())
def test_frontier_is_monotone_and_met_by_the_search(table):
    predictor = Predictor(np.array([[0.5, 2.0, 8.0]]), np.array([3]))
    points = frontier(table, predictor)
    for a, b in itertools.pairwise(points):
        assert a.size_bytes < b.size_bytes
        assert a.sigma >= b.sigma
        assert a.sdt >= b.sdt
        assert a.fdt <= b.fdt
    plans = set(all_plans(table))
    assert points[0].size_bytes == min(s for s, _ in plans)
    assert points[-1].sigma ** 2 == pytest.approx(min(c for _, c in plans), abs=1e-9)
    for point in points:
        found = search(table, point.size_bytes)
        assert table.cost(found) == pytest.approx(point.sigma**2, abs=1e-9)
