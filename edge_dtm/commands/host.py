"""Commands of the host: compress a model, and what its plan says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import click

from edge_dtm.commands.common import PATH, Bytes, Types, read_json, require_folder_of
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
    "--sparsity",
    type=click.FloatRange(0, 0.94),  # 95 % is the most a row may have, rounded to whole weights
    default=0.0,
    help="Average share of zeros over the block matrices.",
)
@click.option(
    "--sparsity-steps",
    type=click.IntRange(1, 50),
    help="Reach --sparsity in so many steps, with --distill after each [default: 1].",
)
@click.option(
    "--mask-score",
    type=click.Choice(["activation", "saliency", "magnitude"]),
    default="activation",
    show_default=True,
    help="Which weights of a row become zero first.",
)
@click.option(
    "--distill",
    "--recover",
    "distill_steps",
    type=click.IntRange(0),
    metavar="STEPS",
    help="Train the compressed model on the original's own text, with masks and grids held "
    "[default: 0].",
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
    help="Error feedback: each rounding makes up for the errors of those before it.",
)
@click.option(
    "--sequential-pruning/--no-sequential-pruning",
    "--in-order/--no-in-order",
    "sequential_pruning",
    default=True,
    show_default=True,
    help="Fit matrices with zeros again, layer by layer, each to what the layers before it left.",
)
@click.option(
    "--equalize/--no-equalize",
    default=True,
    show_default=True,
    help="Scale channels, without changing the function, so that rounding does less harm.",
)
def compress(
    model: Path | None,
    output: Path,
    profile: str,
    max_bytes: int | None,
    max_sdt: float | None,
    min_fdt: float | None,
    sparsity: float,
    sparsity_steps: int | None,
    mask_score: str,
    distill_steps: int | None,
    preset: str | None,
    int8_share: float | None,
    types: tuple[str, ...] | None,
    prompts: Path | None,
    tokens: int,
    device: str,
    seed: int,
    resume: bool,
    imatrix: Path | None,
    feedback: bool,
    sequential_pruning: bool,
    equalize: bool,
) -> None:
    """Measure MODEL (an HF folder or a GGUF), choose a treatment for every matrix, export one
    GGUF, check it in llama.cpp and leave a bundle. Without MODEL: SmolLM2-135M-Instruct, as
    tools/make_smollm2.py makes it."""
    from edge_dtm.core.progress import Stages
    from edge_dtm.formats.plan import CANDIDATE_TYPES
    from edge_dtm.formats.profile import load_profile

    asked = Asked(types, sparsity, sparsity_steps, distill_steps, int8_share, feedback, equalize)
    if preset is not None and (max_sdt is not None or min_fdt is not None):
        raise click.UsageError("--preset sets the types; it takes no --types and no target")
    asked = _with_preset(preset, asked)
    if asked.sparsity and (max_sdt is not None or min_fdt is not None):
        raise click.UsageError("--sparsity goes with a size, not with --max-sdt or --min-fdt")
    steps = asked.sparsity_steps or 1
    if steps > 1 and not (asked.sparsity and asked.distill_steps):
        raise click.UsageError("--sparsity-steps needs --sparsity and --distill")
    device_profile = load_profile(profile)
    model = model or _default_model()
    # torch is imported only now, after all that can be wrong in the command line.
    from edge_dtm.host.compress import compress as run
    from edge_dtm.host.settings import Goal, Method, Settings, Source

    goal = Goal(
        profile=device_profile,
        max_bytes=max_bytes,
        unlimited=preset is not None and max_bytes is None,
        max_sdt=max_sdt,
        min_fdt=min_fdt,
        types=asked.types or CANDIDATE_TYPES,
        sparsity=asked.sparsity,
        int8_share=asked.int8_share,
    )
    method = Method(
        device=device,
        feedback=asked.feedback,
        equalize=asked.equalize,
        mask_score=mask_score,
        sequential_pruning=sequential_pruning,
        sparsity_steps=steps,
        distill_steps=asked.distill_steps or 0,
    )
    run(
        Settings(output, Source(model, prompts, tokens, seed, imatrix), goal, method, resume),
        Stages(),
    )


def _default_model() -> Path:
    from edge_dtm.core.paths import default_model_dir

    model = default_model_dir()
    if not model.is_dir():
        raise EdgeDtmError(
            f"no MODEL given and {model} is not there: run python tools/make_smollm2.py, or "
            "give an HF checkpoint folder or a .gguf file"
        )
    return model


@dataclass(frozen=True)
class Asked:
    """The options that a preset sets. None: not given."""

    types: tuple[str, ...] | None
    sparsity: float
    sparsity_steps: int | None
    distill_steps: int | None
    int8_share: float | None
    feedback: bool
    equalize: bool


def _with_preset(preset: str | None, asked: Asked) -> Asked:
    """The options with what an experiment of arXiv 2311.01544 sets."""
    if asked.int8_share is not None and preset != "paper-int8":
        raise click.UsageError("--int8-share goes with --preset paper-int8")
    if preset is None:
        return asked
    if asked.types:
        raise click.UsageError("--preset sets the types; it takes no --types and no target")
    if preset == "paper-int8":
        if asked.sparsity:
            raise click.UsageError("--sparsity goes with --preset paper-sparse")
        share = 0.8 if asked.int8_share is None else asked.int8_share
        # As the paper rounds: neither scales nor feedback.
        return replace(
            asked, types=("F16", "Q8_0"), int8_share=share, feedback=False, equalize=False
        )
    steps = 500 if asked.distill_steps is None else asked.distill_steps
    return replace(
        asked,
        types=("F16",),
        sparsity=asked.sparsity or 0.75,
        distill_steps=steps,
        sparsity_steps=asked.sparsity_steps or (4 if steps else 1),
    )


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
    if measured.get("recovery"):
        raise EdgeDtmError(
            f"{bundle} is no recipe's: --distill changed the model, and llama-quantize would start "
            "from the original; use the bundle's own model.gguf"
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
