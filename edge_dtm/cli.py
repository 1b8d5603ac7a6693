"""The command line: one command a stage. Parses, calls, prints; stages are imported inside their
command, since `--help` has to answer at once on a slow device."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from edge_dtm import __version__
from edge_dtm.errors import EdgeDtmError

EXIT_ERROR, EXIT_USAGE, EXIT_VERIFIED_AND_FAILED = 1, 2, 3
PATH = click.Path(path_type=Path)


class Bytes(click.ParamType[int]):
    """A number of bytes with an optional unit: 105000000, 105M (10^6), 4.2G (10^9)."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text, factor = str(value).strip(), 1
        if text and text[-1].upper() in "KMG":
            factor = {"K": 10**3, "M": 10**6, "G": 10**9}[text[-1].upper()]
            text = text[:-1]
        try:
            number = float(text) * factor
        except ValueError:
            self.fail(f"{value!r} is no size: write 105000000, 105M or 4.2G", param, ctx)
        if not 0 < number < 2**63:
            self.fail(f"{value!r} is no size a file can have", param, ctx)
        return int(number)


class Types(click.ParamType[tuple[str, ...]]):
    """GGML type names with commas between."""

    name = "types"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        from edge_dtm.plan import ALL_TYPES

        names = tuple(n.strip() for n in str(value).split(",") if n.strip())
        unknown = [n for n in names if n not in ALL_TYPES]
        if unknown or not names:
            self.fail(
                f"unknown types {', '.join(unknown) or '(none given)'}; choose among "
                f"{', '.join(ALL_TYPES)}",
                param,
                ctx,
            )
        return names


class Removal(click.ParamType[float]):
    """A share, or `auto`, which is the share 0: the search decides."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if value == "auto":
            return 0.0
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            self.fail(f"{value!r} is no share: write auto or a number such as 0.1", param, ctx)
        return share


class Group(click.Group):
    """Errors for people: one line on stderr, exit status 1, no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeDtmError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(EXIT_ERROR)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"error: {where}{error.strerror or error}", err=True)
            ctx.exit(EXIT_ERROR)
        except ImportError as error:
            if error.name and error.name.split(".")[0] in ("torch", "transformers", "safetensors",
                                                          "matplotlib", "jinja2", "sentencepiece"):  # fmt: skip
                click.echo(
                    f"error: this command needs {error.name}: pip install 'edge-dtm[host]'",
                    err=True,
                )
                ctx.exit(EXIT_ERROR)
            raise


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge-dtm")
def main() -> None:
    """Ship a smaller Llama that still says the same words, and prove it on the device.

    Exit status: 0 pass, 1 error, 2 wrong usage, 3 verified and failed.
    """


