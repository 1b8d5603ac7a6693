"""Layer by component: what was done to each matrix, and what that costs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_dtm.formats.plan import Component, Plan, Treatment
from edge_dtm.report.summary import PARTS
from edge_dtm.report.tags import Child, Markup, join, tag

_IN_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
_DIGITS = 100  # more than tell two floats apart; a plan from elsewhere may have any number
_OUTSIDE = ("token_embd", "output")
# Palest and strongest percent of the colour, and between which two neither ink has a contrast of
# 4.5 (WCAG 2.2, 1.4.3) on the light page; on the dark one white reads on all of them.
_PALE, _STRONG, _GAP = 8, 100, (70, 82)


@dataclass(frozen=True)
class Cell:
    """words: what it says; strength: 0 to 1, of the colour."""

    words: str
    strength: float


def bits(component: Component, treatment: Treatment) -> float:
    """Bits a weight takes in the file."""
    return component.size_bytes(treatment) * 8 / max(component.weights, 1)


def treatments(plan: Plan) -> dict[str, Cell]:
    """By component. The fewer bits, the stronger the colour: 16 bits have none, 2 have all."""
    out = {}
    for c, t in zip(plan.components, plan.treatments, strict=True):
        strength = (4 - math.log2(min(max(bits(c, t), 2.0), 16.0))) / 3
        words = f"{t.type} {t.zero_share:.0%}0" if t.zero_share else t.type
        out[c.name] = Cell(words, strength)
    return out


def chosen_costs(plan: Plan, costs: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Cost, logits squared, of what the plan does, by component; those not known are left out.

    costs: component -> treatment's text -> cost. Between two shares of zeros that were measured
    the cost is interpolated, as the search does it.
    """
    out = {}
    for name, treatment in plan.by_name().items():
        known = costs.get(name, {})
        points = sorted(
            (share, cost)
            for words, cost in known.items()
            for kind, share in [_parsed(words)]
            if kind == treatment.type
        )
        exact = next((cost for words, cost in known.items() if _says(words, treatment)), None)
        if exact is not None:
            out[name] = exact
        elif points and points[0][0] <= treatment.zero_share <= points[-1][0]:
            shares, values = zip(*points, strict=True)
            out[name] = float(np.interp(treatment.zero_share, shares, values))
    return out


def _says(words: str, treatment: Treatment) -> bool:
    """Whether a text is the treatment's, with however many digits (plan.distinct_texts)."""
    digits = len(words.partition("%")[0].partition(".")[2])
    return treatment.text(min(digits, _DIGITS)) == words


def _parsed(words: str) -> tuple[str, float]:
    """Type and share of zeros of a treatment's text (plan.Treatment.__str__)."""
    found = re.fullmatch(r"(\w+)(?:\+([\d.]+)% zeros)?", words)
    if not found:
        return words, math.nan
    return found[1], float(found[2] or 0) / 100


def cost_cells(costs: Mapping[str, float]) -> dict[str, Cell]:
    """Percent of all costs together; colour by the logarithm, a cost of 0 has none."""
    total = sum(costs.values()) or 1.0
    logs = [math.log(v) for v in costs.values() if v > 0]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    span = (high - low) or 1.0
    return {
        name: Cell(_percent(100 * v / total), (math.log(v) - low) / span if v > 0 else 0.0)
        for name, v in costs.items()
    }


def _percent(value: float) -> str:
    """Two digits at most, so that it fits a cell."""
    if value >= 9.5:
        return f"{value:.0f}"
    if value >= 0.95:
        return f"{value:.1f}"
    return f"{value:.1g}"[1:] if value >= 0.0095 else "0"


def table(cells: Mapping[str, Cell], hue: str) -> Markup:
    """A row a layer, a column a kind of matrix. hue: a class of report.css."""
    by_layer: dict[int, dict[str, Cell]] = {}
    for name, cell in cells.items():
        if found := _IN_BLOCK.fullmatch(name):
            by_layer.setdefault(int(found[1]), {})[found[2]] = cell
    parts = [p for p in PARTS if any(p in row for row in by_layer.values())]
    head = tag(
        "thead",
        tag(
            "tr",
            tag("th", "layer", scope="col"),
            [tag("th", _broken(p), scope="col") for p in parts],
        ),
    )
    rows = [
        tag("tr", tag("th", layer, scope="row"), [_cell(row.get(p)) for p in parts])
        for layer, row in sorted(by_layer.items())
    ]
    outside = [
        tag("span", tag("span", name, class_="name"), _cell(cells[name], "span"), class_="outside")
        for name in _OUTSIDE
        if name in cells
    ]
    return join(
        tag("p", outside, class_=f"map {hue}") if outside else None,
        tag("div", tag("table", head, tag("tbody", rows), class_=f"map {hue}"), class_="scroll")
        if rows
        else None,
    )


def _broken(name: str) -> Child:
    """attn_output, where a line may break behind the underscore."""
    head, _, rest = name.partition("_")
    return [f"{head}_", tag("wbr"), rest] if rest else name


def _cell(cell: Cell | None, name: str = "td") -> Markup:
    if cell is None:
        return tag(name)
    percent = _PALE + min(max(cell.strength, 0.0), 1.0) * (_STRONG - _PALE)
    low, high = _GAP
    if low < percent < high:
        percent = low if percent < (low + high) / 2 else high
    return tag(
        name,
        cell.words,
        class_="c dark" if percent >= high else "c",
        style=f"--x:{percent:.0f}%",
    )
