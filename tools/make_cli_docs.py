"""Write docs/cli.md from the command line itself: every command, its help, its options.

    python tools/make_cli_docs.py             # writes the page
    python tools/make_cli_docs.py --check     # exit status 1 when the page is not current

It walks click's tree and knows no command, so it has to be run again after each change of one.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.cli import main as edge_dtm
from edge_dtm.core.files import write_whole

# An underscore inside a word is none.
_MARKS = re.compile(r"[\\*<]|(?<!\w)_|_(?!\w)")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
NAME = "edge-dtm"
HEAD = """\
# Command line

Made by `python tools/make_cli_docs.py`; do not edit. Each command also answers `--help`. In the
usage line, brackets mean that an argument may be left out.
"""


def commands(
    command: click.Command, name: str, parent: click.Context | None = None
) -> Iterator[click.Context]:
    """Contexts of a command and of all below it that are not hidden; groups before members."""
    # show_default: click leaves defaults out otherwise, where the option does not ask for it.
    context = click.Context(command, parent, name, show_default=True)
    yield context
    if isinstance(command, click.Group):
        for member in command.list_commands(context):
            found = command.get_command(context, member)
            if found is not None and not found.hidden:
                yield from commands(found, member, context)


def page() -> str:
    """The whole page."""
    contexts = list(commands(edge_dtm, NAME))
    # GitHub's anchor of a heading of code: in small letters, spaces as hyphens.
    links = [
        f"- [`{c.command_path}`](#{c.command_path.lower().replace(' ', '-')}): "
        f"{_escape(c.command.get_short_help_str(limit=100))}"
        for c in contexts
        if not isinstance(c.command, click.Group)
    ]
    return "\n".join([HEAD, *links, "", *("\n".join(_section(c)) for c in contexts)])


def _section(context: click.Context) -> list[str]:
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"## `{context.command_path}`", "", "```text", usage, "```", ""]
    for paragraph in inspect.cleandoc(command.help or "").partition("\f")[0].split("\n\n"):
        # click's mark of a paragraph that is not to be wrapped.
        if paragraph.startswith("\b\n"):
            lines += ["```text", paragraph[2:], "```", ""]
        elif paragraph:
            lines += [_escape(paragraph), ""]
    options = [_option(context, p) for p in command.get_params(context)]
    if any(options):
        lines += [*filter(None, options), ""]
    return lines


def _option(context: click.Context, parameter: click.Parameter) -> str:
    """One item of a list; empty for --help, and for an argument without help: the usage has it."""
    record = parameter.get_help_record(context)
    if record is None or "--help" in parameter.opts:
        return ""
    names, text = record
    if isinstance(parameter, click.Argument) and not text:
        return ""
    return f"- `{names}`: {_escape(text)}" if text else f"- `{names}`"


def _escape(text: str) -> str:
    """Help text as Markdown: what stands between backticks stays, marks elsewhere are escaped."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if i % 2 else _MARKS.sub(r"\\\g<0>", p) for i, p in enumerate(parts))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    options = parser.parse_args(arguments)
    text = page()
    if not options.check:
        write_whole(PAGE, text.encode())
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(
        f"error: docs/{PAGE.name} is not current: run python tools/make_cli_docs.py",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