@main.command()
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
    from edge_dtm.paths import default_model_dir
    from edge_dtm.plan import CANDIDATE_TYPES
    from edge_dtm.profiles import load_profile
    from edge_dtm.progress import Stages

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


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--png", type=PATH, help="Where to draw it [default: BUNDLE-frontier.png].")
@click.option(
    "--rows", type=click.IntRange(2), default=20, show_default=True, help="Rows of the table."
)
def frontier(bundle: Path, png: Path | None, rows: int) -> None:
    """File size against predicted SDT and FDT, as a table and a PNG."""
    from rich.console import Console
    from rich.table import Table

    plan = _read_json(bundle / "plan.json")
    try:
        points, chosen = plan["frontier"], plan["predicted"]
    except (KeyError, TypeError):
        raise EdgeDtmError(
            f"{bundle / 'plan.json'} holds no frontier: make the bundle again"
        ) from None
    step = max(1, (len(points) - 1) // (rows - 1))
    shown = sorted({*range(0, len(points), step), len(points) - 1})
    table = Table("bytes", "sigma", "predicted SDT", "predicted FDT", box=None, pad_edge=False)
    for i in shown:
        p = points[i]
        table.add_row(
            f"{p['size_bytes']:,}", f"{p['sigma']:.3f}", f"{p['sdt']:.2%}", f"{p['fdt']:.1f}"
        )
    console = Console()
    console.print(table)
    console.print(f"chosen: predicted SDT {chosen['sdt']:.2%}, mean FDT {chosen['fdt']:.1f}")
    target = png or bundle.resolve().with_name(f"{bundle.resolve().name}-frontier.png")
    from edge_dtm.host.figure import draw_frontier
    from edge_dtm.plan import Plan

    draw_frontier(points, Plan.from_json(plan).size_bytes, chosen, target)
    console.print(f"drawn: {target}", highlight=False, soft_wrap=True)


@main.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--mode",
    type=click.Choice(["teacher-forced", "generate"]),
    default="teacher-forced",
    show_default=True,
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads [default: all cores].")
@click.option("--max-sequences", type=click.IntRange(1), help="Replay only the first N sequences.")
@click.option(
    "--max-sdt", type=click.FloatRange(0, 1), help="Threshold instead of the manifest's, a share."
)
@click.option(
    "--min-fdt", type=click.FloatRange(0), help="Threshold instead of the manifest's, in tokens."
)
@click.option("--json", "json_file", type=PATH, help="Also write the verdict as JSON.")
def verify(bundle: Path, mode: str, json_file: Path | None, **options: Any) -> None:
    """Replay the original's greedy outputs on this device and say pass (0) or fail (3).

    BUNDLE is a folder or a packed file."""
    from edge_dtm.device.verify import print_verdict
    from edge_dtm.device.verify import verify as run
    from edge_dtm.progress import Stages

    with Stages().several() as progress:
        verdict = run(
            bundle,
            mode="generate" if mode == "generate" else "teacher_forced",
            progress=progress,
            **options,
        )
    print_verdict(verdict)
    if json_file is not None:
        _write_json(json_file, verdict.to_json())
    if not verdict.passed:
        sys.exit(EXIT_VERIFIED_AND_FAILED)


@main.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, help="The file to write [default: BUNDLE.tar.zst].")
def pack(bundle: Path, output: Path | None) -> None:
    """Make one .tar.zst file of a bundle; the same bundle always gives the same bytes."""
    from edge_dtm.bundle import pack as run
    from edge_dtm.progress import Stages

    target = output or bundle.resolve().parent / f"{bundle.resolve().name}.tar.zst"
    stages = Stages()
    with stages("Packing", _folder_bytes(bundle)) as advance:
        run(bundle, target, progress=advance)
    click.echo(f"{target}: {target.stat().st_size:,} bytes")


@main.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, help="The folder to make [default: BUNDLE-recipe].")
def recipe(bundle: Path, output: Path | None) -> None:
    """What llama.cpp's own llama-quantize needs to give every tensor the plan's type: a
    --tensor-type-file and our importance matrix. Its blocks are plainly rounded, though."""
    from edge_dtm.imatrix import write_imatrix
    from edge_dtm.plan import Plan
    from edge_dtm.reference import load_imatrix
    from edge_dtm.tensor_types import quantize_command, write_tensor_types

    plan = Plan.from_json(_read_json(bundle / "plan.json"))
    manifest = _read_json(bundle / "manifest.json")
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


@main.command()
@click.argument("file", type=PATH)
@click.option(
    "-o", "--output", type=PATH, help="The folder to make [default: FILE without .tar.zst]."
)
def unpack(file: Path, output: Path | None) -> None:
    """Check a packed bundle and make a folder of it."""
    from edge_dtm.bundle import unpack as run
    from edge_dtm.progress import Stages

    name = file.name
    for suffix in (".zst", ".tar"):
        name = name.removesuffix(suffix)
    target = output or file.resolve().parent / (name if name != file.name else f"{name}.bundle")
    with Stages()("Unpacking", 0) as advance:
        run(file, target, progress=advance)
    click.echo(f"{target}")


