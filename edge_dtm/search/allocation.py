"""Cost table and budget in, plan out; and what the plan's divergence will be. Pure functions.

The model (design of the project, after the additive error model of Divergent Token Metrics):
the mean-square change of the top-1/top-2 margin that treatments cause adds up over components,
sigma^2 = sum of costs, and a token flips where a normal change of that size exceeds its margin.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Plan, Treatment
from edge_dtm.search.cost_table import CostTable


def convex_hull(sizes: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull of (bytes, cost), cheapest bytes first, cost falling.

    Treatments with a cost that is not finite (an overflow in F16, say) never are on it.
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
class _Step:
    component: int
    treatment: int
    extra_bytes: int
    gain: float


def _hulls(table: CostTable, reward: float = 0.0) -> list[list[int]]:
    """One hull a component; `reward` (cost per zero) makes zeros attractive."""
    hulls = []
    for component, treatments, costs in zip(
        table.components, table.treatments, table.costs, strict=True
    ):
        sizes = [component.size_bytes(t) for t in treatments]
        net = [c - reward * component.zeros(t) for c, t in zip(costs, treatments, strict=True)]
        hull = convex_hull(sizes, net)
        if not hull:
            raise EdgeDtmError(f"{component.name} has no usable treatment: allow more --types")
        hulls.append(hull)
    return hulls


def _steps(table: CostTable, hulls: list[list[int]], reward: float = 0.0) -> list[_Step]:
    """All hull steps in the order of falling gain per byte, each component's own in its order."""

    def net(c: int, j: int) -> float:
        return table.costs[c][j] - reward * table.components[c].zeros(table.treatments[c][j])

    heap: list[tuple[float, int, int]] = []

    def push(c: int, position: int) -> None:
        a, b = hulls[c][position], hulls[c][position + 1]
        component = table.components[c]
        extra = component.size_bytes(table.treatments[c][b]) - component.size_bytes(
            table.treatments[c][a]
        )
        heapq.heappush(heap, (-(net(c, a) - net(c, b)) / extra, c, position))

    for c, hull in enumerate(hulls):
        if len(hull) > 1:
            push(c, 0)
    steps = []
    while heap:
        _, c, position = heapq.heappop(heap)
        a, b = hulls[c][position], hulls[c][position + 1]
        component = table.components[c]
        steps.append(
            _Step(
                c,
                b,
                component.size_bytes(table.treatments[c][b])
                - component.size_bytes(table.treatments[c][a]),
                net(c, a) - net(c, b),
            )
        )
        if position + 2 < len(hulls[c]):
            push(c, position + 1)
    return steps


def _plan(table: CostTable, choice: Sequence[int]) -> Plan:
    return Plan(
        table.components,
        tuple(ts[j] for ts, j in zip(table.treatments, choice, strict=True)),
        table.fixed_bytes,
    )


def _with_fixed_edges(table: CostTable, reward: float = 0.0) -> Iterator[CostTable]:
    """The table once for each choice of treatments of `token_embd` and `output`.

    In a small model a step of the embedding is a tenth of the file. A greedy walk that meets such
    a step too early or too late strays far from the optimum; tried one by one it cannot.
    """
    hulls = _hulls(table, reward)
    edges = [i for i, c in enumerate(table.components) if not c.in_block]
    for chosen in product(*(hulls[i] for i in edges)):
        treatments, costs = list(table.treatments), list(table.costs)
        for i, j in zip(edges, chosen, strict=True):
            treatments[i], costs[i] = (treatments[i][j],), (costs[i][j],)
        yield CostTable(table.components, tuple(treatments), tuple(costs), table.fixed_bytes)


def _within(table: CostTable, max_bytes: int, reward: float) -> Plan:
    best: tuple[float, Plan] | None = None
    smallest = None
    for fixed in _with_fixed_edges(table, reward):
        size, plan = _walk(fixed, max_bytes, reward)
        smallest = size if smallest is None else min(smallest, size)
        if plan is None:
            continue
        net = fixed.cost(plan) - reward * sum(
            c.zeros(t) for c, t in zip(plan.components, plan.treatments, strict=True)
        )
        if best is None or net < best[0]:
            best = (net, plan)
    if best is None:
        assert smallest is not None
        raise EdgeDtmError(
            f"the smallest plan takes {smallest:,} bytes, the budget is {max_bytes:,}: raise "
            f"--max-bytes by {smallest - max_bytes:,} or allow smaller --types"
        )
    return best[1]


