"""Is this build of llama.cpp right for this machine?"""

from __future__ import annotations

import click

COMMANDS: tuple[click.Command, ...] = ()