@main.command()
@click.argument("file", type=PATH)
@click.option("--json", "json_file", type=PATH, help="Also write it as JSON.")
def inspect(file: Path, json_file: Path | None) -> None:
    """Types, bytes, zeros and a map layer by layer of a bundle or any GGUF."""
    from rich.console import Console
    from rich.table import Table

    from edge_dtm import report
    from edge_dtm.device.runner import check_gguf
    from edge_dtm.inspect import describe

    path = file / "model.gguf" if file.is_dir() else file
    check_gguf(path)
    tensors = describe(path)
    counts: dict[str, list[int]] = {}
    for t in tensors:
        entry = counts.setdefault(t.type, [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + t.size_bytes
    console = Console()
    table = Table("type", "tensors", "bytes", "share", box=None, pad_edge=False)
    size = path.stat().st_size
    for name, (n, total) in sorted(counts.items(), key=lambda item: -item[1][1]):
        table.add_row(name, str(n), f"{total:,}", f"{total / size:.1%}")
    console.print(f"{path}: {size:,} bytes", highlight=False, soft_wrap=True)
    console.print(table)
    console.print(report.map_table({t.component: t.text for t in tensors if t.is_matrix}))
    if any(t.zero_share is not None and t.zero_share >= 0.05 for t in tensors):
        console.print(f"%0: share of exact zeros (F16, Q8_0), shown from 5 %. {report.ZEROS_NOTE}")
    if json_file is not None:
        _write_json(
            json_file,
            {"file": path.name, "size_bytes": size, "tensors": [t.to_json() for t in tensors]},
        )


@main.command()
@click.argument("gguf_file", metavar="MODEL.gguf", type=PATH)
@click.option(
    "--reference", type=PATH, required=True, help="A reference.npz, or a bundle's folder."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads [default: all cores].")
@click.option("--json", "json_file", type=PATH, help="Also write the result as JSON.")
def measure(gguf_file: Path, reference: Path, threads: int | None, json_file: Path | None) -> None:
    """FDT and SDT of anybody's GGUF against a reference, teacher-forced in llama.cpp."""
    from edge_dtm.device.runner import (
        LlamaRunner,
        RunSettings,
        check_gguf,
        context_needed,
        default_threads,
        replay_tokens,
    )  # fmt: skip
    from edge_dtm.metrics import compare, perplexity
    from edge_dtm.progress import Stages
    from edge_dtm.reference import HELD_OUT, Reference
    from edge_dtm.report import interval

    check_gguf(gguf_file)
    path = reference / "reference.npz" if reference.is_dir() else reference
    held_out = Reference.load(path).part(HELD_OUT)
    settings = RunSettings(threads=threads or default_threads())
    with (
        Stages()("Replaying", replay_tokens(held_out)) as advance,
        LlamaRunner(gguf_file, settings, context_needed(held_out)) as runner,
    ):
        record = runner.teacher_forced(held_out, advance)
    lengths = held_out.generated_lengths
    result = compare(held_out.generated_ids, record.ids, lengths, held_out.margins)
    data = {
        **result.to_json(),
        "perplexity": perplexity(record.reference_log_probabilities, lengths),
        "prefill_tokens_per_s": record.prefill_tokens_per_s,
        "size_bytes": gguf_file.stat().st_size,
    }
    click.echo(f"SDT {interval(data['sdt'], True)}")
    click.echo(
        f"mean FDT {interval(data['fdt'], False)} of at most {held_out.generated_ids.shape[1]}"
    )
    click.echo(f"{result.identical_share:.1%} of {result.sequences} sequences without divergence")
    click.echo(f"perplexity on the original's text {data['perplexity']:.4f}")
    if json_file is not None:
        _write_json(json_file, data)


@main.group()
def profiles() -> None:
    """Device profiles: what a device can hold and read."""


@profiles.command("list")
def profiles_list() -> None:
    """All packaged profiles, a line each."""
    from edge_dtm.profiles import list_profiles

    for p in list_profiles():
        click.echo(f"{p.name:18} {p.ram_bytes / 1e9:5.1f} GB RAM  {p.description}")


@profiles.command("show")
@click.argument("name")
def profiles_show(name: str) -> None:
    """Every number of a profile with its source."""
    from dataclasses import fields

    from edge_dtm.profiles import load_profile

    profile = load_profile(name)
    for f in fields(profile):
        if f.name == "sources":
            continue
        click.echo(f"{f.name} = {getattr(profile, f.name)}")
        if f.name in profile.sources:
            click.echo(f"    {profile.sources[f.name]}")


def _folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*") if p.is_file())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EdgeDtmError(f"{path} does not exist: give a folder that compress made") from None
    except ValueError as error:
        raise EdgeDtmError(f"{path} is no JSON ({error}): make the bundle again") from None


def _write_json(path: Path, data: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
