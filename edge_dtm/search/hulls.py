"""The lower convex hull of each component's treatments, and the greedy walk over all hulls. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.search.cost_table import CostTable


def convex_hull(sizes: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull of (bytes, cost), fewest bytes first, cost falling.

    A treatment whose cost is not finite (an overflow in F16, say) is never on it.
    """
    order = sorted(
        (i for i in range(len(sizes)) if np.isfinite(costs[i])),
        key=lambda i: (sizes[i], costs[i], i),
    )
    hull: list[int] = []
    for i in order:
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


def greedy_walk(table: CostTable, reward: float = 0.0) -> Walk:
    """The walk over the table's hulls.

    reward: cost taken off for each zero, in logits squared. EdgeDtmError when a component has no
    treatment of finite cost.
    """
    hulls = _hulls(table, reward)
    steps = heapq.merge(
        *(_steps_of(c, hull) for c, hull in enumerate(hulls)),
        key=lambda step: -step.gain / step.extra_bytes,
    )
    return Walk([hull[0].treatment for hull in hulls], list(steps))


def fixed_edges(table: CostTable, reward: float = 0.0) -> Iterator[CostTable]:
    """The table once for each choice of treatments of `token_embd` and `output`.

    In a small model a step of the embedding is a tenth of the file. A greedy walk that meets such
    a step too early or too late strays far from the optimum; tried one by one it cannot.
    """
    hulls = _hulls(table, reward)
    edges = [i for i, c in enumerate(table.components) if not c.in_block]
    for corners in product(*(hulls[i] for i in edges)):
        treatments, costs = list(table.treatments), list(table.costs)
        for i, corner in zip(edges, corners, strict=True):
            treatments[i] = (treatments[i][corner.treatment],)
            costs[i] = (costs[i][corner.treatment],)
        yield CostTable(table.components, tuple(treatments), tuple(costs), table.fixed_bytes)


@dataclass(frozen=True)
class _Corner:
    """One treatment on a hull; net_cost: the cost less the reward for its zeros."""

    treatment: int
    size_bytes: int
    net_cost: float


def _hulls(table: CostTable, reward: float) -> list[list[_Corner]]:
    """One hull a component."""
    hulls = []
    for component, treatments, costs in zip(
        table.components, table.treatments, table.costs, strict=True
    ):
        sizes = [component.size_bytes(t) for t in treatments]
        net = [c - reward * component.zeros(t) for c, t in zip(costs, treatments, strict=True)]
        hull = [_Corner(j, sizes[j], net[j]) for j in convex_hull(sizes, net)]
        if not hull:
            raise EdgeDtmError(f"{component.name} has no usable treatment: allow more --types")
        hulls.append(hull)
    return hulls


def _steps_of(component: int, hull: Sequence[_Corner]) -> list[Step]:
    return [
        Step(component, b.treatment, b.size_bytes - a.size_bytes, a.net_cost - b.net_cost)
        for a, b in pairwise(hull)
    ]
