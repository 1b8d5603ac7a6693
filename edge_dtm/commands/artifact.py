"""Commands that carry a bundle: pack and unpack."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dtm.commands.common import PATH, folder_bytes


@click.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, help="The file to write [default: BUNDLE.tar.zst].")
def pack(bundle: Path, output: Path | None) -> None:
    """Make one .tar.zst file of a bundle; the same bundle always gives the same bytes."""
    from edge_dtm.bundle import pack as run
    from edge_dtm.progress import Stages

    target = output or bundle.resolve().parent / f"{bundle.resolve().name}.tar.zst"
    stages = Stages()
    with stages("Packing", folder_bytes(bundle)) as advance:
        run(bundle, target, progress=advance)
    click.echo(f"{target}: {target.stat().st_size:,} bytes")


@click.command()
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


COMMANDS = (pack, unpack)
