"""The command line: the group, its errors and exit codes; the commands are in `commands`."""

from __future__ import annotations

from typing import Any

import click

from edge_dtm import __version__
from edge_dtm.commands import compress, device, doctor, pack, performance, plan, profiles, show
from edge_dtm.commands.common import EXIT_ERROR, EXIT_USAGE, EXIT_VERIFIED_AND_FAILED, Bytes
from edge_dtm.core.errors import EdgeDtmError

__all__ = ["EXIT_ERROR", "EXIT_USAGE", "EXIT_VERIFIED_AND_FAILED", "Bytes", "main", "run"]


_HOST_ONLY = ("torch", "transformers", "safetensors", "matplotlib", "sentencepiece")


class Group(click.Group):
    """Errors for people: one line on stderr, exit status 1, no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeDtmError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(EXIT_ERROR)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"error: {where}{error.strerror or error}", err=True)
            ctx.exit(EXIT_ERROR)
        except MemoryError:
            click.echo("error: memory ran out: stop other programs, or raise the limit", err=True)
            ctx.exit(EXIT_ERROR)
        except ImportError as error:
            if (error.name or "").split(".")[0] in _HOST_ONLY:
                words = f"this command needs {error.name}: pip install 'edge-dtm[host]'"
            else:
                words = (
                    f"a library cannot be loaded ({' '.join(str(error).split())}): install "
                    "edge-dtm again, or free memory"
                )
            click.echo(f"error: {words}", err=True)
            ctx.exit(EXIT_ERROR)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge-dtm")
def main() -> None:
    """Compress a Llama model so that it still says the same words, and verify that on the device.

    Exit status: 0 pass, 1 error, 2 wrong usage, 3 verified and failed.
    """


def run() -> None:
    """The program edge-dtm: main in a child, whose death is an error line as well."""
    from edge_dtm.core.supervisor import shielded

    shielded(lambda: main(prog_name="edge-dtm"))


for _module in (compress, plan, pack, device, doctor, performance, show, profiles):
    for _command in _module.COMMANDS:
        main.add_command(_command)
