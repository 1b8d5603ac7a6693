"""The predicted divergence of the best plan of every size. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from edge_dtm.search.allocation import _hulls, _plan, _steps, _with_fixed_edges
from edge_dtm.search.cost_table import CostTable
from edge_dtm.search.predictor import Predictor


@dataclass(frozen=True)
class FrontierPoint:
    size_bytes: int
    sigma: float
    sdt: float
    fdt: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def frontier(table: CostTable, predictor: Predictor) -> list[FrontierPoint]:
    """The best plan of every size that the greedy walks pass, from the smallest to the largest.
    Zeros make no file smaller, so treatments with zeros are never among them unless nothing else
    is allowed."""
    found = []
    for fixed in _with_fixed_edges(table):
        hulls = _hulls(fixed)
        start = _plan(fixed, [hull[0] for hull in hulls])
        size, cost = start.size_bytes, fixed.cost(start)
        found.append((size, cost))
        for step in _steps(fixed, hulls):
            size, cost = size + step.extra_bytes, cost - step.gain
            found.append((size, cost))
    best: list[tuple[int, float]] = []
    for size, cost in sorted(found):
        if not best or cost < best[-1][1]:
            best.append((size, cost))
    return [_point(size, cost, predictor) for size, cost in best]


def _point(size: int, cost: float, predictor: Predictor) -> FrontierPoint:
    p = predictor.predict(cost)
    return FrontierPoint(size, p.sigma, p.sdt, p.fdt)
