"""Commands that show what is there: the types in a file, a page of a bundle, verdicts in a table."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dtm.commands.common import PATH, require_folder_of, write_json


@click.command()
@click.argument("file", type=PATH)
@click.option("--json", "json_file", type=PATH, help="Also write it as JSON.")
def inspect(file: Path, json_file: Path | None) -> None:
    """Show the types and zeros in a model, layer by layer.

    FILE is a bundle, packed or not, or any GGUF."""
    from edge_dtm.formats.archive import SUFFIX, open_bundle
    from edge_dtm.formats.bundle import MODEL

    if json_file is not None:
        require_folder_of(json_file, file)
    if file.suffix == SUFFIX and file.is_file():
        with open_bundle(file) as bundle:
            bundle.check()
            _print_tensors(bundle.path(MODEL), f"{file}, {MODEL} of it", json_file)
    else:
        path = file / MODEL if file.is_dir() else file
        _print_tensors(path, str(path), json_file)


def _print_tensors(path: Path, name: str, json_file: Path | None) -> None:
    """path: a GGUF; name: what to call it."""
    from rich.console import Console
    from rich.table import Table

    from edge_dtm.llamacpp.gguf_header import check_gguf
    from edge_dtm.llamacpp.tensors import describe
    from edge_dtm.report.layer_map import text_table
    from edge_dtm.report.summary import ZEROS_NOTE

    check_gguf(path)
    tensors = describe(path)
    sizes: dict[str, list[int]] = {}
    for t in tensors:
        sizes.setdefault(t.type, []).append(t.size_bytes)
    table = Table("type", "tensors", "bytes", "share", box=None, pad_edge=False)
    size = path.stat().st_size
    for type_name, each in sorted(sizes.items(), key=lambda item: -sum(item[1])):
        table.add_row(type_name, str(len(each)), f"{sum(each):,}", f"{sum(each) / size:.1%}")
    console = Console()
    console.print(f"{name}: {size:,} bytes", highlight=False, soft_wrap=True)
    console.print(table)
    console.print(text_table({t.component: t.text for t in tensors if t.is_matrix}))
    if any(t.zero_share is not None and t.zero_share >= 0.05 for t in tensors):
        console.print(f"%0: share of exact zeros (F16, Q8_0), shown from 5 %. {ZEROS_NOTE}")
    if json_file is not None:
        write_json(
            json_file,
            {"file": path.name, "size_bytes": size, "tensors": [t.to_json() for t in tensors]},
        )


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
    from edge_dtm.formats.archive import SUFFIX, open_bundle
    from edge_dtm.report.gather import gather
    from edge_dtm.report.page import page

    name = bundle.resolve().name.removesuffix(SUFFIX)
    target = output or bundle.resolve().with_name(f"{name}-report.html")
    require_folder_of(target, bundle)
    with open_bundle(bundle) as opened:
        opened.check()
        data = gather(opened, verdicts, measures, record)
    write_whole(target, page(data).encode())
    click.echo(f"{target}: {target.stat().st_size:,} bytes")


@click.command()
@click.argument("verdicts", metavar="VERDICT.json...", type=PATH, nargs=-1, required=True)
@click.option("--json", "json_file", type=PATH, help="Also write the comparison as JSON.")
def compare(verdicts: tuple[Path, ...], json_file: Path | None) -> None:
    """Compare verdicts of several devices or builds on one bundle.

    One row a verdict. With three or more, the command names the device that is further from the
    host than the others."""
    import sys

    from rich.console import Console
    from rich.markup import escape

    from edge_dtm.formats.verdict_file import read_verdict
    from edge_dtm.report import compare as comparing

    if json_file is not None:
        require_folder_of(json_file)
    comparison = comparing.compare([(path, read_verdict(path)) for path in verdicts])
    # A log has no width, and rich would take it for 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(comparing.table(comparison))
    for line in (*(f"Note: {note}." for note in comparison.notes), comparison.words):
        console.print(escape(comparing.printable(line)), highlight=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, comparison.to_json())


COMMANDS = (inspect, report, compare)
