"""The predicted divergence of the best plan of every size. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from edge_dtm.search.cost_table import CostTable
from edge_dtm.search.hulls import fixed_edges, greedy_walk
from edge_dtm.search.predictor import Predictor


@dataclass(frozen=True)
class FrontierPoint:
    """What the best plan of size_bytes predicts: sigma in logits, sdt a share, fdt in tokens."""

    size_bytes: int
    sigma: float
    sdt: float
    fdt: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def frontier(table: CostTable, predictor: Predictor) -> list[FrontierPoint]:
    """The best plan of every size that the greedy walks pass, from the smallest to the largest.

    Zeros make no file smaller, so treatments with zeros are never among them unless nothing else
    is allowed.
    """
    passed = []
    for fixed in fixed_edges(table):
        walk = greedy_walk(fixed)
        start = fixed.plan(walk.start)
        size, cost = start.size_bytes, fixed.cost(start)
        passed.append((size, cost))
        for step in walk.steps:
            size, cost = size + step.extra_bytes, cost - step.gain
            passed.append((size, cost))
    best: list[tuple[int, float]] = []
    for size, cost in sorted(passed):
        if not best or cost < best[-1][1]:
            best.append((size, cost))
    return [_point(size, cost, predictor) for size, cost in best]


def _point(size: int, cost: float, predictor: Predictor) -> FrontierPoint:
    p = predictor.predict(cost)
    return FrontierPoint(size, p.sigma, p.sdt, p.fdt)
