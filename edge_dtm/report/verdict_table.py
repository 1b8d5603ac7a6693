"""A verdict for people at a terminal: one table, the diagnosis, PASS or FAIL last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edge_dtm.formats.verdict import KernelsCompared, Verdict
from edge_dtm.report.numbers import SPEEDS, number

if TYPE_CHECKING:
    from rich.console import Console


def print_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Print it; the last line begins with PASS or FAIL."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    most = verdict.evidence.against_original.largest_fdt
    table = Table(
        title=f"{verdict.sequences} of {verdict.sequences_in_bundle} sequences; FDT in tokens, of at "
        f"most {most:.1f}"
    )
    for name in ("", "measured", "95 % interval", "threshold", "noise floor"):
        table.add_column(name, justify="right" if name else "left")
    for row in _rows(verdict):
        table.add_row(*row)
    console.print(table)
    lines = [f"Note: {note}." for note in verdict.notes]
    if verdict.kernels_compare is not None:
        lines.append(_repacking(verdict.kernels_compare))
    if not verdict.passed:
        lines.append(verdict.diagnosis.words)
    # Text, not markup: whatever a bundle says stays what it is.
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    word = Text("PASS", "bold green") if verdict.passed else Text("FAIL", "bold red")
    console.print(word.append(f" {' '.join(verdict.reasons)}", "not bold default"), soft_wrap=True)


def _rows(verdict: Verdict) -> Iterator[tuple[str, ...]]:
    """Label, measured, 95 % interval, threshold, noise floor."""
    e, limits = verdict.evidence, verdict.thresholds
    original = e.against_original
    forced = e.mode == "teacher_forced"  # else there is no SDT
    sdt_floor, fdt_floor, identical_floor = (
        "" if (floor := number(verdict.noise_floor, *path)) is None else format(floor, form)
        for *path, form in (
            ("sdt", "value", ".2%"),
            ("fdt", "value", ".1f"),
            ("identical_share", ".2%"),
        )
    )
    if forced:
        limit = f"≤ {limits.max_sdt:.2%}"
        between = f"{original.sdt.low:.1%} to {original.sdt.high:.1%}"
        yield "SDT vs original", f"{original.sdt.value:.2%}", between, limit, sdt_floor
    between = f"{original.fdt.low:.1f} to {original.fdt.high:.1f}"
    limit = f"≥ {limits.min_fdt:.1f}"
    yield "FDT vs original", f"{original.fdt.value:.1f}", between, limit, fdt_floor
    yield "identical vs original", f"{original.identical_share:.1%}", "", "", identical_floor
    host = e.against_host
    if forced:
        yield f"near-ties (≤ {original.near_tie_margin:.2g})", f"{original.near_tie_share:.2%}"
        between = f"{host.sdt.low:.1%} to {host.sdt.high:.1%}"
        yield "SDT vs host", f"{host.sdt.value:.2%}", between
    yield "FDT vs host", f"{host.fdt.value:.1f}", f"{host.fdt.low:.1f} to {host.fdt.high:.1f}"
    yield "identical vs host", f"{host.identical_share:.1%}"
    sure = f"SDT vs host where sure (≥ {limits.decided_margin:g})"
    for label, value, form, most in (
        ("KL vs host, nats", e.host and e.host.kl_vs_host_nats, ".2g", limits.max_kl_vs_host),
        (sure, e.host and e.host.decided_sdt_vs_host, ".2%", limits.max_decided_sdt_vs_host),
        ("KL vs host, small F16 model", e.kl_probe_nats, ".2g", limits.max_kl_probe),
    ):
        if value is not None:
            yield label, format(value, form), "", f"≤ {format(most, form)}"
    if e.kernels:
        right = sum(k.ok for k in e.kernels)
        yield "kernels that agree with numpy", f"{right} of {len(e.kernels)}"
    for label, key, scale, digits in SPEEDS:
        speed = verdict.performance.get(key)
        if speed is not None:
            yield label, f"{speed * scale:.{digits}f}"


def _repacking(both: KernelsCompared) -> str:
    """What verify --kernels compare saw."""
    if both.differing_tokens:
        outcome = f"{both.differing_tokens} of {both.positions:,} tokens differ"
    elif both.kl_nats == 0:
        outcome = (
            f"the same logits at all {both.positions:,} positions; probably no type of this file "
            "is repacked on this CPU"
        )
    else:
        outcome = f"the same tokens at all {both.positions:,} positions"
    if both.kl_nats != 0:
        outcome += f", mean KL {both.kl_nats:.2g} nats"
    return f"With and without repacked weights: {outcome}."
