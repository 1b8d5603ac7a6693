"""Commands that carry a bundle elsewhere: keygen, pack, unpack, and a recipe for llama-quantize."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edge_dtm.commands.common import PATH, TRUSTED_KEYS, beside, require_writable, size_bytes
from edge_dtm.core.errors import EdgeDtmError


@click.command()
@click.argument("name", type=PATH)
def keygen(name: Path) -> None:
    """Make a key pair to sign bundles with.

    NAME.key signs: keep it secret. NAME.pub checks: give it to the devices."""
    from edge_dtm.formats.signing import PRIVATE_SUFFIX, PUBLIC_SUFFIX, generate

    identity = generate(name)
    click.echo(f"{name}{PRIVATE_SUFFIX}: secret, for pack --sign; whoever has it can sign as you")
    click.echo(f"{name}{PUBLIC_SUFFIX}: for the devices' folder of trusted keys\nkey id {identity}")


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
    from edge_dtm.formats.modelfile import write_folder
    from edge_dtm.formats.signing import load_private

    key = load_private(key_file) if key_file else None
    target = output or beside(bundle, SUFFIX)
    require_writable(bundle, target)
    size_bytes = sum(p.stat().st_size for p in bundle.glob("*") if p.is_file())
    with Stages()("Packing", size_bytes) as advance:
        key_id = run(bundle, target, progress=advance, sign_with=key)
    click.echo(f"{target}: {target.stat().st_size:,} bytes, {_signature(key_id)}")
    if program == "ollama":
        folder = target.with_name(f"{target.name.removesuffix(SUFFIX)}-ollama")
        write_folder(bundle, folder)
        click.echo(f"{folder}: ollama create NAME -f {folder / 'Modelfile'}")


@click.command()
@click.argument("file", type=PATH)
@click.option("-o", "--output", type=PATH, help="The folder to make [default: FILE without .edge].")
@TRUSTED_KEYS
@click.option(
    "--max-unpacked-bytes",
    type=size_bytes,
    metavar="BYTES",
    help="Refuse what unpacks to more: N, NK, NM or NG.",
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

    target = output or beside(file, "" if file.name.endswith(SUFFIX) else ".bundle")
    with Stages()("Unpacking", 0) as advance:
        key_id = run(file, target, advance, trusted, max_unpacked_bytes)
    trust = ", which is trusted" if key_id and trusted is not None else ""
    click.echo(f"{target}: {_signature(key_id)}{trust}")


def _signature(key_id: str | None) -> str:
    return f"signed with the key {key_id}" if key_id else "not signed"


@click.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, help="The folder to make [default: BUNDLE-recipe].")
def recipe(bundle: Path, output: Path | None) -> None:
    """Write what llama-quantize needs to make a file with the types of the plan.

    That is a --tensor-type-file and an importance matrix. llama-quantize rounds without error
    feedback."""
    from edge_dtm.core import strict_json
    from edge_dtm.core.files import write_whole
    from edge_dtm.formats import bundle as bundles
    from edge_dtm.formats.imatrix import write_imatrix
    from edge_dtm.formats.plan import Plan
    from edge_dtm.formats.reference import load_imatrix
    from edge_dtm.formats.tensor_types import quantize_command, tensor_type_file

    plan = Plan.from_json(strict_json.read(bundle / bundles.PLAN))
    manifest = bundles.Manifest.parse(bundles.read_head(bundle)[0], str(bundle))
    if manifest.measured.get("distillation"):
        raise EdgeDtmError(
            f"{bundle} is no recipe's: --distill changed the model, and llama-quantize would start "
            "from the original; use the bundle's own model.gguf"
        )
    path = bundle / "work" / f"imatrix-{manifest.provenance.get('work_key')}.npz"
    if not path.is_file():
        raise EdgeDtmError(
            f"{bundle / 'work'} holds no importance vectors of this bundle: run edge-dtm compress "
            "again (an unpacked bundle has no work folder)"
        )
    vectors, tokens = load_imatrix(path)
    folder = output or beside(bundle, "-recipe")
    folder.mkdir(parents=True, exist_ok=True)
    types, matrix = folder / "tensor-types.txt", folder / "imatrix.gguf"
    write_whole(types, tensor_type_file(plan).encode())
    # A power of two lets llama-quantize get back the very vectors (see write_imatrix).
    write_imatrix(matrix, vectors, 1 << (tokens.bit_length() - 1), ["edge-dtm calibration"])
    command = quantize_command(plan, types, matrix, Path("MODEL.gguf"), Path("QUANTIZED.gguf"))
    click.echo(f"{types}\n{matrix}\nWith the model as an F32, F16 or BF16 GGUF:\n\n  {command}")
