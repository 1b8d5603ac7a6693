"""What goes whole, against all combinations of a few units."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.search.cost_table import CostTable
from edge_dtm.search.structure import UnitOptions, remove_share, removed_share, worth_removing

PARTS = {"ffn": ("ffn_gate", "ffn_up", "ffn_down"), "attn": ("attn_q", "attn_output")}


@st.composite
def units(draw, most=4):
    """Units of any size and costs, which need not rise with what is removed."""
    out = []
    for i in range(draw(st.integers(1, most))):
        full = draw(st.integers(2, 6))
        kept = draw(st.lists(st.integers(0, full - 1), max_size=3, unique=True))
        costs = [float(draw(st.integers(0, 50))) for _ in kept]
        weights = draw(st.integers(1, 40)) * 100
        out.append(UnitOptions(f"{i}.ffn", (), weights, full, tuple(kept), tuple(costs)))
    return out


def options(unit):
    """(kept, cost) of everything that can become of it."""
    return [(unit.full, 0.0), *zip(unit.kept, unit.costs, strict=True)]


def cost_of(all_units, kept):
    return sum(dict(options(u))[kept.get(u.name, u.full)] for u in all_units)


def gone(unit, kept):
    return (1 - kept / unit.full) * unit.weights


def combinations(all_units):
    """(weights removed, cost) of every combination."""
    for combination in itertools.product(*map(options, all_units)):
        pairs = list(zip(all_units, combination, strict=True))
        yield sum(gone(u, k) for u, (k, _) in pairs), sum(c for _, (_, c) in pairs)


def largest_step(all_units):
    """The most that one unit's next option can cost: no step of a hull is longer."""
    return max(max(c for _, c in options(u)) for u in all_units)


