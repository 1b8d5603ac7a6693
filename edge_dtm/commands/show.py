"""Commands that show what is there: types in a file, the frontier of a plan, a page of a bundle,
verdicts side by side."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import click

from edge_dtm.commands.common import PATH, beside, json_option, require_writable, write_json
from edge_dtm.core.errors import EdgeDtmError


@click.command()
@click.argument("file", type=PATH)
@json_option("it")
def inspect(file: Path, json_file: Path | None) -> None:
    """Show the types and zeros in a model, layer by layer.

    FILE is a bundle, packed or not, or any GGUF."""
    from rich.console import Console
    from rich.table import Table

    from edge_dtm.formats.archive import SUFFIX, open_bundle
    from edge_dtm.formats.bundle import MODEL
    from edge_dtm.llamacpp.ggml import zero_shares
    from edge_dtm.llamacpp.gguf_header import check_gguf, read_header
    from edge_dtm.report.layer_map import PARTS, text_rows
    from edge_dtm.report.summary import ZEROS_NOTE

    require_writable(file, json_file)
    path, name = file, str(file)
    if file.is_dir():
        path, name = file / MODEL, str(file / MODEL)
    with ExitStack() as stack:
        if file.suffix == SUFFIX and file.is_file():
            path, name = (
                stack.enter_context(open_bundle(file)).path(MODEL),
                f"{file}, {MODEL} of it",
            )
        check_gguf(path)
        tensors, zeros, size = read_header(path).tensors, zero_shares(path), path.stat().st_size
    sizes: dict[str, list[int]] = {}
    for t in tensors:
        sizes.setdefault(t.type, []).append(t.size_bytes)
    types = Table("type", "tensors", "bytes", "share", box=None, pad_edge=False)
    for type_name, each in sorted(sizes.items(), key=lambda item: -sum(item[1])):
        types.add_row(type_name, str(len(each)), f"{sum(each):,}", f"{sum(each) / size:.1%}")
    layers = Table("layer", *PARTS, box=None, pad_edge=False)
    types_shown = {t.component: t.type for t in tensors if t.is_matrix}
    many = {name: f" {share:.0%}0" for name, share in zeros.items() if share >= 0.05}
    for row in text_rows({name: text + many.get(name, "") for name, text in types_shown.items()}):
        layers.add_row(*row)
    console = Console()
    console.print(f"{name}: {size:,} bytes", highlight=False, soft_wrap=True)
    console.print(types, layers, sep="\n")
    if many:
        console.print(f"%0: share of exact zeros (F16, Q8_0), shown from 5 %. {ZEROS_NOTE}")
    listed = [
        {
            "name": t.name,
            "type": t.type,
            "shape": t.shape[::-1],
            "size_bytes": t.size_bytes,
            "zero_share": zeros.get(t.component),
        }
        for t in tensors
    ]
    write_json(json_file, {"file": path.name, "size_bytes": size, "tensors": listed})


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--png", type=PATH, help="Where to draw it [default: BUNDLE-frontier.png].")
@click.option("--rows", type=click.IntRange(2), default=20, help="Rows of the table.")
def frontier(bundle: Path, png: Path | None, rows: int) -> None:
    """Show file size against predicted SDT and FDT, as a table and a PNG."""
    from rich.console import Console
    from rich.table import Table

    from edge_dtm.formats.bundle import PLAN
    from edge_dtm.report.frontier import draw_frontier, read_plan_file

    target = png or beside(bundle, "-frontier.png")
    require_writable(bundle, target)
    plan, choice = read_plan_file(bundle / PLAN)
    points, chosen = choice.frontier, choice.predicted
    if chosen is None or not points:
        raise EdgeDtmError(f"{bundle / PLAN} holds no frontier: make the bundle again")
    table = Table("bytes", "sigma", "predicted SDT", "predicted FDT", box=None, pad_edge=False)
    step = max(1, (len(points) - 1) // (rows - 1))
    for i in sorted({*range(0, len(points), step), len(points) - 1}):
        p = points[i]
        table.add_row(f"{p.size_bytes:,}", f"{p.sigma:.3f}", f"{p.sdt:.2%}", f"{p.fdt:.1f}")
    console = Console()
    console.print(table)
    console.print(f"chosen: predicted SDT {chosen.sdt:.2%}, mean FDT {chosen.fdt:.1f}")
    draw_frontier(points, plan.size_bytes, chosen, target)
    console.print(f"drawn: {target}", highlight=False, soft_wrap=True)


@click.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, help="The page to write [default: BUNDLE-report.html].")
@click.option(
    "--verdict",
    "verdicts",
    type=PATH,
    multiple=True,
    help="A verdict from `verify --json`. May be repeated.",
)
@click.option(
    "--with",
    "measures",
    type=PATH,
    multiple=True,
    help="Another file to compare with, from `measure --json`. May be repeated.",
)
@click.option(
    "--record",
    type=PATH,
    help="Show the texts and divergences of this device, from `verify --record`, instead of the "
    "host's.",
)
def report(
    bundle: Path,
    output: Path | None,
    verdicts: tuple[Path, ...],
    measures: tuple[Path, ...],
    record: Path | None,
) -> None:
    """Write an HTML page of a bundle: verdicts, figures, texts side by side.

    BUNDLE is a folder or a packed file. The page needs no network. It contains the bundle's
    held-out prompts."""
    from edge_dtm.core.files import write_whole
    from edge_dtm.formats.archive import open_bundle
    from edge_dtm.report.gather import gather
    from edge_dtm.report.page import page

    target = output or beside(bundle, "-report.html")
    require_writable(bundle, target)
    with open_bundle(bundle) as opened:
        opened.check()
        data = gather(opened, verdicts, measures, record)
    write_whole(target, page(data).encode())
    click.echo(f"{target}: {target.stat().st_size:,} bytes")


@click.command()
@click.argument("verdicts", metavar="VERDICT.json...", type=PATH, nargs=-1, required=True)
@json_option("the comparison")
def compare(verdicts: tuple[Path, ...], json_file: Path | None) -> None:
    """Compare verdicts of several devices or builds on one bundle.

    One row a verdict. With three or more, the command names the device that is further from the
    host than the others."""
    from rich.console import Console

    from edge_dtm.formats.verdict_file import read_verdict
    from edge_dtm.report import compare as comparing

    require_writable(None, json_file)
    comparison = comparing.compare([(path, read_verdict(path)) for path in verdicts])
    # A log has no width, and rich would take it for 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(comparing.table(comparison))
    for line in (*(f"Note: {note}." for note in comparison["notes"]), comparison["words"]):
        click.echo(comparing.printable(line))
    write_json(json_file, comparison)
