"""What bench_quality measured, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.report.frontier import Curve
from edge_dtm.report.summary import interval

SCHEMA_VERSION = 2
WANTED_SEQUENCES = 128


def load_other(path: Path) -> dict[str, Any]:
    """What an earlier run wrote with --json. EdgeDtmError when it is not that."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema {data['schema_version']}, not {SCHEMA_VERSION}")
        section(data)
        return dict(data)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EdgeDtmError(
            f"--with: {path} is not what --json writes ({error!r}): measure that model again"
        ) from None


FILES = (("plain", "preset"), ("imatrix", "preset + im"), ("ours", "ours"))
SMALLEST = "†"  # marks a file of ours that is larger than asked for


def name_of(best: Mapping[str, Any]) -> str:
    return f"{best['preset']}{' + im' if best['file'] == 'imatrix' else ''}"


def ratio_text(q: Mapping[str, float | None]) -> str:
    v, low, high = ("inf" if q[k] is None else f"{q[k]:.2f}" for k in ("value", "low", "high"))
    return f"{v} ({low} to {high})"


def fewer_text(r: Mapping[str, Any]) -> str:
    size, ours = r["best"]["size_bytes"], r["our_bytes_at_equal_sdt"]
    at_least = ""
    if ours is None and (smallest := r.get("our_smallest_bytes")) and smallest < size:
        ours, at_least = smallest, "at least "
    return "-" if ours is None else f"{at_least}{size - ours:,} ({(size - ours) / size:.1%})"


def size_text(data: Mapping[str, Any]) -> str:
    return f"{data['size_bytes']:,}{SMALLEST if data.get('smallest') else ''}"


def too_few(sequences: int) -> list[str]:
    if sequences >= WANTED_SEQUENCES:
        return []
    return [
        f"warning: only {sequences} held-out sequences, {WANTED_SEQUENCES} are wanted: the intervals "
        "are wide; run edge-dtm compress with more prompts"
    ]


def notes(data: Mapping[str, Any]) -> list[str]:
    f = data["noise_floor"]
    out = [
        f"Noise floor (F16 in llama.cpp, {data['f16_bytes']:,} bytes): SDT {interval(f['sdt'], True)}, "
        f"mean FDT {interval(f['fdt'], False)}.",
        f"{data['sequences']} held-out sequences, {data['positions']:,} generated tokens, at most "
        f"{data['tokens_per_prompt']} a sequence; brackets: 95 % bootstrap over sequences.",
        *too_few(data["sequences"]),
        *(f"{s['preset']} was skipped: {s['reason']}." for s in data["skipped"]),
    ]
    if any(x["smallest"] for x in (*(r["ours"] for r in data["presets"]), *data["ablations"])):
        out.append(
            f"{SMALLEST} There is no plan of ours that is as small: this is the smallest, which is "
            "larger than what it is compared with."
        )
    return out


INTRODUCTION = (
    "SDT: share of tokens whose argmax differs from the original's, smaller is better. FDT: mean "
    "position of the first that differs, larger is better. im: llama.cpp's quantizer was given an "
    "importance matrix made on the calibration prompts. Ours: the best plan the search finds in the "
    "preset's file size. Best preset: the file of least SDT among all presets, plain and im, of "
    "that size or smaller. Ratio above the floor: (our SDT - noise floor) / (best preset's SDT - "
    "noise floor), sequences resampled together; below 1 means fewer divergent tokens. FDT ratio: "
    "our mean FDT / the best preset's; above 1 is better. Fewer bytes at equal SDT: best preset's "
    "file less the size at which ours would have its SDT, by linear interpolation of the size over "
    "log SDT between our measured points; at least: our smallest file diverges less; - : no figure."
)
ABLATION_TEXT = (
    "Ablations. Each variant searches its own plan for the same size. Ratio: (its SDT - noise floor) "
    "/ (full method's SDT - noise floor); above 1 means more divergent tokens than the full method. "
    "Weight error as cost: the squared error of the plainly rounded weights decides the types; the "
    "blocks are those of the full method. Equalized: the same preset made from our equalized "
    "checkpoint, the importance matrix scaled likewise."
)


