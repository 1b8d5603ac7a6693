"""Layer by component: what was done to each matrix and what that costs, as rows of a table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from edge_dtm.formats.plan import Component, Plan, Treatment

if TYPE_CHECKING:
    from rich.table import Table

Value = TypeVar("Value")

OUTSIDE = ("token_embd", "output")
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_IN_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
_DIGITS = 100  # more than tell two floats apart; a plan from elsewhere may have any number
# Palest and strongest percent of the colour, and between which two neither ink has a contrast of
# 4.5 (WCAG 2.2, 1.4.3) on the light page; on the dark one white reads on all of them.
_PALE, _STRONG, _GAP = 8, 100, (70, 82)


def by_layer(values: Mapping[str, Value]) -> dict[int, dict[str, Value]]:
    """Layer -> part -> value, in order of the layers; names other than blk.N.PART are left out."""
    layers: dict[int, dict[str, Value]] = {}
    for name, value in values.items():
        if match := _IN_BLOCK.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = value
    return dict(sorted(layers.items()))


def text_rows(texts: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """(layer, one text a part) from component -> text, the embedding and the head first."""
    blank = [""] * (len(PARTS) - 1)
    return [
        *((name, [texts[name], *blank]) for name in OUTSIDE if name in texts),
        *((str(i), [row.get(p, "") for p in PARTS]) for i, row in by_layer(texts).items()),
    ]


def text_table(texts: Mapping[str, str]) -> Table:
    """The same rows for the terminal."""
    from rich.table import Table

    table = Table("layer", *PARTS, box=None, pad_edge=False)
    for layer, cells in text_rows(texts):
        table.add_row(layer, *cells)
    return table


@dataclass(frozen=True)
class MapCell:
    """words: what it says; strength: 0 to 1, of the colour."""

    words: str
    strength: float

    @property
    def percent(self) -> int:
        """Of the colour in the mix with the paper."""
        percent = _PALE + min(max(self.strength, 0.0), 1.0) * (_STRONG - _PALE)
        low, high = _GAP
        if low < percent < high:
            percent = low if percent < (low + high) / 2 else high
        return round(percent)

    @property
    def is_dark(self) -> bool:
        """Whether white is read better on it."""
        return self.percent >= _GAP[1]


@dataclass(frozen=True)
class ColourMap:
    """A table of the page. hue: a class of report.css; rows: (layer, a cell or None a part)."""

    hue: str
    outside: Mapping[str, MapCell]
    parts: Sequence[str]
    rows: Sequence[tuple[int, Sequence[MapCell | None]]]

    @classmethod
    def of(cls, cells: Mapping[str, MapCell], hue: str) -> ColourMap:
        """cells: by component; parts that no layer has get no column."""
        layers = by_layer(cells)
        parts = [p for p in PARTS if any(p in row for row in layers.values())]
        return cls(
            hue,
            {name: cells[name] for name in OUTSIDE if name in cells},
            parts,
            [(layer, [row.get(p) for p in parts]) for layer, row in layers.items()],
        )


def bits(component: Component, treatment: Treatment) -> float:
    """Bits a weight takes in the file."""
    return component.size_bytes(treatment) * 8 / max(component.weights, 1)


def treatment_cells(plan: Plan) -> dict[str, MapCell]:
    """By component. The fewer bits, the stronger the colour: 16 bits have none, 2 have all."""
    cells = {}
    for c, t in zip(plan.components, plan.treatments, strict=True):
        strength = (4 - math.log2(min(max(bits(c, t), 2.0), 16.0))) / 3
        words = f"{t.type} {t.zero_share:.0%}0" if t.zero_share else t.type
        cells[c.name] = MapCell(words, strength)
    return cells


def chosen_costs(plan: Plan, costs: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Cost, logits squared, of what the plan does, by component; those not known are left out.

    costs: component -> treatment's text -> cost. Between two measured sparsities the cost is
    interpolated, as the search does it.
    """
    chosen = {}
    for name, treatment in plan.by_name().items():
        measured = costs.get(name, {})
        exact = [cost for text, cost in measured.items() if _is_text_of(text, treatment)]
        sparsities = sorted(
            (sparsity, cost)
            for text, cost in measured.items()
            for type_name, sparsity in [_parsed(text)]
            if type_name == treatment.type
        )
        if exact:
            chosen[name] = exact[0]
        elif sparsities and sparsities[0][0] <= treatment.zero_share <= sparsities[-1][0]:
            known, known_costs = zip(*sparsities, strict=True)
            chosen[name] = float(np.interp(treatment.zero_share, known, known_costs))
    return chosen


def _is_text_of(text: str, treatment: Treatment) -> bool:
    """Whatever number of digits it has (plan.distinct_texts)."""
    digits = len(text.partition("%")[0].partition(".")[2])
    return treatment.text(min(digits, _DIGITS)) == text


def _parsed(text: str) -> tuple[str, float]:
    """Type and sparsity of a treatment's text (plan.Treatment.__str__)."""
    match = re.fullmatch(r"(\w+)(?:\+([\d.]+)% zeros)?", text)
    return (match[1], float(match[2] or 0) / 100) if match else (text, math.nan)


def cost_cells(costs: Mapping[str, float]) -> dict[str, MapCell]:
    """Percent of all costs together; colour by the logarithm, a cost of 0 has none."""
    total = sum(costs.values()) or 1.0
    logs = [math.log(v) for v in costs.values() if v > 0]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    span = (high - low) or 1.0
    return {
        name: MapCell(_percent(100 * v / total), (math.log(v) - low) / span if v > 0 else 0.0)
        for name, v in costs.items()
    }


def _percent(value: float) -> str:
    """Two digits at most, so that it fits a cell."""
    if value >= 9.5:
        return f"{value:.0f}"
    if value >= 0.95:
        return f"{value:.1f}"
    return f"{value:.1g}"[1:] if value >= 0.0095 else "0"
