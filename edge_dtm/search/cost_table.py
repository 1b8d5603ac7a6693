"""For every component its candidate treatments, their bytes and their costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import Component, Plan, Treatment


@dataclass(frozen=True)
class CostTable:
    """For every component its candidate treatments and their costs (mean-square margin change,
    in logits squared), `fixed_bytes` being what the file holds besides the components."""

    components: tuple[Component, ...]
    treatments: tuple[tuple[Treatment, ...], ...]
    costs: tuple[tuple[float, ...], ...]
    fixed_bytes: int
    # Bytes that travel for each treatment: after zstd, where zeros count.
    transfers: tuple[tuple[int, ...], ...] | None = None
    fixed_transfer_bytes: int = 0

    def cost(self, plan: Plan) -> float:
        """sigma^2 of a plan. Zero shares between two measured levels are interpolated linearly."""
        by_name = plan.by_name()
        return sum(self._cost(i, by_name[c.name]) for i, c in enumerate(self.components))

    def _cost(self, index: int, treatment: Treatment) -> float:
        pairs = zip(self.treatments[index], self.costs[index], strict=True)
        points = sorted((t.zero_share, cost) for t, cost in pairs if t.type == treatment.type)
        if not points or not points[0][0] <= treatment.zero_share <= points[-1][0]:
            raise KeyError(f"{self.components[index].name} has no measured {treatment}")
        shares, costs = [p[0] for p in points], [p[1] for p in points]
        return float(np.interp(treatment.zero_share, shares, costs))

    def restricted(self, types: Sequence[str], sparse: bool) -> CostTable:
        """The same table with only these types and, unless `sparse`, without zeros."""
        keep = [
            [j for j, t in enumerate(ts) if t.type in types and (sparse or not t.zero_share)]
            for ts in self.treatments
        ]
        empty = [c.name for c, k in zip(self.components, keep, strict=True) if not k]
        if empty:
            raise EdgeDtmError(
                f"none of the types {', '.join(types)} fits {len(empty)} components "
                f"({', '.join(empty[:4])}, ...): allow a type with blocks of 32, for example Q8_0"
            )
        return CostTable(
            self.components,
            tuple(tuple(ts[j] for j in k) for ts, k in zip(self.treatments, keep, strict=True)),
            tuple(tuple(cs[j] for j in k) for cs, k in zip(self.costs, keep, strict=True)),
            self.fixed_bytes,
            None
            if self.transfers is None
            else tuple(tuple(n[j] for j in k) for n, k in zip(self.transfers, keep, strict=True)),
            self.fixed_transfer_bytes,
        )

    def transfer_bytes(self, plan: Plan) -> int:
        """About what the plan's GGUF has after zstd; the treatments must be measured ones."""
        assert self.transfers is not None
        return self.fixed_transfer_bytes + sum(
            sizes[ts.index(t)]
            for sizes, ts, t in zip(self.transfers, self.treatments, plan.treatments, strict=True)
        )
