"""Maps layer by component: bits, costs, and the shape of the tables."""

from __future__ import annotations

import dataclasses

import pytest

from edge_dtm.formats.plan import Component, Plan, Treatment, distinct_texts
from edge_dtm.report.layer_map import (
    MapCell,
    chosen_costs,
    cost_cells,
    layer_map,
    text_rows,
    treatment_cells,
)
from edge_dtm.search.cost_table import CostTable


def test_fewer_bits_are_stronger() -> None:
    part = Component("blk.0.attn_q", 64, 256)
    plan = Plan(
        (part, dataclasses.replace(part, name="b")), (Treatment("F16"), Treatment("Q4_0", 0.5)), 0
    )
    cells = treatment_cells(plan)
    assert cells["blk.0.attn_q"] == MapCell("F16", 0.0)
    assert cells["b"].words == "Q4_0 50%0" and 0.5 < cells["b"].strength < 0.7


def test_costs_are_those_of_the_search() -> None:
    part = Component("blk.0.attn_q", 64, 256)
    treatments = tuple(Treatment("Q8_0", z) for z in (0.0, 0.25, 0.5))
    table = CostTable((part,), (treatments,), ((1.0, 2.0, 7.0),), 0)
    written = {part.name: {str(t): c for t, c in zip(treatments, (1.0, 2.0, 7.0), strict=True)}}
    for zeros in (0.0, 0.25, 0.4, 0.5):
        plan = Plan((part,), (Treatment("Q8_0", zeros),), 0)
        assert chosen_costs(plan, written)[part.name] == pytest.approx(table.cost(plan))
    for unknown in (Treatment("Q8_0", 0.6), Treatment("Q4_0")):
        assert chosen_costs(Plan((part,), (unknown,), 0), written) == {}


def test_shares_that_read_the_same_keep_their_costs() -> None:
    """A share that earlier zeros hold, beside a level: distinct as plan.json spells them."""
    part = Component("blk.0.attn_q", 64, 256)
    costs = {Treatment("Q8_0", z): c for z, c in ((0.3996, 1.0), (0.4, 2.0), (0.5, 7.0))}
    written = {part.name: {words: costs[t] for t, words in distinct_texts(costs).items()}}
    for treatment, cost in costs.items():
        chosen = chosen_costs(Plan((part,), (treatment,), 0), written)
        assert chosen == {part.name: pytest.approx(cost)}


def test_cost_cells() -> None:
    cells = cost_cells({"a": 0.9, "b": 0.09, "c": 0.009, "d": 0.0, "e": 0.001})
    assert [c.words for c in cells.values()] == ["90", "9.0", ".9", "0", ".1"]
    strengths = [cells[n].strength for n in "abce"]
    assert strengths == sorted(strengths, reverse=True) and strengths[0] == 1
    assert cells["d"].strength == 0


def test_rows_by_layer() -> None:
    names = ("blk.11.attn_q", "blk.3.ffn_up", "output", "blk.x.y")
    outside, rows = layer_map(dict.fromkeys(names, 1))
    assert outside == {"output": 1}
    empty = [None] * 6
    assert rows == [(3, [*empty[:5], 1, None]), (11, [1, *empty])]
    texts = text_rows(dict.fromkeys(names, "F16"))
    assert [row[0] for row in texts] == ["output", "3", "11"]
    assert texts[1][1:] == ("", "", "", "", "", "F16", "")
