"""A comparison for people at a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_dtm.report.compare import Comparison, Row

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("SDT", lambda r: _share(r.sdt)),
    ("FDT", lambda r: f"{r.fdt:.1f}"),
    ("KL vs host", lambda r: "" if r.kl_vs_host_nats is None else f"{r.kl_vs_host_nats:.2g}"),
    ("sure, other", lambda r: _share(r.decided_sdt_vs_host)),
    ("kernels", lambda r: f"{r.kernels - r.wrong_kernels}/{r.kernels}" if r.kernels else ""),
    ("tokens/s", lambda r: _plain(r.decode_tokens_per_s)),
    ("MB", lambda r: _plain(None if r.peak_rss_bytes is None else r.peak_rss_bytes / 1e6, 0)),
    ("sequences", lambda r: str(r.sequences)),
)


def table(comparison: Comparison) -> Table:
    """A row a verdict; the odd ones are marked."""
    from rich.markup import escape
    from rich.table import Table

    odd = {o.file for o in comparison.odd}
    out = Table(
        "verdict", "device", "build", "",
        caption="KL in nats; sure, other: share of other tokens where the host was sure",
    )  # fmt: skip
    for name, _ in _COLUMNS:
        out.add_column(name, justify="right")
    for row in comparison.rows:
        word = "[green]PASS[/]" if row.passed else f"[red]FAIL[/] {row.diagnosis}"
        out.add_row(
            escape(printable(row.file)) + (" [bold yellow]← odd[/]" if row.file in odd else ""),
            escape(printable(row.device)),
            escape(printable(row.build)),
            word,
            *(cell(row) for _, cell in _COLUMNS),
        )
    return out


def printable(words: str) -> str:
    """Verdicts come from elsewhere: nothing in them may steer the terminal."""
    return "".join(ch if ch.isprintable() else "?" for ch in words)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _plain(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
