"""Pages and tables made of bundles and verdicts."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dtm.commands.common import PATH, require_folder_of, write_json


@click.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, help="The page to write [default: BUNDLE-report.html].")
@click.option(
    "--verdict",
    "verdicts",
    type=PATH,
    multiple=True,
    help="A verdict that `verify --json` wrote; may be given several times.",
)
@click.option(
    "--with",
    "measures",
    type=PATH,
    multiple=True,
    help="Another file to show beside: what `measure --json` wrote; may be given several times.",
)
@click.option(
    "--record",
    type=PATH,
    help="Show the texts and divergences of this device, which `verify --record` wrote, instead of "
    "the host's.",
)
def report(
    bundle: Path,
    output: Path | None,
    verdicts: tuple[Path, ...],
    measures: tuple[Path, ...],
    record: Path | None,
) -> None:
    """One HTML page of a bundle: verdict, figures, texts side by side.

    BUNDLE is a folder or a packed file. The page needs no network, and holds texts of the bundle's
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
    """Verdicts of several devices or builds on one bundle in a table, and the odd one out."""
    import sys

    from rich.console import Console
    from rich.markup import escape

    from edge_dtm.formats.verdict_file import read_verdict
    from edge_dtm.report.compare import compare as run
    from edge_dtm.report.compare_table import printable, table

    if json_file is not None:
        require_folder_of(json_file)
    result = run([(path, read_verdict(path)) for path in verdicts])
    # A log has no width, and rich would take it for 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table(result))
    for line in (*(f"Note: {note}." for note in result.notes), result.words):
        console.print(escape(printable(line)), highlight=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, result.to_json())


COMMANDS = (report, compare)
