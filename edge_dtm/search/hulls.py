"""The lower convex hull of each component's treatments, and the greedy walks over all hulls."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from math import isfinite

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.search.cost_table import CostTable
from edge_dtm.search.predictor import Predictor


def convex_hull(sizes: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull of (bytes, cost), fewest bytes first, cost falling.

    A treatment whose cost is not finite (an overflow in F16, say) is never on it.
    """
    hull: list[int] = []
    finite = (i for i in range(len(sizes)) if isfinite(costs[i]))
    for i in sorted(finite, key=lambda i: (sizes[i], costs[i], i)):
        if hull and costs[i] >= costs[hull[-1]]:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            # b stays only if it lies strictly below the line from a to i.
            if (costs[a] - costs[b]) * (sizes[i] - sizes[a]) > (costs[a] - costs[i]) * (
                sizes[b] - sizes[a]
            ):
                break
            hull.pop()
        hull.append(i)
    return hull


@dataclass(frozen=True)
class Step:
    """One step up a hull. component, treatment: indices into the table; gain: the cost saved."""

    component: int
    treatment: int
    extra_bytes: int
    gain: float


@dataclass(frozen=True)
class Walk:
    """The smallest plan, as one treatment's index a component, and all steps upwards from it.

    The steps come in the order of falling gain a byte, those of one component in its own order.
    """

    start: list[int]
    steps: list[Step]


def greedy_walks(table: CostTable, reward: float = 0.0) -> Iterator[Walk]:
    """One walk for each choice of treatments of `token_embd` and `output`, which keep it.

    In a small model a step of the embedding is a tenth of the file. A greedy walk that meets such
    a step too early or too late strays far from the optimum; tried one by one it cannot.

    reward: cost taken off for each zero, in logits squared. EdgeDtmError when a component has no
    treatment of finite cost.
    """
    hulls: list[list[int]] = []
    steps: list[list[Step]] = []
    edges = []
    for i, component in enumerate(table.components):
        treatments = table.treatments[i]
        sizes = [component.size_bytes(t) for t in treatments]
        pairs = zip(table.costs[i], treatments, strict=True)
        costs = [cost - reward * component.zeros(t) for cost, t in pairs]
        hull = convex_hull(sizes, costs)
        if not hull:
            raise EdgeDtmError(f"{component.name} has no usable treatment: allow more --types")
        hulls.append(hull)
        if component.in_block:
            steps.append(
                [Step(i, b, sizes[b] - sizes[a], costs[a] - costs[b]) for a, b in pairwise(hull)]
            )
        else:
            edges.append(i)
    merged = list(heapq.merge(*steps, key=lambda step: -step.gain / step.extra_bytes))
    for choice in product(*(hulls[i] for i in edges)):
        start = [hull[0] for hull in hulls]
        for i, treatment in zip(edges, choice, strict=True):
            start[i] = treatment
        yield Walk(start, merged)


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
    for walk in greedy_walks(table):
        start = table.plan(walk.start)
        size, cost = start.size_bytes, table.cost(start)
        passed.append((size, cost))
        for step in walk.steps:
            size, cost = size + step.extra_bytes, cost - step.gain
            passed.append((size, cost))
    points: list[FrontierPoint] = []
    least = float("inf")
    for size, cost in sorted(passed):
        if cost < least:
            least = cost
            points.append(FrontierPoint(size, **predictor.predict(cost).to_json()))
    return points
