"""Results in, tables out: for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_dtm.formats.plan import Plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
ZEROS_NOTE = (
    "Zeros make the packed artifact smaller (zstd), not the file, its memory or its speed: "
    "llama.cpp has no sparse kernels."
)


def interval(data: Mapping[str, float], percent: bool) -> str:
    """`2.61 % (2.20 to 3.05)` from an Interval's JSON."""
    scale, digits = (100, 2) if percent else (1, 1)
    v, low, high = (f"{data[k] * scale:.{digits}f}" for k in ("value", "low", "high"))
    return f"{v}{' %' if percent else ''} ({low} to {high})"


def _largest_fdt(data: Mapping[str, Any]) -> float:
    """From a Divergence's JSON: the mean length of the sequences, in tokens."""
    return float(data["tokens"] / data["sequences"])


def rows(measured: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, measured, predicted, noise floor) for each figure."""
    p, f = measured["predicted"], measured["noise_floor"]
    other = measured.get("packaged_prompts")
    more = [
        ("SDT on the packaged prompts", interval(other["sdt"], True), "", ""),
        (f"mean FDT on the packaged prompts, of at most {_largest_fdt(other):.1f}",
         interval(other["fdt"], False), "", ""),
    ] if other else []  # fmt: skip
    return [
        ("SDT, share of divergent tokens", interval(measured["sdt"], True),
         f"{p['sdt']:.2%}".replace("%", " %"), interval(f["sdt"], True)),
        (f"mean FDT, first divergent token, of at most {_largest_fdt(measured):.1f}",
         interval(measured["fdt"], False),
         f"{p['fdt']:.1f}", interval(f["fdt"], False)),
        ("sequences without divergence", f"{measured['identical_share']:.1%}", "",
         f"{f['identical_share']:.1%}"),
        ("perplexity on the original's text", f"{measured['perplexity']:.4f}", "",
         f"{f['perplexity']:.4f}"),
        *more,
    ]  # fmt: skip


def markdown(
    plan: Plan,
    measured: Mapping[str, Any],
    details: Mapping[str, Any],
    zeros: Mapping[str, float],
) -> str:
    """report.md of a bundle. zeros: share of zeros found in the GGUF, by component."""
    out = [
        f"# {details['model']} for {details['profile']}",
        "",
        f"{measured['size_bytes']:,} bytes, {measured['size_bytes'] / measured['f16_bytes']:.1%} of "
        f"the F16 file ({measured['f16_bytes']:,}). {details['budget']}",
        "",
        f"Measured in llama.cpp on {measured['sequences']} held-out sequences "
        f"({measured['tokens']:,} tokens), in brackets 95 % bootstrap intervals over sequences. "
        "The noise floor is the uncompressed F16 model in llama.cpp against the same reference.",
        "",
        "| | this model | predicted | noise floor |",
        "|---|---|---|---|",
        *(f"| {' | '.join(r)} |" for r in rows(measured)),
        "",
        *(
            [
                f"The prompts are the user's own ({details['prompts']}). The packaged prompts "
                f"({measured['packaged_prompts']['sequences']} sequences) were not calibrated on.",
                "",
            ]
            if measured.get("packaged_prompts")
            else []
        ),
        f"The original's own perplexity on that text is {measured['original_perplexity']:.4f}. "
        f"{measured['near_tie_share']:.2%} of the positions diverge where the original itself was "
        f"undecided (margin up to {measured['near_tie_margin']:.3f}, the noise floor's own).",
        "",
        "## Treatments",
        "",
        "| treatment | components | bytes |",
        "|---|---|---|",
        *(f"| {name} | {n} | {size:,} |" for name, (n, size) in plan.type_counts().items()),
        "",
        "## Layer by layer",
        "",
        f"| layer | {' | '.join(PARTS)} |",
        f"|---|{'---|' * len(PARTS)}",
        *(f"| {layer} | {' | '.join(cells)} |" for layer, cells in layer_map(plan)),
        "",
    ]
    if plan.zero_share:
        found = {n: z for n, z in zeros.items() if plan.by_name()[n].zero_share}
        out += [
            "## Zeros",
            "",
            f"{plan.zero_share:.2%} of the block matrices' weights are zeros of masks, in "
            f"{len(found)} components. {ZEROS_NOTE}",
            "",
            "| component | zeros asked for | zeros found |",
            "|---|---|---|",
            *(f"| {n} | {plan.by_name()[n].zero_share:.2%} | {z:.2%} |" for n, z in found.items()),
            "",
        ]
    out += _story(measured)
    out += ["## Provenance", "", *(f"- {k}: {v}" for k, v in details.items()), ""]
    return "\n".join(out)


def _story(measured: Mapping[str, Any]) -> list[str]:
    """What was done besides types and masks, and what it brought."""
    out = []
    if zeros := measured.get("zeros"):
        out += ["## What the zeros bought", "", zeros["words"], ""]
    if removal := measured.get("removal"):
        out += ["## Removal", ""]
        if not removal["kept"]:
            out += ["Asked for where it pays: at this size it does not; nothing was removed.", ""]
        else:
            out += [
                f"{removal['removed_share']:.1%} of the block matrices were removed. The smaller "
                f"model alone, in F16, takes {removal['f16_bytes']:,} bytes and has an SDT of "
                f"{interval(removal['measured']['sdt'], True)} and a mean FDT of "
                f"{interval(removal['measured']['fdt'], False)}.",
                "",
                "| part | KV groups or neurons kept |",
                "|---|---|",
                *(f"| {name} | {kept} |" for name, kept in removal["kept"].items()),
                "",
            ]
    if stages := measured.get("recovery"):
        out += ["## Recovery", ""]
        if before := measured.get("before_recovery"):
            out += [
                f"Before: SDT {interval(before['sdt'], True)}, mean FDT "
                f"{interval(before['fdt'], False)}, perplexity {before['perplexity']:.4f}, on the "
                "held-out sequences.",
                "",
            ]
        out += [
            "Checked on calibration sequences that were not trained on, which also choose the "
            "best step:",
            "",
            "| stage | step | loss (nats) | SDT | mean FDT | perplexity |",
            "|---|---|---|---|---|---|",
            *(
                f"| {name} | {p['step']}{' (best)' if p['step'] == stage['best_step'] else ''} | "
                f"{'' if p['loss'] is None else format(p['loss'], '.4f')} | {p['sdt']:.2%} | "
                f"{p['fdt']:.1f} | {p['perplexity']:.4f} |"
                for name, stage in stages.items()
                for p in stage["curve"]
            ),
            "",
        ]
    return out


def _story_lines(measured: Mapping[str, Any]) -> list[str]:
    """The same on one screen."""
    out = []
    if before := measured.get("before_recovery"):
        out.append(
            f"before recovery: SDT {interval(before['sdt'], True)}, mean FDT "
            f"{interval(before['fdt'], False)}, perplexity {before['perplexity']:.4f}"
        )
    if (removal := measured.get("removal")) and removal["kept"]:
        out.append(
            f"{removal['removed_share']:.1%} of the block matrices removed; that alone in F16: SDT "
            f"{interval(removal['measured']['sdt'], True)}"
        )
    if zeros := measured.get("zeros"):
        out.append(zeros["words"])
    return out


def layer_map(plan: Plan) -> list[tuple[str, list[str]]]:
    """(layer, one text a part), the embedding and the head first."""
    return layer_map_of({name: str(t) for name, t in plan.by_name().items()})


def layer_map_of(texts: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """The same for any component -> text."""
    blank = [""] * (len(PARTS) - 1)
    out = [(n, [texts[n], *blank]) for n in ("token_embd", "output") if n in texts]
    layers = sorted({int(n.split(".")[1]) for n in texts if n.startswith("blk.")})
    out += [(str(i), [texts.get(f"blk.{i}.{p}", "") for p in PARTS]) for i in layers]
    return out


def map_table(texts: Mapping[str, str]) -> Table:
    from rich.table import Table

    table = Table("layer", *PARTS, box=None, pad_edge=False)
    for layer, cells in layer_map_of(texts):
        table.add_row(layer, *cells)
    return table


def print_summary(
    console: Console,
    plan: Plan,
    measured: Mapping[str, Any],
    details: Mapping[str, Any],
    seconds: Mapping[str, float],
    out: Path,
) -> None:
    """The end of `compress`, on one screen."""
    from rich.table import Table

    table = Table("", "this model", "predicted", "noise floor", box=None, pad_edge=False)
    for row in rows(measured):
        table.add_row(*row)
    console.print(table)
    counts = ", ".join(f"{n} x {name}" for name, (n, _) in plan.type_counts().items())
    lines = [
        f"{measured['size_bytes']:,} bytes ({measured['size_bytes'] / measured['f16_bytes']:.1%} of F16): "
        f"{counts}",
        *([f"{plan.zero_share:.2%} zeros in the block matrices."] if plan.zero_share else []),
        *_story_lines(measured),
        f"{sum(seconds.values()):.0f} s in all; measured on {measured['sequences']} held-out sequences",
        f"Bundle: {out}. Next: edge-dtm verify {out}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