def _table(heads: Sequence[str], left: int, rows: Sequence[Sequence[str]]) -> list[str]:
    """left: how many columns, from the first, are text."""
    return [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * left}{'---:|' * (len(heads) - left)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _sizes(data: Mapping[str, Any]) -> list[str]:
    heads = (
        "size of", "best preset", "bytes", "its SDT", "FDT", "our bytes", "our SDT", "FDT",
        "predicted SDT", "ratio above the floor", "FDT ratio", "fewer bytes at equal SDT",
    )  # fmt: skip
    rows = [
        (
            r["preset"],
            name_of(r["best"]),
            f"{r['limit_bytes']:,}",
            f"{r['best']['sdt']['value']:.2%}",
            f"{r['best']['fdt']['value']:.1f}",
            size_text(r["ours"]),
            f"{r['ours']['sdt']['value']:.2%}",
            f"{r['ours']['fdt']['value']:.1f}",
            f"{r['predicted']['sdt']:.2%}",
            ratio_text(r["sdt_ratio"]),
            ratio_text(r["fdt_ratio"]),
            fewer_text(r),
        )
        for r in data["presets"]
    ]
    return _table(heads, 2, rows)


def _measured(f: Mapping[str, Any]) -> tuple[str, str, str]:
    return size_text(f), interval(f["sdt"], True), interval(f["fdt"], False)


def _ablations(data: Mapping[str, Any]) -> list[str]:
    heads = ("size of", "variant", "bytes", "SDT", "mean FDT", "ratio to full, above the floor")
    rows = [
        (a["preset"], a["variant"], *_measured(a), ratio_text(a["sdt_ratio_to_full"]))
        for a in data["ablations"]
    ]
    return [ABLATION_TEXT, "", *_table(heads, 2, rows)] if rows else []


def _files(data: Mapping[str, Any]) -> list[str]:
    heads = ("size of", "file", "tensors of each type", "bytes", "SDT", "mean FDT")
    rows = []
    for r in data["presets"]:
        for key, title in FILES:
            kinds = sorted(r[key]["tensors_of_type"].items(), key=lambda i: (-i[1], i[0]))
            types = ", ".join(f"{n} {t}" for t, n in kinds)
            rows.append((r["preset"], title, types, *_measured(r[key])))
    return ["Every file, with intervals of its SDT and mean FDT:", "", *_table(heads, 3, rows)]


def section(data: Mapping[str, Any]) -> list[str]:
    """The Markdown lines about one model."""
    packages = ", ".join(f"{k} {v}" for k, v in data["packages"].items())
    return [
        f"## {data['model']}",
        "",
        *_sizes(data),
        *(line for note in notes(data) for line in (note, "")),
        *_ablations(data),
        *_files(data),
        f"Versions: {packages}. Made with:",
        "",
        *(f"    {c}" for c in data["commands"]),
        "",
    ]


def markdown(models: Sequence[Mapping[str, Any]], figure: str | None = None) -> str:
    """figure: the picture's place relative to this file."""
    lines = ["# Ours against llama.cpp's presets at equal size", "", INTRODUCTION, ""]
    if figure is not None:
        lines += [f"![File size against SDT and mean FDT]({figure})", ""]
    return "\n".join([*lines, *(line for data in models for line in section(data))])


def series(data: Mapping[str, Any]) -> tuple[str, list[Curve], tuple[float, float]]:
    """One model's curves for frontier.draw; the last kind of file, ours, is a line."""
    curves = [
        (
            title,
            style,
            sorted(
                (r[key]["size_bytes"], r[key]["sdt"]["value"], r[key]["fdt"]["value"])
                for r in data["presets"]
            ),
        )
        for (key, title), style in zip(FILES, ("C7s", "C1^", "C0o-"), strict=True)
    ]
    floor = data["noise_floor"]
    return str(data["model"]), curves, (floor["sdt"]["value"], floor["fdt"]["value"])
