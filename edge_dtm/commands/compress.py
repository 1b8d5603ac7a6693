"""Command of the host: compress a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edge_dtm.commands.common import PATH, device, grouped, load_profile, size_bytes, types
from edge_dtm.core.errors import EdgeDtmError

if TYPE_CHECKING:
    from edge_dtm.host.settings import Goal, Method, Source

# What an experiment of arXiv 2311.01544 sets, as defaults of the options.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # As the paper rounds: neither scales nor feedback.
    "paper-int8": {"types": "F16,Q8_0", "int8_share": 0.8, "feedback": False, "equalize": False},
    "paper-sparse": {"types": "F16", "sparsity": 0.75, "distill_steps": 500, "sparsity_steps": 4},
}


def _set_defaults(ctx: click.Context, parameter: click.Parameter, preset: str | None) -> str | None:
    if preset is not None:
        ctx.default_map = dict(PRESETS[preset])
    return preset


def _default_model() -> Path:
    from edge_dtm.core.files import default_model_dir

    model = default_model_dir()
    if not model.is_dir():
        raise EdgeDtmError(
            f"no MODEL given and {model} is not there: run python tools/make_smollm2.py, or "
            "give an HF checkpoint folder or a .gguf file"
        )
    return model


def _switch(name: str, words: str) -> Callable[[Any], Any]:
    return click.option(f"--{name}/--no-{name}", default=True, help=words)


@click.command()
@click.argument("model", type=PATH, default=_default_model)
@click.option("-o", "--output", type=PATH, help="Folder of the bundle.")
@click.option("--prompts", type=PATH, help="Text lines, or JSONL with `prompt` or `messages`.")
@click.option(
    "--tokens",
    type=click.IntRange(2, 4096),
    default=96,
    help="Greedy tokens for each prompt, at most.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(100),
    default=6000,
    help="Tokens of the model's own text that rounding is fitted to, beside the prompts.",
)
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--imatrix", type=PATH, help="Use these importance vectors from llama-imatrix.")
@click.option(
    "--profile",
    type=load_profile,
    metavar="PROFILE",
    default="raspberrypi",
    help="Device profile: a name or a .toml file.",
)
@click.option(
    "--max-bytes",
    type=size_bytes,
    metavar="BYTES",
    help="Limit of the file size, instead of the profile's: N, NM, NG.",
)
@click.option(
    "--max-sdt",
    type=click.FloatRange(0, 1, min_open=True),
    help="Make the smallest file with at most this SDT (0.02 is 2 %).",
)
@click.option(
    "--min-fdt",
    type=click.FloatRange(0, min_open=True),
    help="Make the smallest file with at least this mean FDT, in tokens.",
)
@click.option(
    "--types",
    type=types,
    help="GGML types to choose from, separated by commas [default: all but Q3_K].",
)
@click.option(
    "--sparsity",
    type=click.FloatRange(0, 0.94),  # 95 % is the most a row may have, rounded to whole weights
    default=0.0,
    help="Share of zeros in the block matrices, on average.",
)
@click.option(
    "--sparsity-steps",
    type=click.IntRange(1, 50),
    default=1,
    help="Reach --sparsity in so many steps, with --distill after each.",
)
@click.option(
    "--mask-score",
    type=click.Choice(["activation", "saliency", "magnitude"]),
    default="activation",
    help="What decides which weights of a row become zero.",
)
@click.option(
    "--sequential-pruning/--no-sequential-pruning",
    "--in-order/--no-in-order",
    "sequential_pruning",
    default=True,
    help="Fit matrices with zeros layer by layer, each to the output of the pruned layers before.",
)
@click.option(
    "--distill",
    "--recover",
    "distill_steps",
    type=click.IntRange(0),
    default=0,
    metavar="STEPS",
    help="Train the compressed model on the original's own text. Masks and grids stay.",
)
@_switch(
    "feedback", "Error feedback: rounding a weight corrects the errors of those rounded before."
)
@_switch(
    "equalize", "Scale channels, without changing the function, so that rounding does less harm."
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    is_eager=True,  # it sets the defaults of the other options
    callback=_set_defaults,
    help="An experiment of arXiv 2311.01544; see docs/sparsity.md.",
)
@click.option(
    "--int8-share",
    type=click.FloatRange(0, 1),
    help="With --preset paper-int8: share of the matrices in Q8_0, the rest in F16 [default: 0.8].",
)
@click.option(
    "--device", type=device, metavar="DEVICE", default="auto", help="auto, cpu, cuda or cuda:N."
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes on the CPU [default: a core each, as far as the memory goes].",
)
@_switch("resume", "Continue where an earlier run stopped.")
@click.option(
    "--dry-run", is_flag=True, help="Say what it would take and make here, and do nothing."
)
@click.pass_context
@grouped(
    source="edge_dtm.host.settings:Source",
    goal="edge_dtm.host.settings:Goal",
    method="edge_dtm.host.settings:Method",
)
def compress(
    ctx: click.Context,
    output: Path | None,
    preset: str | None,
    resume: bool,
    dry_run: bool,
    source: Source,
    goal: Goal,
    method: Method,
) -> None:
    """Compress MODEL, an HF folder or a GGUF, into a bundle with one GGUF file.

    Measures how sensitive every matrix is, chooses a GGML type for each, and checks the result in
    llama.cpp. Without MODEL: SmolLM2-135M-Instruct, as tools/make_smollm2.py makes it."""
    from rich.console import Console

    from edge_dtm.core.progress import Stages

    target = goal.max_sdt is not None or goal.min_fdt is not None
    own = {p for p in ctx.params if ctx.get_parameter_source(p) is ParameterSource.COMMANDLINE}
    if preset is not None and (target or "types" in own):
        raise click.UsageError("--preset sets the types; it takes no --types and no target")
    if preset != "paper-int8" and goal.int8_share is not None:
        raise click.UsageError("--int8-share goes with --preset paper-int8")
    if preset == "paper-int8" and goal.sparsity:
        raise click.UsageError("--sparsity goes with --preset paper-sparse")
    if goal.sparsity and target:
        raise click.UsageError("--sparsity goes with a size, not with --max-sdt or --min-fdt")
    if method.sparsity_steps > 1 and not (goal.sparsity and method.distill_steps):
        if "sparsity_steps" in own:
            raise click.UsageError("--sparsity-steps needs --sparsity and --distill")
        method = replace(method, sparsity_steps=1)
    goal = replace(goal, unlimited=preset is not None and goal.max_bytes is None)
    if output is None and not dry_run:
        raise click.UsageError("give the bundle's folder: -o FOLDER")
    # torch is imported only now, after all that can be wrong in the command line.
    from edge_dtm.host.settings import Settings

    settings = Settings(output or Path(), source, goal, method, resume)
    if dry_run:
        from edge_dtm.host.dry_run import dry_run as estimate

        estimate(settings, Console())
    else:
        from edge_dtm.host.compress import compress as run

        run(settings, Stages())
