"""A verdict for people at a terminal: one table, the diagnosis, PASS or FAIL last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edge_dtm.core.metrics import Divergence
from edge_dtm.formats.verdict import Verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Print it; the last line begins with PASS or FAIL."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print(_table(verdict))
    lines = _lines(verdict)
    if not verdict.passed:
        lines.append(verdict.diagnosis.words)
    # Text, not markup: whatever a bundle says stays what it is.
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    word = Text("PASS", "bold green") if verdict.passed else Text("FAIL", "bold red")
    console.print(word.append(f" {' '.join(verdict.reasons)}", "not bold default"), soft_wrap=True)


def _table(verdict: Verdict) -> Table:
    from rich.table import Table

    e, limits = verdict.evidence, verdict.thresholds
    table = Table(
        title=f"{verdict.sequences} of {verdict.sequences_in_bundle} sequences; FDT in tokens, of at "
        f"most {e.against_original.largest_fdt:.1f}"
    )
    for name in ("", "measured", "95 % interval", "threshold", "noise floor"):
        table.add_column(name, justify="left" if not name else "right")

    def divergence(
        name: str, d: Divergence, sdt_limit: str, fdt_limit: str, floor: Mapping[str, object]
    ) -> None:
        if e.mode == "teacher_forced":
            interval = f"{d.sdt.low:.1%} to {d.sdt.high:.1%}"
            table.add_row(
                f"SDT {name}", f"{d.sdt.value:.2%}", interval, sdt_limit, _number(floor, "sdt", "%")
            )
        table.add_row(
            f"FDT {name}",
            f"{d.fdt.value:.1f}",
            f"{d.fdt.low:.1f} to {d.fdt.high:.1f}",
            fdt_limit,
            _number(floor, "fdt", ""),
        )
        share = _number(floor, "identical_share", "%")
        table.add_row(f"identical {name}", f"{d.identical_share:.1%}", "", "", share)

    original = e.against_original
    divergence(
        "vs original",
        original,
        f"≤ {limits.max_sdt:.2%}",
        f"≥ {limits.min_fdt:.1f}",
        verdict.noise_floor,
    )
    if e.mode == "teacher_forced":
        label = f"near-ties (≤ {original.near_tie_margin:.2g})"
        table.add_row(label, f"{original.near_tie_share:.2%}")
    divergence("vs host", e.against_host, "", "", {})
    if e.host is not None:
        limit = f"≤ {limits.max_kl_vs_host:.2g}"
        table.add_row("KL vs host, nats", f"{e.host.kl_nats:.2g}", "", limit)
        table.add_row(
            f"SDT vs host where sure (≥ {limits.decided_margin:g})",
            f"{e.host.decided_sdt:.2%}",
            "",
            f"≤ {limits.max_decided_sdt_vs_host:.2%}",
        )
    if e.kl_probe_nats is not None:
        table.add_row(
            "KL vs host, small F16 model",
            f"{e.kl_probe_nats:.2g}",
            "",
            f"≤ {limits.max_kl_probe:.2g}",
        )
    if e.kernels:
        right = sum(k.ok for k in e.kernels)
        table.add_row("kernels that agree with numpy", f"{right} of {len(e.kernels)}")
    for name, label, scale, digits in (
        ("prefill_tokens_per_s", "prefill, tokens/s", 1, 1),
        ("decode_tokens_per_s", "decode, tokens/s", 1, 1),
        ("time_to_first_token_s", "time to first token, s", 1, 2),
        ("peak_rss_bytes", "peak memory, MB", 1e-6, 0),
    ):
        value = verdict.performance.get(name)
        if value is not None:
            table.add_row(label, f"{value * scale:.{digits}f}")
    return table


def _lines(verdict: Verdict) -> list[str]:
    out = [f"Note: {note}." for note in verdict.notes]
    if (early := verdict.stopped_early) is not None:
        out.append(
            f"Stopped after {early.after_sequences} of {verdict.sequences_in_bundle} sequences: the "
            f"verdict of all is certain at {early.certainty:.0%} ({early.by}); "
            f"{early.saved_tokens:,} tokens were not needed."
        )
    if (both := verdict.kernels_compared) is not None:
        if both.differing_tokens:
            out.append(
                f"With and without repacked weights: {both.differing_tokens} of {both.positions:,} "
                f"tokens differ, mean KL {both.kl_nats:.2g} nats."
            )
        elif both.kl_nats == 0:
            out.append(
                f"With and without repacked weights: the same logits at all {both.positions:,} "
                "positions; probably no type of this file is repacked on this CPU."
            )
        else:
            out.append(
                f"With and without repacked weights: the same tokens at all {both.positions:,} "
                f"positions, mean KL {both.kl_nats:.2g} nats."
            )
    return out


def _number(floor: Mapping[str, object], name: str, unit: str) -> str:
    """A number, or the value of an Interval's JSON; nothing where there is neither."""
    value = floor.get(name)
    if isinstance(value, dict):
        value = value.get("value")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    return f"{value:.2%}" if unit else f"{value:.1f}"
