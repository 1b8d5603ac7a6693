"""What bench_quality measured, as tables for the terminal and as a page of Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.report.frontier_figure import Curve
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
    except OSError as error:
        raise EdgeDtmError(f"--with: {path} cannot be read ({error.strerror or error})") from None
    except (ValueError, LookupError, TypeError) as error:
        raise EdgeDtmError(
            f"--with: {path} is not what --json writes ({error!r}): measure that model again"
        ) from None


FILES = (("plain", "preset"), ("imatrix", "preset + im"), ("ours", "ours"))
SMALLEST = "†"  # marks a file of ours that is larger than asked for
HEAD = (
    "size of", "bytes", "best preset", "its SDT", "FDT", "our bytes", "our SDT", "FDT",
    "predicted SDT", "ratio above the floor", "FDT ratio", "fewer bytes at equal SDT",
)  # fmt: skip


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


def ours_bytes(data: Mapping[str, Any]) -> str:
    return f"{data['size_bytes']:,}{SMALLEST if data['smallest'] else ''}"


def rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            r["preset"],
            f"{r['limit_bytes']:,}",
            name_of(r["best"]),
            f"{r['best']['sdt']['value']:.2%}",
            f"{r['best']['fdt']['value']:.1f}",
            ours_bytes(r["ours"]),
            f"{r['ours']['sdt']['value']:.2%}",
            f"{r['ours']['fdt']['value']:.1f}",
            f"{r['predicted']['sdt']:.2%}",
            ratio_text(r["sdt_ratio"]),
            ratio_text(r["fdt_ratio"]),
            fewer_text(r),
        )
        for r in data["presets"]
    ]


def terminal_tables(data: Mapping[str, Any]) -> list[Table]:
    """A line a file, then a line a size, then a line a variant, so that each fits 80 columns."""

    def table(title: str, heads: Sequence[str], left: int) -> Table:
        out = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
        for i, head in enumerate(heads):
            out.add_column(head, justify="right" if i >= left else "left", no_wrap=True)
        return out

    files = table("Files", ("size of", "file", "bytes", "SDT", "FDT", "predicted\nSDT"), 2)
    sizes = table(
        "Ours against the best preset of that size or smaller",
        ("size of", "best preset", "SDT ratio\nabove the floor", "FDT\nratio", "fewer bytes\nat equal SDT"),
        2,
    )  # fmt: skip
    for r in data["presets"]:
        for key, title in FILES:
            f = r[key]
            files.add_row(
                r["preset"] if key == "plain" else "",
                title,
                ours_bytes(f) if key == "ours" else f"{f['size_bytes']:,}",
                f"{f['sdt']['value']:.2%}",
                f"{f['fdt']['value']:.1f}",
                f"{r['predicted']['sdt']:.2%}" if key == "ours" else "",
                end_section=key == "ours",
            )
        fdt = r["fdt_ratio"]["value"]
        sizes.add_row(
            r["preset"], name_of(r["best"]), ratio_text(r["sdt_ratio"]),
            "inf" if fdt is None else f"{fdt:.2f}", fewer_text(r),
        )  # fmt: skip
    left_out = table(
        "Ablations", ("size of", "variant", "bytes", "SDT", "FDT", "SDT ratio to full\nabove the floor"), 2
    )  # fmt: skip
    for cells in ablation_rows(data, interval_of=lambda f, k: _short(f, k)):
        left_out.add_row(*cells)
    return [files, sizes, *([left_out] if data["ablations"] else [])]


def _short(data: Mapping[str, Any], key: str) -> str:
    return f"{data[key]['value']:.2%}" if key == "sdt" else f"{data[key]['value']:.1f}"


def ablation_rows(
    data: Mapping[str, Any], interval_of: Callable[[Mapping[str, Any], str], str]
) -> list[tuple[str, ...]]:
    return [
        (
            a["preset"],
            a["variant"],
            ours_bytes(a),
            interval_of(a, "sdt"),
            interval_of(a, "fdt"),
            ratio_text(a["sdt_ratio_to_full"]),
        )
        for a in data["ablations"]
    ]


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
    "Ablations. Each variant searches its own plan for the same size; ratio: (its SDT - noise floor) "
    "/ (full method's SDT - noise floor), above 1 means more divergent tokens than the full method. "
    "Without activations: plain rounding without importance, costs as if inputs were not rounded "
    "(except the head's), not equalized. Weight error as cost: the squared error of the plainly "
    "rounded weights decides the types. As cost: blocks of the full method, types "
    "from those it has blocks for. Equalized: the same preset made from our equalized checkpoint, "
    "the importance matrix scaled likewise."
)


def section(data: Mapping[str, Any]) -> list[str]:
    """The Markdown lines about one model."""
    packages = ", ".join(f"{k} {v}" for k, v in data["packages"].items())
    lines = [
        f"## {data['model']}",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|---|---:|---|{'---:|' * (len(HEAD) - 3)}",
        *(f"| {' | '.join(row)} |" for row in rows(data)),
        "",
        *(line for note in notes(data) for line in (note, "")),
    ]
    if data["ablations"]:
        lines += [
            ABLATION_TEXT,
            "",
            "| size of | variant | bytes | SDT | mean FDT | ratio to full, above the floor |",
            "|---|---|---:|---:|---:|---:|",
            *(
                f"| {' | '.join(cells)} |"
                for cells in ablation_rows(data, lambda f, k: interval(f[k], k == "sdt"))
            ),
            "",
        ]
    lines += [
        "Every file, with intervals of its SDT and mean FDT:",
        "",
        "| size of | file | bytes | SDT | mean FDT | tensors of each type |",
        "|---|---|---:|---:|---:|---|",
    ]
    for r in data["presets"]:
        for key, title in FILES:
            kinds = sorted(r[key]["tensors_of_type"].items(), key=lambda i: (-i[1], i[0]))
            size = ours_bytes(r[key]) if key == "ours" else f"{r[key]['size_bytes']:,}"
            lines.append(
                f"| {r['preset']} | {title} | {size} | {interval(r[key]['sdt'], True)} | "
                f"{interval(r[key]['fdt'], False)} | {', '.join(f'{n} {t}' for t, n in kinds)} |"
            )
    commands = data["commands"]
    return [
        *lines,
        "",
        f"Versions: {packages}. Made with:",
        "",
        *(f"    {c}" for c in commands),
        "",
    ]


def markdown(models: Sequence[Mapping[str, Any]], figure: str | None = None) -> str:
    """figure: the picture's place relative to this file."""
    lines = ["# Ours against llama.cpp's presets at equal size", "", INTRODUCTION, ""]
    if figure is not None:
        lines += [f"![File size against SDT and mean FDT]({figure})", ""]
    return "\n".join([*lines, *(line for data in models for line in section(data))])


def series(data: Mapping[str, Any]) -> tuple[str, list[Curve], tuple[float, float]]:
    """One model's curves for frontier_figure.draw; the last kind of file, ours, is a line."""
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
