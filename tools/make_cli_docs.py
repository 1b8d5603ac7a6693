"""Write docs/cli.md from the command line itself: every command, its help, its options.

python tools/make_cli_docs.py             # writes the page
python tools/make_cli_docs.py --check     # exit status 1 when the page is not current
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.cli import main as edge_dtm

# Marks of Markdown; an underscore inside a word is none.
_MARKS = re.compile(r"[\\*<]|(?<!\w)_|_(?!\w)")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """\
# Command line

Made by `python tools/make_cli_docs.py`; do not edit. Each command also answers `--help`. In the
usage line, brackets mean that an argument may be left out.
"""


def page() -> str:
    contexts = list(_contexts(edge_dtm, "edge-dtm"))
    # GitHub's anchor of a heading of code: in small letters, spaces as hyphens.
    links = [
        f"- [`{c.command_path}`](#{c.command_path.lower().replace(' ', '-')}): "
        f"{_escape(c.command.get_short_help_str(limit=100))}"
        for c in contexts
        if not isinstance(c.command, click.Group)
    ]
    return "\n".join([HEAD, *links, "", *("\n".join(_section(c)) for c in contexts)])


def _contexts(
    command: click.Command, name: str, parent: click.Context | None = None
) -> Iterator[click.Context]:
    """Of a command and of all below it; groups before members."""
    context = click.Context(command, parent, name, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        for member, inner in sorted(command.commands.items()):
            yield from _contexts(inner, member, context)


def _section(context: click.Context) -> list[str]:
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"## `{context.command_path}`", "", "```text", usage, "```", ""]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        lines += [_escape(paragraph), ""]
    options = [
        f"- `{names}`: {_escape(text)}" if text else f"- `{names}`"
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for names, text in [parameter.get_help_record(context) or ("", "")]
    ]
    return [*lines, *options, ""] if options else lines


def _escape(text: str) -> str:
    """Help text as Markdown: what stands between backticks stays, marks elsewhere are escaped."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if i % 2 else _MARKS.sub(r"\\\g<0>", p) for i, p in enumerate(parts))


def main(arguments: Sequence[str]) -> int:
    if "--check" not in arguments:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print("error: docs/cli.md is not current: run python tools/make_cli_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
