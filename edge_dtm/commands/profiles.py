"""Commands on device profiles."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dtm.commands.common import PATH


@click.group()
def profiles() -> None:
    """Device profiles: memory and speed of a device."""


@profiles.command("list")
def profiles_list() -> None:
    """List the packaged profiles."""
    from edge_dtm.formats.profile import list_profiles

    for p in list_profiles():
        click.echo(f"{p.name:18} {p.ram_bytes / 1e9:5.1f} GB RAM  {p.description}")


@profiles.command("show")
@click.argument("name")
def profiles_show(name: str) -> None:
    """Show every number of a profile with its source."""
    from dataclasses import fields

    from edge_dtm.formats.profile import load_profile

    profile = load_profile(name)
    for f in fields(profile):
        if f.name == "sources":
            continue
        click.echo(f"{f.name} = {getattr(profile, f.name)}")
        if f.name in profile.sources:
            click.echo(f"    {profile.sources[f.name]}")


@profiles.command("detect")
@click.option("-o", "--output", type=PATH, help="File to write [default: NAME.toml].")
@click.option("--name", help="Name of the profile [default: from the board or the CPU].")
def profiles_detect(output: Path | None, name: str | None) -> None:
    """Measure this machine and write its profile, for `compress --profile FILE.toml`.

    Decodes random models in llama.cpp to measure the memory bandwidth. That takes about a minute
    and at least 256 MB in the temporary folder. Run nothing else meanwhile.
    """
    from edge_dtm.core.progress import Stages
    from edge_dtm.device.cpu import read_cpu
    from edge_dtm.device.detect import check_name, default_name, detect, require_new, save
    from edge_dtm.device.linux import board

    root = Path("/")
    name = check_name(name or default_name(board(root), read_cpu(root)))
    path = output or Path(f"{name}.toml")
    require_new(path)
    with Stages().several() as progress:
        profile = detect(name, root, progress)
    save(profile, path)
    click.echo(
        f"{path}: {profile.description}; {profile.effective_bandwidth_bytes_per_s / 1e9:.2f}e9 "
        f"bytes/s while decoding, threads: {profile.threads}, "
        f"{(profile.ram_bytes - profile.reserve_bytes) / 1e9:.1f} GB for a model"
    )


COMMANDS = (profiles,)
