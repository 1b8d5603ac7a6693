"""Pages and tables made of bundles and verdicts."""

from __future__ import annotations

import click

COMMANDS: tuple[click.Command, ...] = ()