# --- a share that was asked for -------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(units(), st.floats(0.001, 1))
def test_the_share_is_removed_at_the_least_cost(all_units, position):
    total = sum(u.weights for u in all_units)
    most = max(w for w, _ in combinations(all_units)) / total
    share = position * most
    kept = remove_share(all_units, share)
    assert all(kept[u.name] in u.kept for u in all_units if u.name in kept)
    found = sum(gone(u, kept.get(u.name, u.full)) for u in all_units)
    assert removed_share(all_units, kept) == pytest.approx(found / total)
    assert found / total >= share - 1e-12
    optimum = min(c for w, c in combinations(all_units) if w / total >= share - 1e-12)
    assert optimum <= cost_of(all_units, kept) <= optimum + largest_step(all_units) + 1e-6
    # What it removes it removes at no more than the least cost of removing as much.
    best = min(c for w, c in combinations(all_units) if w >= found - 1e-9 * total)
    assert cost_of(all_units, kept) == pytest.approx(best, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(units())
def test_a_larger_share_costs_no_less(all_units):
    most = removed_share(all_units, {u.name: min(u.kept, default=u.full) for u in all_units})
    costs = [cost_of(all_units, remove_share(all_units, most * i / 8)) for i in range(9)]
    assert costs == sorted(costs)


def test_all_and_nothing():
    both = [
        UnitOptions("0.ffn", (), 300, 3, (2, 1), (1.0, 5.0)),
        UnitOptions("1.attn", (), 100, 2, (0,), (3.0,)),
    ]
    assert remove_share(both, 0.0) == {}
    assert remove_share(both, 0.75) == {"0.ffn": 1, "1.attn": 0}
    assert removed_share(both, {"0.ffn": 1, "1.attn": 0}) == 0.75
    assert removed_share(both, {}) == removed_share([], {}) == 0
    assert remove_share(both, 0.2) == {"0.ffn": 2}  # the cheaper one a weight
    with pytest.raises(EdgeDtmError, match="76% .* cannot be removed.*lower --remove"):
        remove_share(both, 0.76)
    with pytest.raises(EdgeDtmError, match="cannot be removed"):
        remove_share([], 0.1)


# --- what is worth it -----------------------------------------------------------------------

TYPES = ("F16", "Q8_0", "Q4_0")


def table_of(all_units, costs, rows=32, fixed=1000):
    """One matrix a unit and an embedding, with the costs of TYPES."""
    parts = [Component("token_embd", 40, 256)]
    parts += [Component(u.components[0], rows, 256) for u in all_units]
    treatments = tuple(tuple(map(Treatment, TYPES)) for _ in parts)
    return CostTable(tuple(parts), treatments, tuple(map(tuple, costs)), fixed)


def unit_of(i, full, kept, costs, rows=32):
    return UnitOptions(f"{i}.ffn", (f"blk.{i}.ffn_up",), rows * 256, full, kept, costs)


def plans(all_units, table):
    """(bytes, cost, kept) of all removals and types: what stays takes its share of both."""
    sizes = [[c.size_bytes(t) for t in ts]
             for c, ts in zip(table.components, table.treatments, strict=True)]  # fmt: skip
    for combination in itertools.product(*map(options, all_units)):
        shares = [1.0, *(k / u.full for u, (k, _) in zip(all_units, combination, strict=True))]
        for choice in itertools.product(range(len(TYPES)), repeat=len(shares)):
            size = sum(s * sizes[i][j] for i, (s, j) in enumerate(zip(shares, choice, strict=True)))
            cost = sum(
                s * table.costs[i][j] for i, (s, j) in enumerate(zip(shares, choice, strict=True))
            )
            kept = {
                u.name: k for u, (k, _) in zip(all_units, combination, strict=True) if k < u.full
            }
            yield table.fixed_bytes + size, cost + sum(c for _, c in combination), kept


@st.composite
def cases(draw):
    """Units and a table in which fewer bits cost more."""
    all_units, costs = [], []
    for i in range(draw(st.integers(1, 3))):
        full = draw(st.integers(2, 4))
        kept = draw(st.lists(st.integers(0, full - 1), max_size=2, unique=True))
        removal = [float(draw(st.integers(0, 40))) for _ in kept]
        all_units.append(unit_of(i, full, tuple(kept), tuple(removal)))
    for _ in range(len(all_units) + 1):
        costs.append(sorted(float(draw(st.integers(0, 30))) for _ in TYPES))
    return all_units, table_of(all_units, costs)


@settings(max_examples=100, deadline=None)
@given(cases(), st.floats(0, 1))
def test_worth_it_against_all_plans(case, position):
    """With what it removes the best types are as good as any plan, up to one step."""
    all_units, table = case
    every = list(plans(all_units, table))
    smallest, largest = min(s for s, _, _ in every), max(s for s, _, _ in every)
    budget = round(smallest + position * (largest - smallest)) + 1
    kept = worth_removing(all_units, table, budget)
    same = [c for s, c, k in every if k == kept and s <= budget]
    assert same  # what is left fits
    optimum = min(c for s, c, _ in every if s <= budget)
    # One unit more or less at the price: its removal and its types, or the embedding's types.
    step = max(
        max(c for _, c in options(u)) + max(table.costs[i + 1]) for i, u in enumerate(all_units)
    )
    assert optimum <= min(same) <= optimum + max(step, max(table.costs[0])) + 1e-6


def test_a_free_removal_is_taken_and_a_dear_one_is_not():
    costs = [[0.0, 1.0, 9.0]] * 3
    free, dear = unit_of(0, 4, (3, 2), (0.0, 0.0)), unit_of(1, 4, (2, 0), (500.0, 900.0))
    table = table_of([free, dear], costs)
    whole = table.fixed_bytes + sum(c.size_bytes(Treatment("F16")) for c in table.components)
    for budget in (whole - 1, round(0.6 * whole), round(0.4 * whole)):
        assert worth_removing([free, dear], table, budget) == {"0.ffn": 2}
    assert worth_removing([dear], table, round(0.4 * whole)) == {}
    # Where all fits and nothing costs anything, all is kept.
    assert worth_removing([free, dear], table_of([free, dear], [[0.0] * 3] * 3), whole) == {}


def test_where_types_are_too_large_the_dear_one_goes():
    dear = unit_of(0, 4, (1,), (500.0,))
    table = table_of([dear], [[0.0, 1.0, 9.0]] * 2)
    smallest = table.fixed_bytes + sum(c.size_bytes(Treatment("Q4_0")) for c in table.components)
    assert worth_removing([dear], table, smallest) == {}
    assert worth_removing([dear], table, smallest - 1) == {"0.ffn": 1}
    with pytest.raises(EdgeDtmError, match="whatever is removed: raise --max-bytes"):
        worth_removing([dear], table, 1000)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_objective_is_monotone_in_the_budget(case):
    """With more bytes the plan that is left never costs more."""
    all_units, table = case
    every = list(plans(all_units, table))
    smallest, largest = min(s for s, _, _ in every), max(s for s, _, _ in every)
    found = []
    for i in range(6):
        budget = round(smallest + (largest - smallest) * i / 5) + 1
        kept = worth_removing(all_units, table, budget)
        # Relaxed: at the same price a plan's types may lie between two.
        found.append(min(c for s, c, k in every if k == kept and s <= budget))
    step = max(max(c for _, c in options(u)) for u in all_units) + max(map(max, table.costs))
    assert all(b <= a + step for a, b in itertools.pairwise(found))
    assert found[-1] <= found[0] + 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_costs_that_are_not_finite_are_passed_over(bad):
    unit = unit_of(0, 4, (2,), (2.0,))
    table = table_of([unit], [[bad, 1.0, 9.0]] * 2)
    finite = table_of([unit], [[1e9, 1.0, 9.0]] * 2)
    most = table.fixed_bytes + sum(c.size_bytes(Treatment("Q8_0")) for c in table.components)
    for budget in (most, round(0.9 * most), round(0.7 * most), round(0.5 * most)):
        assert worth_removing([unit], table, budget) == worth_removing([unit], finite, budget)
    with pytest.raises(EdgeDtmError, match="no usable treatment"):
        worth_removing([unit], table_of([unit], [[bad] * 3] * 2), most)
