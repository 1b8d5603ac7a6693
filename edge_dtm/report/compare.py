"""Verdicts of several devices or builds on one bundle: one table, and the odd one out. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
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


def compare(verdicts: Sequence[tuple[Path, VerdictJson]]) -> dict[str, Any]:
    """What `compare --json` writes (docs/formats.md), of verdicts as read_verdict gives them.

    EdgeDtmError when they are of different bundles, one is given twice, or there is only one.
    """
    if len(verdicts) < 2:
        raise EdgeDtmError("one verdict alone compares with nothing: give two or more")
    if len({path.resolve() for path, _ in verdicts}) < len(verdicts):
        raise EdgeDtmError("a verdict is given twice: give each one once")
    digests = {str(path): data["bundle"]["manifest_sha256"] for path, data in verdicts}
    if len(set(digests.values())) > 1:
        each = "; ".join(f"{path}: bundle {digest[:12]}" for path, digest in digests.items())
        raise EdgeDtmError(f"the verdicts are of different bundles ({each}): compare one at a time")
    names = [path.stem for path, _ in verdicts]
    if len(set(names)) < len(names):
        names = list(digests)
    rows = [_row(name, data) for name, (_, data) in zip(names, verdicts, strict=True)]
    odd = _odd(rows, min(data["thresholds"]["max_kl_vs_host"] for _, data in verdicts))
    notes = []
    if len({data["mode"] for _, data in verdicts}) > 1:
        notes.append("the modes differ, so compare FDT only within one mode")
    if len({tuple(data["lengths"]) for _, data in verdicts}) > 1:
        notes.append("the verdicts cover different sequences, some of which are easier than others")
    return {
        "kind": "edge-dtm comparison",
        "schema_version": 1,
        "bundle": verdicts[0][1]["bundle"]["manifest_sha256"],
        "verdicts": rows,
        "odd": odd,
        "words": _words(rows, odd),
        "notes": notes,
    }


def _row(name: str, v: VerdictJson) -> dict[str, Any]:
    """One verdict under a name that no other has. None where it was not measured."""
    sdt, other_argmaxes = (
        None if v[against]["sdt"] is None else v[against]["sdt"]["value"]
        for against in ("against_original", "against_host")
    )
    return {
        "file": name,
        "device": device_name(v),
        "build": v["runtime"]["llama_cpp_python"],
        "diagnosis": v["diagnosis"]["code"],
        "sdt": sdt,
        "fdt": v["against_original"]["fdt"]["value"],
        "other_argmaxes_vs_host": other_argmaxes,
        "kernels": len(v["kernels"]),
        "wrong_kernels": sum(not k["ok"] for k in v["kernels"]),
        **{k: v[k] for k in ("passed", "mode", "sequences")},
        **{k: v[k] for k in ("kl_vs_host_nats", "decided_sdt_vs_host")},
        **{k: v["performance"][k] for k in ("decode_tokens_per_s", "peak_rss_bytes")},
    }


def _odd(rows: Sequence[VerdictJson], max_kl: float) -> list[dict[str, str]]:
    """One entry a verdict, with its most telling figure."""
    by_argmax = outliers([(r["file"], r["other_argmaxes_vs_host"]) for r in rows], ARGMAX_ROOM)
    by_kl = outliers([(r["file"], r["kl_vs_host_nats"]) for r in rows], KL_ROOM * max_kl)
    telling = {
        file: f"the share of other tokens than the host's is {x:.2%}, the median is {median:.2%}"
        for file, x, median in by_argmax
    } | {
        file: f"KL from the host is {x:.2g} nats, the median is {median:.2g} nats"
        for file, x, median in by_kl
    }
    odd = [r["file"] for r in rows if r["file"] in telling]
    return [{"file": file, "words": f"{file}: {telling[file]}"} for file in odd]


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


def _words(rows: Sequence[VerdictJson], odd: Sequence[Mapping[str, str]]) -> str:
    comparable = sum(r["kl_vs_host_nats"] is not None for r in rows)
    if comparable >= ENOUGH:
        return f"Odd one out: {'; '.join(o['words'] for o in odd) or 'none'}."
    return (
        f"Odd one out: cannot tell. It takes {ENOUGH} verdicts with a KL from the host, here "
        f"{'is' if comparable == 1 else 'are'} {comparable}: of two that differ, either can be "
        "wrong."
    )


_COLUMNS = (
    # head, key, format, scale
    ("SDT", "sdt", ".2%", 1),
    ("FDT", "fdt", ".1f", 1),
    ("KL vs host", "kl_vs_host_nats", ".2g", 1),
    ("sure, other", "decided_sdt_vs_host", ".2%", 1),
    ("kernels", "right_kernels", "", 1),
    ("tokens/s", "decode_tokens_per_s", ",.1f", 1),
    ("MB", "peak_rss_bytes", ",.0f", 1e-6),
    ("sequences", "sequences", "", 1),
)


def table(comparison: Mapping[str, Any]) -> Table:
    """A row a verdict; the odd ones are marked."""
    from rich.markup import escape
    from rich.table import Table

    odd = {o["file"] for o in comparison["odd"]}
    out = Table(caption="KL in nats; sure, other: share of other tokens where the host was sure")
    for name in ("verdict", "device", "build", ""):
        out.add_column(name)
    for name, *_ in _COLUMNS:
        out.add_column(name, justify="right")
    for row in comparison["verdicts"]:
        right = f"{row['kernels'] - row['wrong_kernels']}/{row['kernels']}"
        values = row | {"right_kernels": right if row["kernels"] else None}
        file, device, build = (escape(printable(row[key])) for key in ("file", "device", "build"))
        out.add_row(
            file + (" [bold yellow]← odd[/]" if row["file"] in odd else ""),
            device,
            build,
            "[green]PASS[/]" if row["passed"] else f"[red]FAIL[/] {row['diagnosis']}",
            *(
                "" if values[key] is None else format(values[key] * scale, form)
                for _, key, form, scale in _COLUMNS
            ),
        )
    return out


def printable(words: str) -> str:
    """Verdicts come from elsewhere: nothing in them may steer the terminal."""
    return "".join(ch if ch.isprintable() else "?" for ch in words)
