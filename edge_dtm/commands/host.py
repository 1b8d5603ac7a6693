"""Commands of the host: compress a model, and what its plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_dtm.commands.common import PATH, Bytes, Removal, Types, read_json, require_folder_of
from edge_dtm.core.errors import EdgeDtmError


@click.command()
@click.argument("model", type=PATH, required=False)
@click.option(
    "--profile",
    default="raspberrypi",
    show_default=True,
    help="Device profile: a name or a .toml file.",
)
@click.option("-o", "--output", type=PATH, required=True, help="Folder of the bundle.")
@click.option(
    "--max-bytes", type=Bytes(), help="File size limit, instead of the profile's: N, NM or NG."
)
@click.option(
    "--max-sdt",
    type=click.FloatRange(0, 1, min_open=True),
    help="Smallest file with at most this SDT (0.02 is 2 %).",
)
@click.option(
    "--min-fdt",
    type=click.FloatRange(0, min_open=True),
    help="Smallest file with at least this mean FDT, in tokens.",
)
@click.option(
    "--max-transfer",
    type=Bytes(),
    help="Limit of the model's bytes after zstd, where zeros count: N, NM or NG.",
)
@click.option(
    "--sparsity",
    type=click.FloatRange(0, 0.94),  # 95 % is the most a row may have, rounded to whole weights
    default=0.0,
    help="Average share of zeros over the block matrices.",
)
@click.option(
    "--sparsity-steps",
    type=click.IntRange(1, 50),
    help="Reach --sparsity in so many steps, with --recover after each [default: 1].",
)
@click.option(
    "--mask-score",
    type=click.Choice(["activation", "saliency", "magnitude"]),
    default="activation",
    show_default=True,
    help="Which weights of a row become zero first.",
)
@click.option(
    "--remove",
    type=Removal(),
    help="Share of the block matrices to remove whole (KV groups, neurons), or `auto`: what the "
    "search finds worth it.",
)
@click.option(
    "--recover",
    "recover_steps",
    type=click.IntRange(0),
    metavar="STEPS",
    help="Train what is left, with zeros and grids held, on the original's own text [default: 0].",
)
@click.option(
    "--preset",
    type=click.Choice(["paper-int8", "paper-sparse"]),
    help="An experiment of arXiv 2311.01544; see docs/sparsity.md.",
)
@click.option(
    "--int8-share",
    type=click.FloatRange(0, 1),
    help="With --preset paper-int8: share of the components in Q8_0, the rest is F16 "
    "[default: 0.8].",
)
@click.option(
    "--types",
    type=Types(),
    help="GGML types that may be used, with commas between [default: all but Q3_K].",
)
@click.option("--prompts", type=PATH, help="Text lines, or JSONL with `prompt` or `messages`.")
@click.option(
    "--tokens",
    type=click.IntRange(2, 4096),
    default=96,
    show_default=True,
    help="Greedy tokens a prompt.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on where an earlier run stopped.",
)
@click.option(
    "--imatrix",
    type=PATH,
    help="Importance vectors from llama-imatrix, instead of those measured here.",
)
@click.option(
    "--feedback/--no-feedback",
    default=True,
    show_default=True,
    help="Let each block make up for the rounding errors of the others.",
)
@click.option(
    "--in-order/--no-in-order",
    default=True,
    show_default=True,
    help="Fit matrices with zeros again in the order of the layers, each making up for all before.",
)
@click.option(
    "--equalize/--no-equalize",
    default=True,
    show_default=True,
    help="Scale channels, without changing the function, so that rounding does less harm.",
)
def compress(
    model: Path | None,
    profile: str,
    output: Path,
    sparsity: float,
    types: tuple[str, ...] | None,
    preset: str | None,
    **options: Any,
) -> None:
    """Measure MODEL (an HF folder or a GGUF), choose a treatment for every matrix, export one
    GGUF, check it in llama.cpp and leave a bundle. Without MODEL: SmolLM2-135M-Instruct, as
    tools/make_smollm2.py makes it."""
    from edge_dtm.core.paths import default_model_dir
    from edge_dtm.core.progress import Stages
    from edge_dtm.formats.plan import CANDIDATE_TYPES
    from edge_dtm.formats.profile import load_profile

    types, sparsity = _preset(preset, types, sparsity, options)
    targets = options["max_sdt"] is not None or options["min_fdt"] is not None
    if sparsity and targets:
        raise click.UsageError("--sparsity goes with a size, not with --max-sdt or --min-fdt")
    if options["max_transfer"] is not None and (sparsity or targets):
        raise click.UsageError(
            "with --max-transfer the search decides on zeros: it goes with --max-bytes only"
        )
    options["sparsity_steps"] = options["sparsity_steps"] or 1
    options["recover_steps"] = options["recover_steps"] or 0
    if options["sparsity_steps"] > 1 and not (sparsity and options["recover_steps"]):
        raise click.UsageError("--sparsity-steps needs --sparsity and --recover")
    device_profile = load_profile(profile)
    if model is None:
        model = default_model_dir()
        if not model.is_dir():
            raise EdgeDtmError(
                f"no MODEL given and {model} is not there: run python tools/make_smollm2.py, or "
                "give an HF checkpoint folder or a .gguf file"
            )
    from edge_dtm.host.compress import Settings
    from edge_dtm.host.compress import compress as run

    run(
        Settings(
            model=model,
            out=output,
            profile=device_profile,
            types=types or CANDIDATE_TYPES,
            zero_share=sparsity,
            **options,
        ),
        Stages(),
    )


def _preset(
    preset: str | None,
    types: tuple[str, ...] | None,
    sparsity: float,
    options: dict[str, Any],
) -> tuple[tuple[str, ...] | None, float]:
    """Types and sparsity, and in `options` the rest of what a preset asks for."""
    if options["int8_share"] is not None and preset != "paper-int8":
        raise click.UsageError("--int8-share goes with --preset paper-int8")
    if preset is None:
        return types, sparsity
    targets = ("max_sdt", "min_fdt", "max_transfer")
    if types or any(options[t] is not None for t in targets):
        raise click.UsageError("--preset sets the types; it takes no --types and no target")
    options["unlimited"] = options["max_bytes"] is None
    if preset == "paper-int8":
        if sparsity:
            raise click.UsageError("--sparsity goes with --preset paper-sparse")
        if options["int8_share"] is None:
            options["int8_share"] = 0.8
        # As the paper rounds: neither scales nor feedback.
        options["equalize"] = options["feedback"] = False
        return ("F16", "Q8_0"), 0.0
    if options["recover_steps"] is None:
        options["recover_steps"] = 500
    if options["sparsity_steps"] is None:
        options["sparsity_steps"] = 4 if options["recover_steps"] else 1
    return ("F16",), sparsity or 0.75


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--png", type=PATH, help="Where to draw it [default: BUNDLE-frontier.png].")
@click.option(
    "--rows", type=click.IntRange(2), default=20, show_default=True, help="Rows of the table."
)
def frontier(bundle: Path, png: Path | None, rows: int) -> None:
    """File size against predicted SDT and FDT, as a table and a PNG."""
    from rich.console import Console
    from rich.table import Table

    plan = read_json(bundle / "plan.json")
    target = png or bundle.resolve().with_name(f"{bundle.resolve().name}-frontier.png")
    require_folder_of(target, bundle)
    try:
        points, chosen = plan["frontier"], plan["predicted"]
        step = max(1, (len(points) - 1) // (rows - 1))
        shown = sorted({*range(0, len(points), step), len(points) - 1})
        lines = [
            (f"{p['size_bytes']:,}", f"{p['sigma']:.3f}", f"{p['sdt']:.2%}", f"{p['fdt']:.1f}")
            for p in (points[i] for i in shown)
        ]
        words = f"chosen: predicted SDT {chosen['sdt']:.2%}, mean FDT {chosen['fdt']:.1f}"
    except (IndexError, KeyError, TypeError, ValueError):
        raise EdgeDtmError(
            f"{bundle / 'plan.json'} holds no frontier: make the bundle again"
        ) from None
    table = Table("bytes", "sigma", "predicted SDT", "predicted FDT", box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.print(table)
    console.print(words)
    from edge_dtm.formats.plan import Plan
    from edge_dtm.report.frontier_figure import draw_frontier

    draw_frontier(points, Plan.from_json(plan).size_bytes, chosen, target)
    console.print(f"drawn: {target}", highlight=False, soft_wrap=True)


@click.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, help="The folder to make [default: BUNDLE-recipe].")
def recipe(bundle: Path, output: Path | None) -> None:
    """What llama.cpp's own llama-quantize needs to give every tensor the plan's type: a
    --tensor-type-file and our importance matrix. Its blocks are plainly rounded, though."""
    from edge_dtm.formats.imatrix import write_imatrix
    from edge_dtm.formats.plan import Plan
    from edge_dtm.formats.reference import load_imatrix
    from edge_dtm.formats.tensor_types import quantize_command, write_tensor_types

    plan = Plan.from_json(read_json(bundle / "plan.json"))
    manifest = read_json(bundle / "manifest.json")
    measured = manifest.get("measured", {})
    if (measured.get("removal") or {}).get("kept") or measured.get("recovery"):
        raise EdgeDtmError(
            f"{bundle} is no recipe's: --remove or --recover changed the model, and llama-quantize "
            "would start from the original; use the bundle's own model.gguf"
        )
    key = manifest.get("provenance", {}).get("work_key")
    path = bundle / "work" / f"imatrix-{key}.npz"
    if not path.is_file():
        raise EdgeDtmError(
            f"{bundle / 'work'} holds no importance vectors of this bundle: run edge-dtm compress "
            "again (an unpacked bundle has no work folder)"
        )
    vectors, tokens = load_imatrix(path)
    folder = output or bundle.resolve().with_name(f"{bundle.resolve().name}-recipe")
    folder.mkdir(parents=True, exist_ok=True)
    types, matrix = folder / "tensor-types.txt", folder / "imatrix.gguf"
    write_tensor_types(types, plan)
    # A power of two lets llama-quantize get back the very vectors (see write_imatrix).
    write_imatrix(matrix, vectors, 1 << (tokens.bit_length() - 1), ["edge-dtm calibration"])
    click.echo(f"{types}\n{matrix}\nWith the model as an F32, F16 or BF16 GGUF:\n")
    click.echo(
        "  " + quantize_command(plan, types, matrix, Path("MODEL.gguf"), Path("QUANTIZED.gguf"))
    )


COMMANDS = (compress, frontier, recipe)
