"""Layer by component: what was done to each matrix and what that costs, as rows of a table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edge_dtm.formats.plan import Plan

Value = TypeVar("Value")

OUTSIDE = ("token_embd", "output")
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_TREATMENT = re.compile(r"(\w+)(?:\+(\d+(?:\.\d+)?)% zeros)?")  # plan.Treatment.text
_IN_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
# Palest and strongest percent of the colour; up to here the page's ink has a contrast of 4.5 on it
# (WCAG 2.2, 1.4.3).
_PALE, _STRONG = 8, 70


def layer_map(
    values: Mapping[str, Value],
) -> tuple[dict[str, Value], list[tuple[int, list[Value | None]]]]:
    """Embedding and head of component -> value, and (layer, a value or None for each of PARTS).

    Names other than OUTSIDE and blk.N.PART are left out.
    """
    layers: dict[int, dict[str, Value]] = {}
    for name, value in values.items():
        if match := _IN_BLOCK.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = value
    outside = {name: values[name] for name in OUTSIDE if name in values}
    return outside, [(layer, [row.get(p) for p in PARTS]) for layer, row in sorted(layers.items())]


def text_rows(texts: Mapping[str, str]) -> list[tuple[str, ...]]:
    """A row a layer, with one text a part; the embedding and the head first."""
    outside, rows = layer_map(texts)
    return [
        *((name, text, *[""] * (len(PARTS) - 1)) for name, text in outside.items()),
        *((str(layer), *(text or "" for text in row)) for layer, row in rows),
    ]


@dataclass(frozen=True)
class MapCell:
    """words: what it says; strength: 0 to 1, of the colour."""

    words: str
    strength: float

    @property
    def percent(self) -> int:
        """Of the colour in the mix with the paper."""
        return round(_PALE + self.strength * (_STRONG - _PALE))


def treatment_cells(plan: Plan) -> dict[str, MapCell]:
    """By component. The fewer bits, the stronger the colour: 16 bits have none, 2 have all."""
    cells = {}
    for c, t in zip(plan.components, plan.treatments, strict=True):
        bits = c.size_bytes(t) * 8 / max(c.weights, 1)
        strength = (4 - math.log2(min(max(bits, 2.0), 16.0))) / 3
        words = f"{t.type} {t.zero_share:.0%}0" if t.zero_share else t.type
        cells[c.name] = MapCell(words, strength)
    return cells


def chosen_costs(plan: Plan, costs: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Cost, logits squared, of what the plan does, by component; those not known are left out.

    costs: component -> treatment's text -> cost. Between two measured sparsities the cost is
    interpolated, as the search does it.
    """
    chosen = {}
    for name, treatment in plan.by_name().items():
        known = sorted(
            (float(match[2] or 0) / 100, cost)
            for text, cost in costs.get(name, {}).items()
            for match in [_TREATMENT.fullmatch(text)]
            if match and match[1] == treatment.type and cost is not None
        )
        # A text has the sparsity rounded to a tenth of a percent, or closer.
        if known and known[0][0] - 6e-4 <= treatment.zero_share <= known[-1][0] + 6e-4:
            sparsities, cost = zip(*known, strict=True)
            chosen[name] = float(np.interp(treatment.zero_share, sparsities, cost))
    return chosen


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