def _walk(table: CostTable, max_bytes: int, reward: float) -> tuple[int, Plan | None]:
    """The smallest size, and the greedy plan within max_bytes if that is not too large."""
    hulls = _hulls(table, reward)
    choice = [hull[0] for hull in hulls]
    smallest = size = _plan(table, choice).size_bytes
    if size > max_bytes:
        return smallest, None
    blocked: set[int] = set()
    for step in _steps(table, hulls, reward):
        if step.component in blocked:
            continue
        if size + step.extra_bytes > max_bytes:
            # Its later steps build on this one; cheaper steps of others may still fit.
            blocked.add(step.component)
            continue
        choice[step.component] = step.treatment
        size += step.extra_bytes
    return smallest, _plan(table, choice)


def search(table: CostTable, max_bytes: int, zero_share: float = 0.0) -> Plan:
    """The plan of least summed cost within max_bytes, optimal up to one step of a block matrix.

    zero_share: average share of zeros wanted over the block matrices; met exactly up to one
    weight a row of one component. EdgeDtmError when no plan fits.
    """
    if zero_share <= 0:
        return _within(table.restricted(_types(table), sparse=False), max_bytes, 0.0)
    low, high = 0.0, 1e-12
    plan = _within(table, max_bytes, high)
    while plan.zero_share < zero_share:
        low, high = high, high * 8
        if high > 1e9:
            raise EdgeDtmError(
                f"an average of {zero_share:.0%} zeros does not fit: at most "
                f"{plan.zero_share:.1%} within {max_bytes:,} bytes, since zeros are only put into "
                "F16 and Q8_0 components; raise --max-bytes or lower --sparsity"
            )
        plan = _within(table, max_bytes, high)
    for _ in range(60):
        middle = (low * high) ** 0.5 if low else high / 8
        trial = _within(table, max_bytes, middle)
        if trial.zero_share >= zero_share:
            high, plan = middle, trial
        else:
            low = middle
        if low and high / low < 1 + 1e-9:
            break
    return _trim_zeros(table, plan, zero_share)


MIXES = tuple(i / 32 for i in range(33))


def search_transfer(table: CostTable, max_bytes: int, max_transfer_bytes: int) -> Plan:
    """The plan of least summed cost whose file has at most max_bytes and, after zstd, at most
    max_transfer_bytes. EdgeDtmError when there is none.

    Each mixture of the two currencies has its own hulls and its own greedy walk, which takes a
    step only where both limits allow it; the cheapest of the plans is taken. Treatments with zeros
    take part like all others: they are chosen where what they save on the way is worth their cost.
    """
    assert table.transfers is not None
    best: tuple[float, Plan] | None = None
    for mix in MIXES:
        plan = _walk_both(table, max_bytes, max_transfer_bytes, mix)
        if plan is not None and (best is None or table.cost(plan) < best[0]):
            best = (table.cost(plan), plan)
    if best is None:
        least = table.fixed_transfer_bytes + sum(map(min, table.transfers))
        raise EdgeDtmError(
            f"no plan has at most {max_bytes:,} bytes and {max_transfer_bytes:,} after zstd: the "
            f"least that travels is {least:,}; raise --max-transfer or --max-bytes, or allow "
            "smaller --types"
        )
    return best[1]


