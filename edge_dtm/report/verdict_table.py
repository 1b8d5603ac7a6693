"""A verdict for people at a terminal: one table, the diagnosis, PASS or FAIL last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edge_dtm.core.metrics import Divergence
from edge_dtm.formats.verdict import KernelsCompared, Verdict
from edge_dtm.report.numbers import estimate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SPEEDS = (
    # key in the verdict, name, scale, digits
    ("prefill_tokens_per_s", "prefill, tokens/s", 1, 1),
    ("decode_tokens_per_s", "decode, tokens/s", 1, 1),
    ("time_to_first_token_s", "time to first token, s", 1, 2),
    ("peak_rss_bytes", "peak memory, MB", 1e-6, 0),
)


def print_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Print it; the last line begins with PASS or FAIL."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print(_table(verdict))
    lines = [f"Note: {note}." for note in verdict.notes]
    if verdict.kernels_compared is not None:
        lines.append(_repacking(verdict.kernels_compared))
    if not verdict.passed:
        lines.append(verdict.diagnosis.words)
    # Text, not markup: whatever a bundle says stays what it is.
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    word = Text("PASS", "bold green") if verdict.passed else Text("FAIL", "bold red")
    console.print(word.append(f" {' '.join(verdict.reasons)}", "not bold default"), soft_wrap=True)


def _table(verdict: Verdict) -> Table:
    from rich.table import Table

    e, limits, floor = verdict.evidence, verdict.thresholds, verdict.noise_floor
    table = Table(
        title=f"{verdict.sequences} of {verdict.sequences_in_bundle} sequences; FDT in tokens, of at "
        f"most {e.against_original.largest_fdt:.1f}"
    )
    for name in ("", "measured", "95 % interval", "threshold", "noise floor"):
        table.add_column(name, justify="left" if not name else "right")
    forced = e.mode == "teacher_forced"
    original = e.against_original
    most_sdt, least_fdt = f"≤ {limits.max_sdt:.2%}", f"≥ {limits.min_fdt:.1f}"
    _add_divergence(table, "vs original", original, forced, most_sdt, least_fdt, floor)
    if forced:
        label = f"near-ties (≤ {original.near_tie_margin:.2g})"
        table.add_row(label, f"{original.near_tie_share:.2%}")
    _add_divergence(table, "vs host", e.against_host, forced, "", "", {})
    if e.host is not None:
        limit = f"≤ {limits.max_kl_vs_host:.2g}"
        table.add_row("KL vs host, nats", f"{e.host.kl_nats:.2g}", "", limit)
        sure = f"SDT vs host where sure (≥ {limits.decided_margin:g})"
        limit = f"≤ {limits.max_decided_sdt_vs_host:.2%}"
        table.add_row(sure, f"{e.host.decided_sdt:.2%}", "", limit)
    if e.kl_probe_nats is not None:
        limit = f"≤ {limits.max_kl_probe:.2g}"
        table.add_row("KL vs host, small F16 model", f"{e.kl_probe_nats:.2g}", "", limit)
    if e.kernels:
        right = sum(k.ok for k in e.kernels)
        table.add_row("kernels that agree with numpy", f"{right} of {len(e.kernels)}")
    for key, label, scale, digits in _SPEEDS:
        value = verdict.performance.get(key)
        if value is not None:
            table.add_row(label, f"{value * scale:.{digits}f}")
    return table


def _add_divergence(
    table: Table,
    name: str,
    d: Divergence,
    forced: bool,
    most_sdt: str,
    least_fdt: str,
    floor: Mapping[str, object],
) -> None:
    """Rows of one comparison; forced: teacher-forced, without which there is no SDT."""
    sdt, fdt, identical = (
        "" if (figures := estimate(floor, key)) is None else format(figures[0], form)
        for key, form in (("sdt", ".2%"), ("fdt", ".1f"), ("identical_share", ".2%"))
    )
    if forced:
        between = f"{d.sdt.low:.1%} to {d.sdt.high:.1%}"
        table.add_row(f"SDT {name}", f"{d.sdt.value:.2%}", between, most_sdt, sdt)
    between = f"{d.fdt.low:.1f} to {d.fdt.high:.1f}"
    table.add_row(f"FDT {name}", f"{d.fdt.value:.1f}", between, least_fdt, fdt)
    table.add_row(f"identical {name}", f"{d.identical_share:.1%}", "", "", identical)


def _repacking(both: KernelsCompared) -> str:
    """What verify --kernels compare saw."""
    start = "With and without repacked weights: "
    if both.differing_tokens:
        return (
            f"{start}{both.differing_tokens} of {both.positions:,} tokens differ, mean KL "
            f"{both.kl_nats:.2g} nats."
        )
    if both.kl_nats == 0:
        return (
            f"{start}the same logits at all {both.positions:,} positions; probably no type of this "
            "file is repacked on this CPU."
        )
    return (
        f"{start}the same tokens at all {both.positions:,} positions, mean KL {both.kl_nats:.2g} "
        "nats."
    )
