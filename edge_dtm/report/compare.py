"""Verdicts of several devices or builds on one bundle: one table, and the odd one out. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.verdict_file import device_name

Verdict = Mapping[str, Any]

# A robust z-score above 3.5 is an outlier: Iglewicz and Hoaglin, How to Detect and Handle
# Outliers, 1993; 1.4826 makes the MAD of a normal distribution its standard deviation.
OUTLIER, MAD_TO_SIGMA = 3.5, 1.4826
ENOUGH = 3  # of two that differ, either can be the wrong one
# Devices of one kind give the very same figures, so that their MAD is 0. What is no larger than
# these is how healthy kernels differ: a tenth of the KL that is allowed, 2 % of the argmaxes.
KL_ROOM, ARGMAX_ROOM = 0.1, 0.02


@dataclass(frozen=True)
class Row:
    """One verdict, under a name that no other has. Shares 0 to 1, FDT in tokens, KL in nats; None where it was not measured."""

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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Odd:
    """A verdict that is further from the host than the others are, and by which figure."""

    file: str
    words: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


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
            "verdicts": [r.to_json() for r in self.rows],
            "odd": [o.to_json() for o in self.odd],
            "words": self.words,
            "notes": list(self.notes),
        }


def compare(verdicts: Sequence[tuple[Path, Verdict]]) -> Comparison:
    """Verdicts as verdict_file.read_verdict gives them. EdgeDtmError when they are of different
    bundles, or there is but one."""
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


def _require_one_bundle(verdicts: Sequence[tuple[Path, Verdict]]) -> None:
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


def _row(name: str, v: Verdict) -> Row:
    runtime, kernels = v["runtime"], v["kernels"]
    against_host = v["against_host"]
    return Row(
        file=name,
        device=device_name(v),
        build=runtime["llama_cpp_python"],
        passed=v["passed"],
        diagnosis=v["diagnosis"]["code"],
        mode=v["mode"],
        sequences=v["sequences"],
        sdt=None if v["against_original"]["sdt"] is None else v["against_original"]["sdt"]["value"],
        fdt=v["against_original"]["fdt"]["value"],
        kl_vs_host_nats=v["kl_vs_host_nats"],
        other_argmaxes_vs_host=None
        if against_host["sdt"] is None
        else against_host["sdt"]["value"],
        decided_sdt_vs_host=v["decided_sdt_vs_host"],
        kernels=len(kernels),
        wrong_kernels=sum(not k["ok"] for k in kernels),
        decode_tokens_per_s=v["performance"]["decode_tokens_per_s"],
        peak_rss_bytes=v["performance"]["peak_rss_bytes"],
    )


def _odd(rows: Sequence[Row], max_kl: float) -> list[Odd]:
    """One entry a verdict, with its most telling figure."""
    figures: list[tuple[str, Callable[[Row], float | None], float, Callable[[float], str]]] = [
        (
            "KL from the host",
            lambda r: r.kl_vs_host_nats,
            KL_ROOM * max_kl,
            lambda x: f"{x:.2g} nats",
        ),
        (
            "the share of other tokens than the host's",
            lambda r: r.other_argmaxes_vs_host,
            ARGMAX_ROOM,
            lambda x: f"{x:.2%}",
        ),
    ]
    found: dict[str, Odd] = {}
    for name, value, room, shown in figures:
        known = [(r.file, x) for r in rows if (x := value(r)) is not None]
        for file, x, middle in outliers(known, room):
            words = f"{file}: {name} is {shown(x)}, the median is {shown(middle)}"
            found.setdefault(file, Odd(file, words))
    return list(found.values())


def outliers(values: Sequence[tuple[str, float]], room: float) -> list[tuple[str, float, float]]:
    """(name, value, median) of those far above the median, by the MAD, and by more than room.

    Only above: one that is nearer to the host than the others is not broken. Fewer than ENOUGH
    values have no outlier.
    """
    if len(values) < ENOUGH:
        return []
    middle = statistics.median(x for _, x in values)
    spread = MAD_TO_SIGMA * statistics.median(abs(x - middle) for _, x in values)
    limit = middle + max(OUTLIER * spread, room)
    return [(name, x, middle) for name, x in values if x > limit]


def _words(rows: Sequence[Row], odd: Sequence[Odd]) -> str:
    comparable = sum(r.kl_vs_host_nats is not None for r in rows)
    if comparable < ENOUGH:
        count = {0: "None", 1: "One", 2: "Two"}[comparable]
        return (
            f"Odd one out: cannot tell. {count} of these verdicts {'has' if comparable == 1 else 'have'} "
            f"a KL from the host, {ENOUGH} are needed: of two that differ, either can be wrong."
        )
    if not odd:
        return "Odd one out: none."
    return f"Odd one out: {'; '.join(o.words for o in odd)}."


def _notes(verdicts: Sequence[Verdict]) -> list[str]:
    notes = []
    if len({v["mode"] for v in verdicts}) > 1:
        notes.append("the modes differ, so compare FDT only within one mode")
    if len({(v["sequences"], tuple(v["lengths"])) for v in verdicts}) > 1:
        notes.append("the verdicts cover different sequences, some of which are easier than others")
    return notes