def _walk_both(
    table: CostTable, max_bytes: int, max_transfer_bytes: int, mix: float
) -> Plan | None:
    """The greedy walk in one mixture: 0 is bytes of the file only, 1 what travels only."""
    assert table.transfers is not None
    files = [
        [c.size_bytes(t) for t in ts]
        for c, ts in zip(table.components, table.treatments, strict=True)
    ]
    mixed = [
        [
            (1 - mix) * f / max_bytes + mix * n / max_transfer_bytes
            for f, n in zip(a, b, strict=True)
        ]
        for a, b in zip(files, table.transfers, strict=True)
    ]
    hulls = [convex_hull(m, c) for m, c in zip(mixed, table.costs, strict=True)]
    for component, hull in zip(table.components, hulls, strict=True):
        if not hull:
            raise EdgeDtmError(f"{component.name} has no usable treatment: allow more --types")
    choice = [hull[0] for hull in hulls]
    size = table.fixed_bytes + sum(f[j] for f, j in zip(files, choice, strict=True))
    travels = table.fixed_transfer_bytes + sum(
        n[j] for n, j in zip(table.transfers, choice, strict=True)
    )
    heap: list[tuple[float, int, int]] = []

    def push(c: int, position: int) -> None:
        if position + 1 < len(hulls[c]):
            a, b = hulls[c][position], hulls[c][position + 1]
            gain = table.costs[c][a] - table.costs[c][b]
            heapq.heappush(heap, (-gain / (mixed[c][b] - mixed[c][a]), c, position))

    for c in range(len(hulls)):
        push(c, 0)
    while heap:
        _, c, position = heapq.heappop(heap)
        a, b = hulls[c][position], hulls[c][position + 1]
        more, further = files[c][b] - files[c][a], table.transfers[c][b] - table.transfers[c][a]
        # The smallest in one currency may be too large in the other: then steps lead back to it.
        if (more > 0 and size + more > max_bytes) or (
            further > 0 and travels + further > max_transfer_bytes
        ):
            continue  # its later steps build on this one; cheaper steps of others may still fit
        choice[c], size, travels = b, size + more, travels + further
        push(c, position + 1)
    if size > max_bytes or travels > max_transfer_bytes:
        return None
    return _plan(table, choice)


def _types(table: CostTable) -> list[str]:
    return sorted({t.type for ts in table.treatments for t in ts})


def _trim_zeros(table: CostTable, plan: Plan, zero_share: float) -> Plan:
    """Give back the zeros beyond the share asked for, where each given back saves most."""
    total = sum(c.weights for c in plan.components if c.in_block)
    excess = sum(c.zeros(t) for c, t in zip(plan.components, plan.treatments, strict=True)) - round(
        zero_share * total
    )
    treatments = list(plan.treatments)
    while excess > 0:
        best: tuple[float, int, float] | None = None
        for i, (component, treatment) in enumerate(zip(plan.components, treatments, strict=True)):
            if not treatment.zero_share or component.rows > excess:
                continue
            levels = [
                t.zero_share
                for t in table.treatments[i]
                if t.type == treatment.type and t.zero_share < treatment.zero_share
            ]
            if not levels:  # zeros that have to stay
                continue
            below = max(levels)
            given_back = component.zeros(treatment) - component.zeros(
                Treatment(treatment.type, below)
            )
            saved = table._cost(i, treatment) - table._cost(i, Treatment(treatment.type, below))
            rate = saved / max(given_back, 1)
            if best is None or rate > best[0]:
                best = (rate, i, below)
        if best is None:
            break
        _, i, below = best
        component, treatment = plan.components[i], treatments[i]
        full = component.zeros(treatment) - component.zeros(Treatment(treatment.type, below))
        rows_worth = min(full, excess) // component.rows
        left = component.zeros(treatment) // component.rows - rows_worth
        treatments[i] = Treatment(
            treatment.type,
            below if rows_worth * component.rows == full else left / component.row_length,
        )
        excess -= rows_worth * component.rows
    return Plan(plan.components, tuple(treatments), plan.fixed_bytes)


def least_divergent_share(table: CostTable, coarse: str, fine: str, share: float) -> Plan:
    """That share of the block matrices, counted as components, in the type `coarse`, those of the
    least cost there; all other components in `fine`. The int8 experiment of the paper (arXiv
    2311.01544): Q8_0 and F16."""
    blocks = [i for i, c in enumerate(table.components) if c.in_block]
    order = sorted(blocks, key=lambda i: (table._cost(i, Treatment(coarse)), i))
    chosen = set(order[: round(share * len(blocks))])
    kinds = tuple(Treatment(coarse if i in chosen else fine) for i in range(len(table.components)))
    return Plan(table.components, kinds, table.fixed_bytes)
