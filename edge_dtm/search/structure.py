"""What may be removed from a model whole, and whether removing it pays. Pure.

A unit is an attention part or an FFN of one layer. Keeping fewer of its KV groups or neurons makes
all its matrices smaller by the same share, so that it saves memory, time and bytes to transfer
alike, and costs what the measured change of the margins is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.search.cost_table import CostTable


@dataclass(frozen=True)
class UnitOptions:
    """One unit, as the search sees it.

    components: its matrices' names; weights: of all of them; full: KV groups or neurons it has;
    kept, costs: of each option how many stay and the cost (mean-square margin change, logits
    squared) of removing the others, the matrices otherwise untouched.
    """

    name: str
    components: tuple[str, ...]
    weights: int
    full: int
    kept: tuple[int, ...]
    costs: tuple[float, ...]


def _best(unit: UnitOptions, whole: float, reward: float) -> tuple[int, float]:
    """(kept, objective): least of removal's cost plus the share that stays times what the whole
    unit costs, `whole`, minus `reward` for each weight removed."""
    options = [(whole, unit.full)]
    for kept, cost in zip(unit.kept, unit.costs, strict=True):
        share = kept / unit.full
        options.append((cost + share * whole - reward * (1 - share) * unit.weights, kept))
    objective, kept = min(options, key=lambda o: (o[0], -o[1]))
    return kept, objective


def removed_share(units: Sequence[UnitOptions], kept: Mapping[str, int]) -> float:
    """Weights removed over all weights of the units."""
    total = sum(u.weights for u in units)
    gone = sum((1 - kept.get(u.name, u.full) / u.full) * u.weights for u in units)
    return gone / total if total else 0.0


def remove_share(units: Sequence[UnitOptions], share: float) -> dict[str, int]:
    """At least this share of the units' weights removed at the least cost: unit -> kept, of those
    that lose something. EdgeDtmError when so much cannot be removed."""
    if removed_share(units, {u.name: min(u.kept, default=u.full) for u in units}) < share:
        raise EdgeDtmError(
            f"{share:.0%} of the block matrices cannot be removed: every FFN keeps a block of "
            "neurons; lower --remove"
        )

    def at(reward: float) -> dict[str, int]:
        return {u.name: _best(u, 0.0, reward)[0] for u in units}

    low, high = 0.0, 1e-12
    while removed_share(units, at(high)) < share:
        low, high = high, high * 4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if removed_share(units, at(middle)) >= share else (middle, high)
    kept = at(high)
    return {u.name: kept[u.name] for u in units if kept[u.name] < u.full}


def worth_removing(
    units: Sequence[UnitOptions], table: CostTable, max_bytes: int
) -> dict[str, int]:
    """Which removals the best plan within max_bytes makes, types, zeros and removals searched
    together: unit -> kept, empty where keeping everything in cheaper types is better.

    For a price of a byte every component takes the type of least cost plus price; a unit loses
    what costs less than that share of its components' cost and bytes. The price is the lowest at
    which all fits. A smaller matrix is taken to cost its share of what the whole one does.
    """
    by_name = {c.name: i for i, c in enumerate(table.components)}
    units_of = {name: u for u in units for name in u.components}
    loose = [i for i, c in enumerate(table.components) if c.name not in units_of]

    def cheapest(i: int, price: float) -> tuple[float, int]:
        component = table.components[i]
        options = [
            (cost + price * component.size_bytes(t), component.size_bytes(t))
            for t, cost in zip(table.treatments[i], table.costs[i], strict=True)
            if isfinite(cost)  # an overflow in F16, say
        ]
        if not options:
            raise EdgeDtmError(f"{component.name} has no usable treatment: allow more --types")
        return min(options)

    def at(price: float) -> tuple[float, dict[str, int]]:
        size = table.fixed_bytes + float(sum(cheapest(i, price)[1] for i in loose))
        kept = {}
        for u in units:
            chosen = [cheapest(by_name[n], price) for n in u.components]
            kept[u.name] = _best(u, sum(objective for objective, _ in chosen), 0.0)[0]
            size += kept[u.name] / u.full * sum(size_bytes for _, size_bytes in chosen)
        return size, kept

    if at(0.0)[0] <= max_bytes:
        price = 0.0
    else:
        low, price = 0.0, 1e-15
        while at(price)[0] > max_bytes:
            low, price = price, price * 4
            if price > 1e9:
                raise EdgeDtmError(
                    f"no plan fits {max_bytes:,} bytes, whatever is removed: raise --max-bytes"
                )
        for _ in range(80):
            middle = (low + price) / 2
            low, price = (low, middle) if at(middle)[0] <= max_bytes else (middle, price)
    kept = at(price)[1]
    return {u.name: kept[u.name] for u in units if kept[u.name] < u.full}
