"""The command line: the group, its errors and exit codes; the commands are in `commands`."""

from __future__ import annotations

from typing import Any

import click

from edge_dtm import __version__
from edge_dtm.commands import compress, device, machine, pack, show
from edge_dtm.core.errors import EdgeDtmError

EXIT_ERROR = 1
_HOST_ONLY = ("torch", "transformers", "safetensors", "matplotlib", "sentencepiece")


class Group(click.Group):
    """Errors for people: one line on stderr, exit status 1, no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (EdgeDtmError, OSError, MemoryError, ImportError) as error:
            click.echo(f"error: {_in_words(error)}", err=True)
            ctx.exit(EXIT_ERROR)


def _in_words(error: Exception) -> str:
    match error:
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror or error}"
        case MemoryError():
            return "memory ran out: stop other programs, or raise the limit"
        case ImportError() if (error.name or "").split(".")[0] in _HOST_ONLY:
            return f"this command needs {error.name}: pip install 'edge-dtm[host]'"
        case ImportError():
            reason = " ".join(str(error).split())
            return f"a library cannot be loaded ({reason}): install edge-dtm again, or free memory"
    return str(error)


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(__version__, prog_name="edge-dtm")
def main() -> None:
    """Compress a Llama model so that it still says the same words, and verify that on the device.

    Exit status: 0 pass, 1 error, 2 wrong usage, 3 verified and failed.
    """


def run() -> None:
    """The program edge-dtm: main in a child, whose death is an error line as well."""
    from edge_dtm.core.supervisor import shielded

    shielded(lambda: main(prog_name="edge-dtm"))


for _command in (
    compress.compress,
    device.verify,
    device.measure,
    machine.bench,
    machine.doctor,
    machine.profiles,
    pack.keygen,
    pack.pack,
    pack.recipe,
    pack.unpack,
    show.compare,
    show.frontier,
    show.inspect,
    show.report,
):
    main.add_command(_command)
