"""What compress says at its end, at the terminal and in report.md. Results in, tables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    table = [
        (
            "SDT, share of divergent tokens",
            interval(measured["sdt"], True),
            f"{predicted['sdt'] * 100:.2f} %",
            interval(floor["sdt"], True),
        ),
        (
            f"mean FDT, first divergent token, of at most {_largest_fdt(measured):.1f}",
            interval(measured["fdt"], False),
            f"{predicted['fdt']:.1f}",
            interval(floor["fdt"], False),
        ),
        (
            "sequences without divergence",
            f"{measured['identical_share']:.1%}",
            "",
            f"{floor['identical_share']:.1%}",
        ),
        (
            "perplexity on the original's text",
            f"{measured['perplexity']:.4f}",
            "",
            f"{floor['perplexity']:.4f}",
        ),
    ]
    if packaged := measured.get("packaged_prompts"):
        fdt = f"mean FDT on the packaged prompts, of at most {_largest_fdt(packaged):.1f}"
        table += [
            ("SDT on the packaged prompts", interval(packaged["sdt"], True), "", ""),
            (fdt, interval(packaged["fdt"], False), "", ""),
        ]
    return table


def _largest_fdt(data: Mapping[str, Any]) -> float:
    """From a Divergence's JSON: the mean length of the sequences, in tokens."""
    return float(data["tokens"] / data["sequences"])


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
    lines = [
        f"{measured['size_bytes']:,} bytes ({measured['size_bytes'] / measured['f16_bytes']:.1%} of F16): "
        f"{counts}"
    ]
    if plan.zero_share:
        lines.append(f"{plan.zero_share:.2%} zeros in the block matrices.")
    if before := measured.get("before_distillation"):
        lines.append(f"before distillation: {_figures(before)}")
    lines += [
        f"{sum(seconds.values()):.0f} s in all; measured on {measured['sequences']} held-out sequences",
        f"Bundle: {out}. Next: edge-dtm verify {out}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _figures(divergence: Mapping[str, Any]) -> str:
    return (
        f"SDT {interval(divergence['sdt'], True)}, mean FDT {interval(divergence['fdt'], False)}, "
        f"perplexity {divergence['perplexity']:.4f}"
    )


def markdown(
    plan: Plan,
    measured: Mapping[str, Any],
    details: Mapping[str, Any],
    zeros: Mapping[str, float],
) -> str:
    """report.md of a bundle. zeros: share of zeros found in the GGUF, by component."""
    size, f16 = measured["size_bytes"], measured["f16_bytes"]
    parts = [
        f"# {details['model']} for {details['profile']}",
        f"{size:,} bytes, {size / f16:.1%} of the F16 file ({f16:,}). {details['budget']}",
        f"Measured in llama.cpp on {measured['sequences']} held-out sequences "
        f"({measured['tokens']:,} tokens), in brackets 95 % bootstrap intervals over sequences. "
        "The noise floor is the uncompressed F16 model in llama.cpp against the same reference.",
        _table(["", "this model", "predicted", "noise floor"], rows(measured)),
        *(
            [
                f"The prompts are the user's own ({details['prompts']}). The packaged prompts "
                f"({measured['packaged_prompts']['sequences']} sequences) were not calibrated on."
            ]
            if measured.get("packaged_prompts")
            else []
        ),
        f"The original's own perplexity on that text is {measured['original_perplexity']:.4f}. "
        f"{measured['near_tie_share']:.2%} of the positions diverge where the original itself was "
        f"undecided (margin up to {measured['near_tie_margin']:.3f}, the noise floor's own).",
        "## Treatments",
        _table(
            ["treatment", "components", "bytes"],
            [(name, str(n), f"{size:,}") for name, (n, size) in plan.type_counts().items()],
        ),
        "## Layer by layer",
        _table(
            ["layer", *PARTS],
            [(i, *texts) for i, texts in text_rows({n: str(t) for n, t in plan.by_name().items()})],
        ),
        *(_zeros(plan, zeros) if plan.zero_share else []),
        *_distillation(measured),
        "## Provenance",
        "\n".join(f"- {k}: {v}" for k, v in details.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heads, *body]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _zeros(plan: Plan, zeros: Mapping[str, float]) -> list[str]:
    asked = {name: t.zero_share for name, t in plan.by_name().items() if t.zero_share}
    return [
        "## Zeros",
        f"{plan.zero_share:.2%} of the block matrices' weights are zeros of masks, in "
        f"{len(asked)} components. {ZEROS_NOTE}",
        _table(
            ["component", "zeros asked for", "zeros found"],
            [(n, f"{asked[n]:.2%}", f"{z:.2%}") for n, z in zeros.items() if n in asked],
        ),
    ]


def _distillation(measured: Mapping[str, Any]) -> list[str]:
    stages = measured.get("distillation")
    if not stages:
        return []
    parts = ["## Distillation"]
    if before := measured.get("before_distillation"):
        parts.append(f"Before: {_figures(before)}, on the held-out sequences.")
    return [
        *parts,
        "Checked on calibration sequences that were not trained on, which also choose the best step:",
        _table(
            ["stage", "step", "loss (nats)", "SDT", "mean FDT", "perplexity"],
            [
                (
                    name,
                    f"{p['step']}{' (best)' if p['step'] == stage['best_step'] else ''}",
                    "" if p["loss"] is None else f"{p['loss']:.4f}",
                    f"{p['sdt']:.2%}",
                    f"{p['fdt']:.1f}",
                    f"{p['perplexity']:.4f}",
                )
                for name, stage in stages.items()
                for p in stage["curve"]
            ],
        ),
    ]
