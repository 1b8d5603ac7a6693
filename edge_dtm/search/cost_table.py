"""What treatments cost, and the divergence that a sum of costs predicts.

The additive error model of Divergent Token Metrics (arXiv 2311.01544).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from math import erfc, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Component, Plan, Treatment


@dataclass(frozen=True)
class CostTable:
    """For every component its candidate treatments and their costs.

    A cost is the mean-square change of the margin, in logits squared. fixed_bytes: what the file
    holds besides the components.
    """

    components: tuple[Component, ...]
    treatments: tuple[tuple[Treatment, ...], ...]
    costs: tuple[tuple[float, ...], ...]
    fixed_bytes: int

    @property
    def types(self) -> list[str]:
        """All types of the treatments, sorted."""
        return sorted({t.type for ts in self.treatments for t in ts})

    def plan(self, choice: Sequence[int]) -> Plan:
        """choice: the index of one treatment a component."""
        treatments = tuple(ts[j] for ts, j in zip(self.treatments, choice, strict=True))
        return Plan(self.components, treatments, self.fixed_bytes)

    def cost(self, plan: Plan) -> float:
        """sigma^2 of a plan; KeyError as in cost_of."""
        by_name = plan.by_name()
        return sum(self.cost_of(i, by_name[c.name]) for i, c in enumerate(self.components))

    def cost_of(self, index: int, treatment: Treatment) -> float:
        """The cost of one component. Zero shares between two levels are interpolated linearly.

        KeyError for a type or a share of zeros outside what was measured.
        """
        pairs = zip(self.treatments[index], self.costs[index], strict=True)
        points = sorted((t.zero_share, cost) for t, cost in pairs if t.type == treatment.type)
        if not points or not points[0][0] <= treatment.zero_share <= points[-1][0]:
            raise KeyError(f"{self.components[index].name} has no measured {treatment}")
        shares, costs = [p[0] for p in points], [p[1] for p in points]
        return float(np.interp(treatment.zero_share, shares, costs))

    def restricted(self, types: Collection[str], sparse: bool) -> CostTable:
        """The same table with only these types and, unless `sparse`, without zeros.

        EdgeDtmError when none of them fits some component.
        """
        allowed = [
            [(t, c) for t, c in options if t.type in types and (sparse or not t.zero_share)]
            for options in map(zip, self.treatments, self.costs)
        ]
        empty = [c.name for c, options in zip(self.components, allowed, strict=True) if not options]
        if empty:
            raise EdgeDtmError(
                f"none of the types {', '.join(types)} fits {len(empty)} components "
                f"({', '.join(empty[:4])}, ...): allow a type with blocks of 32, for example Q8_0"
            )
        return CostTable(
            self.components,
            tuple(tuple(t for t, _ in options) for options in allowed),
            tuple(tuple(c for _, c in options) for options in allowed),
            self.fixed_bytes,
        )


@dataclass(frozen=True)
class Prediction:
    """sigma in logits, sdt a share, fdt in tokens."""

    sigma: float
    sdt: float
    fdt: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


class Predictor:
    """SDT and mean FDT from sigma, given the original's margins.

    margins: logits, shape (sequences, tokens); lengths: tokens that count in each row.
    """

    def __init__(
        self, margins: npt.NDArray[np.floating[Any]], lengths: npt.NDArray[np.integer[Any]]
    ) -> None:
        self.margins = np.asarray(margins, dtype=np.float64)
        self.lengths = np.asarray(lengths)
        self._counted = np.arange(self.margins.shape[1])[None, :] < self.lengths[:, None]
        if not self._counted.any():
            raise ValueError("no position to predict on")

    def predict(self, sigma_squared: float) -> Prediction:
        """P(flip at t) = Phi(-m_t / sigma); SDT is its mean, FDT the mean length of survival."""
        sigma = sqrt(max(sigma_squared, 0.0))
        if sigma == 0.0:
            return Prediction(0.0, 0.0, float(self.lengths.mean()))
        flip = np.where(
            self._counted,
            np.vectorize(erfc, otypes=[np.float64])(self.margins / (sigma * sqrt(2))) / 2,
            0.0,
        )
        survival = np.cumprod(1 - flip, axis=1)
        fdt = float((survival * self._counted).sum(axis=1).mean())
        return Prediction(sigma, float(flip[self._counted].mean()), fdt)
