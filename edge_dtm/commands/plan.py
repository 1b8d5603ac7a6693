"""Commands about the plan of a bundle: its frontier, and a recipe for llama-quantize."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dtm.commands.common import PATH, read_json, require_folder_of
from edge_dtm.core.errors import EdgeDtmError


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--png", type=PATH, help="Where to draw it [default: BUNDLE-frontier.png].")
@click.option(
    "--rows", type=click.IntRange(2), default=20, show_default=True, help="Rows of the table."
)
def frontier(bundle: Path, png: Path | None, rows: int) -> None:
    """Show file size against predicted SDT and FDT, as a table and a PNG."""
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
    """Write what llama-quantize needs to make a file with the types of the plan.

    That is a --tensor-type-file and an importance matrix. llama-quantize rounds without error
    feedback."""
    from edge_dtm.formats.imatrix import write_imatrix
    from edge_dtm.formats.plan import Plan
    from edge_dtm.formats.reference import load_imatrix
    from edge_dtm.formats.tensor_types import quantize_command, write_tensor_types

    plan = Plan.from_json(read_json(bundle / "plan.json"))
    manifest = read_json(bundle / "manifest.json")
    measured = manifest.get("measured", {})
    if measured.get("distillation"):
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


COMMANDS = (frontier, recipe)
