"""How fast and how large a bundle runs here."""

from __future__ import annotations

import click

COMMANDS: tuple[click.Command, ...] = ()
