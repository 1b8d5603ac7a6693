"""Commands on device profiles."""

from __future__ import annotations

import click


@click.group()
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


COMMANDS = (profiles,)
