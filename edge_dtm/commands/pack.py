"""Commands that carry a bundle to the device: keygen, pack and unpack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edge_dtm.commands.common import PATH, Bytes, TrustedKeys, folder_bytes, require_outside


@click.command()
@click.argument("name", type=PATH)
def keygen(name: Path) -> None:
    """Make a key pair to sign bundles with.

    NAME.key signs: keep it secret. NAME.pub checks: give it to the devices."""
    from edge_dtm.formats.signing import PRIVATE_SUFFIX, PUBLIC_SUFFIX, generate

    identity = generate(name)
    click.echo(f"{name}{PRIVATE_SUFFIX}: secret, for pack --sign; whoever has it can sign as you")
    click.echo(f"{name}{PUBLIC_SUFFIX}: for the devices' folder of trusted keys")
    click.echo(f"key id {identity}")


@click.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, help="The file to write [default: BUNDLE.edge].")
@click.option("--sign", "key_file", type=PATH, help="Sign with this .key file from keygen.")
@click.option(
    "--for",
    "program",
    type=click.Choice(["ollama"]),
    help="Also make a folder BUNDLE-ollama with a Modelfile, for `ollama create`.",
)
def pack(bundle: Path, output: Path | None, key_file: Path | None, program: str | None) -> None:
    """Make one .edge file of a bundle.

    The same bundle and key always give the same bytes."""
    from edge_dtm.core.progress import Stages
    from edge_dtm.formats.archive import SUFFIX
    from edge_dtm.formats.archive import pack as run
    from edge_dtm.formats.signing import load_private

    key = load_private(key_file) if key_file else None
    target = output or bundle.resolve().parent / f"{bundle.resolve().name}{SUFFIX}"
    require_outside(target, bundle)
    with Stages()("Packing", folder_bytes(bundle)) as advance:
        key_id = run(bundle, target, progress=advance, sign_with=key)
    click.echo(f"{target}: {target.stat().st_size:,} bytes, {_signature(key_id)}")
    if program == "ollama":
        from edge_dtm.formats.modelfile import write_folder

        folder = target.with_name(f"{target.name.removesuffix(SUFFIX)}-ollama")
        write_folder(bundle, folder)
        click.echo(f"{folder}: ollama create NAME -f {folder / 'Modelfile'}")


@click.command()
@click.argument("file", type=PATH)
@click.option("-o", "--output", type=PATH, help="The folder to make [default: FILE without .edge].")
@click.option(
    "--trusted-keys",
    "trusted",
    type=TrustedKeys(),
    help="Folder of .pub files. Refuse a file that none of these keys signed.",
)
@click.option(
    "--max-unpacked-bytes", type=Bytes(), help="Refuse what unpacks to more: N, NK, NM or NG."
)
def unpack(
    file: Path,
    output: Path | None,
    trusted: Mapping[str, Any] | None,
    max_unpacked_bytes: int | None,
) -> None:
    """Check a packed bundle and make a folder of it."""
    from edge_dtm.core.progress import Stages
    from edge_dtm.formats.archive import SUFFIX
    from edge_dtm.formats.archive import unpack as run

    name = file.name.removesuffix(SUFFIX)
    target = output or file.resolve().parent / (name if name != file.name else f"{name}.bundle")
    with Stages()("Unpacking", 0) as advance:
        key_id = run(file, target, advance, trusted, max_unpacked_bytes)
    trust = ", which is trusted" if key_id and trusted is not None else ""
    click.echo(f"{target}: {_signature(key_id)}{trust}")


def _signature(key_id: str | None) -> str:
    return f"signed with the key {key_id}" if key_id else "not signed"


COMMANDS = (keygen, pack, unpack)
