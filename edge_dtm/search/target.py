"""The smallest file that meets a target of SDT or FDT, found by trying sizes for real.

Pure: what a size predicts comes from the frontier, what it measures from a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_dtm.search.allocation import FrontierPoint

TRIES = 4
NEAR = 0.01  # a saving below this share of the file is not worth another replay


@dataclass(frozen=True)
class Target:
    """At most max_sdt (share), at least min_fdt (tokens); None asks for nothing."""

    max_sdt: float | None = None
    min_fdt: float | None = None

    def met(self, sdt: float, fdt: float) -> bool:
        return (self.max_sdt is None or sdt <= self.max_sdt) and (
            self.min_fdt is None or fdt >= self.min_fdt
        )

    def __str__(self) -> str:
        wanted = []
        if self.max_sdt is not None:
            wanted.append(f"an SDT of at most {self.max_sdt:.2%}")
        if self.min_fdt is not None:
            wanted.append(f"a mean FDT of at least {self.min_fdt:.1f}")
        return " and ".join(wanted)


@dataclass(frozen=True)
class Attempt:
    """One size that was tried: SDT as a share, FDT in tokens."""

    size_bytes: int
    predicted_sdt: float
    predicted_fdt: float
    sdt: float
    fdt: float


def smallest(
    points: Sequence[FrontierPoint],
    target: Target,
    attempt: Callable[[int], Attempt],
    max_bytes: int,
) -> tuple[Attempt | None, list[Attempt]]:
    """The smallest attempt that met the target (None: none did), and all that were made.

    points: the frontier, sizes rising. attempt: measures the best plan within that many bytes.
    After each attempt the prediction is corrected by what it was wrong by there.
    """
    tried: list[Attempt] = []
    points = [p for p in points if p.size_bytes <= max_bytes]
    sdt_error = fdt_error = 1.0
    while points and len(tried) < TRIES:
        missed = max((a.size_bytes for a in tried if not target.met(a.sdt, a.fdt)), default=0)
        met = min((a.size_bytes for a in tried if target.met(a.sdt, a.fdt)), default=None)
        wanted = next(
            (p for p in points if target.met(p.sdt * sdt_error, p.fdt * fdt_error)), points[-1]
        )
        size = wanted.size_bytes
        if size <= missed:
            # The correction says that what was missed would do: go on in small steps.
            size = next(
                (p.size_bytes for p in points if p.size_bytes > missed * (1 + NEAR)),
                points[-1].size_bytes,
            )
        if met is not None and size > met * (1 - NEAR):
            break
        if size in (a.size_bytes for a in tried) or size <= missed:
            break
        tried.append(attempt(size))
        last = tried[-1]
        sdt_error = last.sdt / last.predicted_sdt if last.predicted_sdt else 1.0
        fdt_error = last.fdt / last.predicted_fdt if last.predicted_fdt else 1.0
    good = [a for a in tried if target.met(a.sdt, a.fdt)]
    return min(good, key=lambda a: a.size_bytes, default=None), tried
