"""Cost table and budget in, plan out; and what the best plan of every size predicts.

A greedy walk over the lower convex hulls of all components, in the order of cost saved a byte.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import isfinite
from typing import NamedTuple

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Plan, Treatment
from edge_dtm.search.cost_table import CostTable, Prediction, Predictor


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


class Step(NamedTuple):
    """One step up a hull. component, treatment: indices into the table; gain: the cost saved."""

    component: int
    treatment: int
    extra_bytes: int
    gain: float


def greedy_walks(
    table: CostTable, reward: float = 0.0
) -> Iterator[tuple[tuple[int, ...], Sequence[Step]]]:
    """For each choice of treatments of `token_embd` and `output`, the smallest plan, as an index of
    a treatment a component, and all steps upwards in the block matrices, by falling gain a byte.

    In a small model a step of the embedding is a tenth of the file. A greedy walk that meets such
    a step too early or too late strays far from the optimum; tried one by one it cannot.

    reward: cost taken off for each zero, in logits squared. EdgeDtmError when a component has no
    treatment of finite cost.
    """
    starts: list[list[int]] = []
    steps: list[list[Step]] = []
    for i, component in enumerate(table.components):
        sizes = [component.size_bytes(t) for t in table.treatments[i]]
        pairs = zip(table.costs[i], table.treatments[i], strict=True)
        costs = [cost - reward * component.zeros(t) for cost, t in pairs]
        hull = convex_hull(sizes, costs)
        if not hull:
            raise EdgeDtmError(f"{component.name} has no usable treatment: allow more --types")
        starts.append(hull[:1] if component.in_block else hull)
        if component.in_block:
            steps.append(
                [Step(i, b, sizes[b] - sizes[a], costs[a] - costs[b]) for a, b in pairwise(hull)]
            )
    merged = list(heapq.merge(*steps, key=lambda step: -step.gain / step.extra_bytes))
    for start in product(*starts):
        yield start, merged


def search(table: CostTable, max_bytes: int, zero_share: float = 0.0) -> Plan:
    """The plan of least summed cost within max_bytes, optimal up to one step of a block matrix.

    zero_share: average share of zeros wanted over the block matrices; met exactly up to one
    weight a row of one component. EdgeDtmError when no plan fits.
    """
    if zero_share <= 0:
        return _cheapest(table.restricted(table.types, sparse=False), max_bytes, 0.0)
    low, high = 0.0, 1e-12
    plan = _cheapest(table, max_bytes, high)
    while plan.zero_share < zero_share:
        low, high = high, high * 8
        if high > 1e9:
            raise EdgeDtmError(
                f"an average of {zero_share:.0%} zeros does not fit: at most "
                f"{plan.zero_share:.1%} within {max_bytes:,} bytes, since zeros are only put into "
                "F16 and Q8_0 components; raise --max-bytes or lower --sparsity"
            )
        plan = _cheapest(table, max_bytes, high)
    for _ in range(60):
        middle = (low * high) ** 0.5 if low else high / 8
        trial = _cheapest(table, max_bytes, middle)
        if trial.zero_share >= zero_share:
            high, plan = middle, trial
        else:
            low = middle
        if low and high / low < 1 + 1e-9:
            break
    return _give_back_zeros(table, plan, zero_share)


def least_divergent_share(table: CostTable, coarse: str, fine: str, share: float) -> Plan:
    """A share of the block matrices in the type `coarse`, all other components in `fine`.

    The share is counted in components; those of the least cost in `coarse` get it. The int8
    experiment of the paper (arXiv 2311.01544): Q8_0 and F16.
    """
    blocks = [i for i, c in enumerate(table.components) if c.in_block]
    order = sorted(blocks, key=lambda i: (table.cost_of(i, Treatment(coarse)), i))
    chosen = set(order[: round(share * len(blocks))])
    treatments = tuple(
        Treatment(coarse if i in chosen else fine) for i in range(len(table.components))
    )
    return Plan(table.components, treatments, table.fixed_bytes)


def _cheapest(table: CostTable, max_bytes: int, reward: float) -> Plan:
    """The plan of least cost less `reward` for each zero; EdgeDtmError when none fits."""
    plans, smallest = [], []
    for start, steps in greedy_walks(table, reward):
        choice = list(start)
        size_bytes = table.plan(choice).size_bytes
        smallest.append(size_bytes)
        if size_bytes > max_bytes:
            continue
        blocked: set[int] = set()
        for step in steps:
            if step.component in blocked:
                continue
            if size_bytes + step.extra_bytes > max_bytes:
                # Its later steps build on this one; cheaper steps of others may still fit.
                blocked.add(step.component)
                continue
            choice[step.component] = step.treatment
            size_bytes += step.extra_bytes
        plans.append(table.plan(choice))
    if not plans:
        raise EdgeDtmError(
            f"the smallest plan takes {min(smallest):,} bytes, the budget is {max_bytes:,}: raise "
            f"--max-bytes by {min(smallest) - max_bytes:,} or allow smaller --types"
        )
    return min(plans, key=lambda plan: table.cost(plan) - reward * plan.zeros)


def _give_back_zeros(table: CostTable, plan: Plan, zero_share: float) -> Plan:
    """Give back the zeros beyond the share asked for, where each given back saves most."""
    weights = sum(c.weights for c in plan.components if c.in_block)
    excess = plan.zeros - round(zero_share * weights)
    treatments = list(plan.treatments)
    while excess > 0:
        lowerings = list(_lowerings(table, treatments, excess))
        if not lowerings:
            break
        _, i, below, zeros = max(lowerings, key=lambda lowering: lowering[0])
        component = table.components[i]
        a_row = min(zeros, excess) // component.rows
        if a_row * component.rows == zeros:
            treatments[i] = below
        else:
            left = component.zeros(treatments[i]) // component.rows - a_row
            treatments[i] = Treatment(below.type, left / component.row_length)
        excess -= a_row * component.rows
    return Plan(plan.components, tuple(treatments), plan.fixed_bytes)


def _lowerings(
    table: CostTable, treatments: Sequence[Treatment], excess: int
) -> Iterator[tuple[float, int, Treatment, int]]:
    """Of each component that can give back one zero a row: the cost saved for each zero given back
    at its next lower level, the component's index, that level, and the zeros given back there."""
    for i, (component, treatment) in enumerate(zip(table.components, treatments, strict=True)):
        levels = [
            t.zero_share
            for t in table.treatments[i]
            if t.type == treatment.type and t.zero_share < treatment.zero_share
        ]
        # Without a lower level the zeros have to stay.
        if component.rows <= excess and levels:
            below = Treatment(treatment.type, max(levels))
            zeros = component.zeros(treatment) - component.zeros(below)
            saved = table.cost_of(i, treatment) - table.cost_of(i, below)
            yield saved / max(zeros, 1), i, below, zeros


@dataclass(frozen=True)
class FrontierPoint(Prediction):
    """What the best plan of size_bytes predicts."""

    size_bytes: int


def frontier(table: CostTable, predictor: Predictor) -> list[FrontierPoint]:
    """The best plan of every size that the greedy walks pass, from the smallest to the largest.

    Zeros make no file smaller, so treatments with zeros are never among them unless nothing else
    is allowed.
    """
    passed = []
    for start, steps in greedy_walks(table):
        plan = table.plan(start)
        size, cost = plan.size_bytes, table.cost(plan)
        passed.append((size, cost))
        for step in steps:
            size, cost = size + step.extra_bytes, cost - step.gain
            passed.append((size, cost))
    points: list[FrontierPoint] = []
    least = float("inf")
    for size, cost in sorted(passed):
        if cost < least:
            least = cost
            points.append(FrontierPoint(**predictor.predict(cost).to_json(), size_bytes=size))
    return points
