"""Verdicts of several devices or builds on one bundle: one table, and the odd one out. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.verdict_file import device_name

if TYPE_CHECKING:
    from rich.table import Table

VerdictJson = Mapping[str, Any]

# A robust z-score above 3.5 is an outlier: Iglewicz and Hoaglin, How to Detect and Handle
# Outliers, 1993; 1.4826 makes the MAD of a normal distribution its standard deviation.
OUTLIER, MAD_TO_SIGMA = 3.5, 1.4826
ENOUGH = 3  # of two that differ, either can be the wrong one
# Devices of one kind give the very same figures, so that their MAD is 0. What is no larger than
# these is how healthy kernels differ: a tenth of the KL that is allowed, 2 % of the argmaxes.
KL_ROOM, ARGMAX_ROOM = 0.1, 0.02


@dataclass(frozen=True)
class Row:
    """One verdict, under a name that no other has.

    Shares 0 to 1, FDT in tokens, KL in nats; None where it was not measured.
    """

    file: str
    device: str
    build: str
    passed: bool
    diagnosis: str
    mode: str
    sequences: int
    sdt: float | None
    fdt: float
    kl_vs_host_nats: float | None
    other_argmaxes_vs_host: float | None
    decided_sdt_vs_host: float | None
    kernels: int
    wrong_kernels: int
    decode_tokens_per_s: float | None
    peak_rss_bytes: float | None


@dataclass(frozen=True)
class Odd:
    """A verdict that is further from the host than the others are, and by which figure."""

    file: str
    words: str


@dataclass(frozen=True)
class Comparison:
    """rows in the order given; odd: those out of line; words: what can be said about that."""

    bundle: str
    rows: Sequence[Row]
    odd: Sequence[Odd]
    words: str
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "edge-dtm comparison",
            "schema_version": 1,
            "bundle": self.bundle,
            "verdicts": [asdict(r) for r in self.rows],
            "odd": [asdict(o) for o in self.odd],
            "words": self.words,
            "notes": list(self.notes),
        }


def compare(verdicts: Sequence[tuple[Path, VerdictJson]]) -> Comparison:
    """Verdicts as verdict_file.read_verdict gives them. EdgeDtmError when they are of different
    bundles, one is given twice, or there is only one."""
    if len(verdicts) < 2:
        raise EdgeDtmError("one verdict alone compares with nothing: give two or more")
    _require_one_bundle(verdicts)
    names = [path.stem for path, _ in verdicts]
    if len(set(names)) < len(names):
        names = [str(path) for path, _ in verdicts]
    if len(set(names)) < len(names):
        raise EdgeDtmError("a verdict is given twice: give each one once")
    rows = [_row(name, data) for name, (_, data) in zip(names, verdicts, strict=True)]
    odd = _odd(rows, min(data["thresholds"]["max_kl_vs_host"] for _, data in verdicts))
    return Comparison(
        bundle=verdicts[0][1]["bundle"]["manifest_sha256"],
        rows=rows,
        odd=odd,
        words=_words(rows, odd),
        notes=_notes([data for _, data in verdicts]),
    )


def _require_one_bundle(verdicts: Sequence[tuple[Path, VerdictJson]]) -> None:
    by_bundle: dict[str, list[str]] = {}
    for path, data in verdicts:
        by_bundle.setdefault(data["bundle"]["manifest_sha256"], []).append(str(path))
    if len(by_bundle) > 1:
        groups = "; ".join(
            f"{', '.join(paths)}: bundle {digest[:12]}" for digest, paths in by_bundle.items()
        )
        raise EdgeDtmError(
            f"the verdicts are of different bundles ({groups}): compare one at a time"
        )


def _row(name: str, v: VerdictJson) -> Row:
    kernels, performance = v["kernels"], v["performance"]
    return Row(
        file=name,
        device=device_name(v),
        build=v["runtime"]["llama_cpp_python"],
        passed=v["passed"],
        diagnosis=v["diagnosis"]["code"],
        mode=v["mode"],
        sequences=v["sequences"],
        sdt=_sdt(v["against_original"]),
        fdt=v["against_original"]["fdt"]["value"],
        kl_vs_host_nats=v["kl_vs_host_nats"],
        other_argmaxes_vs_host=_sdt(v["against_host"]),
        decided_sdt_vs_host=v["decided_sdt_vs_host"],
        kernels=len(kernels),
        wrong_kernels=sum(not k["ok"] for k in kernels),
        decode_tokens_per_s=performance["decode_tokens_per_s"],
        peak_rss_bytes=performance["peak_rss_bytes"],
    )


def _sdt(divergence: Mapping[str, Any]) -> float | None:
    return None if divergence["sdt"] is None else divergence["sdt"]["value"]


def _odd(rows: Sequence[Row], max_kl: float) -> list[Odd]:
    """One entry a verdict, with its most telling figure."""
    by_kl = outliers([(r.file, r.kl_vs_host_nats) for r in rows], KL_ROOM * max_kl)
    by_argmax = outliers([(r.file, r.other_argmaxes_vs_host) for r in rows], ARGMAX_ROOM)
    odd = {
        file: f"the share of other tokens than the host's is {x:.2%}, the median is {median:.2%}"
        for file, x, median in by_argmax
    } | {
        file: f"KL from the host is {x:.2g} nats, the median is {median:.2g} nats"
        for file, x, median in by_kl
    }
    return [Odd(r.file, f"{r.file}: {odd[r.file]}") for r in rows if r.file in odd]


def outliers(
    values: Sequence[tuple[str, float | None]], room: float
) -> list[tuple[str, float, float]]:
    """(name, value, median) of those far above the median, by the MAD, and by more than room.

    Only above: one that is nearer to the host than the others is not broken. Fewer than ENOUGH
    values have no outlier; None is no value.
    """
    known = [(name, x) for name, x in values if x is not None]
    if len(known) < ENOUGH:
        return []
    median = statistics.median(x for _, x in known)
    spread = MAD_TO_SIGMA * statistics.median(abs(x - median) for _, x in known)
    limit = median + max(OUTLIER * spread, room)
    return [(name, x, median) for name, x in known if x > limit]


def _words(rows: Sequence[Row], odd: Sequence[Odd]) -> str:
    comparable = sum(r.kl_vs_host_nats is not None for r in rows)
    if comparable < ENOUGH:
        return (
            f"Odd one out: cannot tell. It takes {ENOUGH} verdicts with a KL from the host, here "
            f"{'is' if comparable == 1 else 'are'} {comparable}: of two that differ, either can be "
            "wrong."
        )
    return f"Odd one out: {'; '.join(o.words for o in odd) or 'none'}."


def _notes(verdicts: Sequence[VerdictJson]) -> list[str]:
    notes = []
    if len({v["mode"] for v in verdicts}) > 1:
        notes.append("the modes differ, so compare FDT only within one mode")
    if len({(v["sequences"], tuple(v["lengths"])) for v in verdicts}) > 1:
        notes.append("the verdicts cover different sequences, some of which are easier than others")
    return notes


# --- for a terminal ---------------------------------------------------------------------------

_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("SDT", lambda r: _text(r.sdt, ".2%")),
    ("FDT", lambda r: _text(r.fdt, ".1f")),
    ("KL vs host", lambda r: _text(r.kl_vs_host_nats, ".2g")),
    ("sure, other", lambda r: _text(r.decided_sdt_vs_host, ".2%")),
    ("kernels", lambda r: f"{r.kernels - r.wrong_kernels}/{r.kernels}" if r.kernels else ""),
    ("tokens/s", lambda r: _text(r.decode_tokens_per_s, ",.1f")),
    ("MB", lambda r: _text(r.peak_rss_bytes, ",.0f", 1e-6)),
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
        out.add_row(
            escape(printable(row.file)) + (" [bold yellow]← odd[/]" if row.file in odd else ""),
            escape(printable(row.device)),
            escape(printable(row.build)),
            "[green]PASS[/]" if row.passed else f"[red]FAIL[/] {row.diagnosis}",
            *(cell(row) for _, cell in _COLUMNS),
        )
    return out


def printable(words: str) -> str:
    """Verdicts come from elsewhere: nothing in them may steer the terminal."""
    return "".join(ch if ch.isprintable() else "?" for ch in words)


def _text(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(value * scale, form)
