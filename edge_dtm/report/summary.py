"""What compress says at its end, at the terminal and in report.md. Results in, tables out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from edge_dtm.formats.plan import Plan
from edge_dtm.report.layer_map import PARTS, text_rows
from edge_dtm.report.numbers import between

if TYPE_CHECKING:
    from rich.console import Console

ZEROS_NOTE = (
    "Zeros make the packed artifact smaller (zstd), not the file, its memory or its speed: "
    "llama.cpp has no sparse kernels."
)


def interval(data: Mapping[str, float], percent: bool) -> str:
    """`2.61 % (2.20 to 3.05)` from an Interval's JSON."""
    value = f"{data['value'] * 100:.2f} %" if percent else f"{data['value']:.1f}"
    return f"{value} ({between(data['low'], data['high'], percent)})"


def rows(measured: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, measured, predicted, noise floor) for each figure. measured: of the manifest."""
    predicted, floor = measured["predicted"], measured["noise_floor"]
    fdt = f"of at most {measured['tokens'] / measured['sequences']:.1f}"
    table = [
        (what, _text(measured, key), prediction, _text(floor, key))
        for what, key, prediction in (
            ("SDT, share of divergent tokens", "sdt", f"{predicted['sdt'] * 100:.2f} %"),
            (f"mean FDT, first divergent token, {fdt}", "fdt", f"{predicted['fdt']:.1f}"),
            ("sequences without divergence", "identical_share", ""),
            ("perplexity on the original's text", "perplexity", ""),
        )
    ]
    if packaged := measured.get("packaged_prompts"):
        fdt = f"of at most {packaged['tokens'] / packaged['sequences']:.1f}"
        table += [
            ("SDT on the packaged prompts", _text(packaged, "sdt"), "", ""),
            (f"mean FDT on the packaged prompts, {fdt}", _text(packaged, "fdt"), "", ""),
        ]
    return table


def _text(run: Mapping[str, Any], key: str) -> str:
    if key in ("sdt", "fdt"):
        return interval(run[key], key == "sdt")
    return format(run[key], ".1%" if key == "identical_share" else ".4f")


def print_summary(
    console: Console,
    plan: Plan,
    measured: Mapping[str, Any],
    seconds: Mapping[str, float],
    out: Path,
) -> None:
    """The end of `compress`, on one screen. seconds: by stage; out: the bundle."""
    from rich.table import Table

    table = Table("", "this model", "predicted", "noise floor", box=None, pad_edge=False)
    for row in rows(measured):
        table.add_row(*row)
    console.print(table)
    counts = ", ".join(f"{n} x {name}" for name, (n, _) in plan.type_counts().items())
    share = measured["size_bytes"] / measured["f16_bytes"]
    lines = [f"{measured['size_bytes']:,} bytes ({share:.1%} of F16): {counts}"]
    if plan.zero_share:
        lines.append(f"{plan.zero_share:.2%} zeros in the block matrices.")
    if before := measured.get("before_distillation"):
        lines.append(f"before distillation: {_figures(before)}")
    lines += [
        f"{sum(seconds.values()):.0f} s in all; measured on {measured['sequences']} held-out sequences",
        f"Bundle: {out}. Next: edge-dtm verify {out}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _figures(run: Mapping[str, Any]) -> str:
    sdt, fdt, perplexity = (_text(run, key) for key in ("sdt", "fdt", "perplexity"))
    return f"SDT {sdt}, mean FDT {fdt}, perplexity {perplexity}"


def markdown(
    plan: Plan,
    measured: Mapping[str, Any],
    details: Mapping[str, Any],
    zeros: Mapping[str, float],
) -> str:
    """report.md of a bundle. zeros: share of zeros found in the GGUF, by component."""
    treatments, before = plan.by_name(), measured.get("before_distillation")
    environment = Environment(
        loader=PackageLoader("edge_dtm", "data"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.md.jinja").render(
        plan=plan,
        measured=measured,
        details=details,
        figures=rows(measured),
        parts=list(PARTS),
        treatments=[(name, n, f"{size:,}") for name, (n, size) in plan.type_counts().items()],
        layers=text_rows({name: str(t) for name, t in treatments.items()}),
        zeros=[
            (name, f"{treatments[name].zero_share:.2%}", f"{share:.2%}")
            for name, share in zeros.items()
            if treatments[name].zero_share
        ],
        zeros_note=ZEROS_NOTE,
        before=before and _figures(before),
        curves=[
            (
                name,
                f"{p['step']}{' (best)' if p['step'] == stage['best_step'] else ''}",
                "" if p["loss"] is None else f"{p['loss']:.4f}",
                f"{p['sdt']:.2%}",
                f"{p['fdt']:.1f}",
                f"{p['perplexity']:.4f}",
            )
            for name, stage in (measured.get("distillation") or {}).items()
            for p in stage["curve"]
        ],
    )
