"""Is this build of llama.cpp right for this machine?"""

from __future__ import annotations

from pathlib import Path

import click

from edge_dtm.commands.common import PATH, require_folder_of, write_json

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}


@click.command()
@click.argument("bundle_or_gguf", required=False, type=PATH)
@click.option(
    "--n-ctx",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Length of the context, in tokens, that must fit into memory.",
)
@click.option("--json", "json_file", type=PATH, help="Also write the findings as JSON.")
def doctor(bundle_or_gguf: Path | None, n_ctx: int, json_file: Path | None) -> None:
    """Find what is wrong or slow on this machine, with a command to fix each.

    Checks whether llama.cpp uses what the CPU can do, decodes a small model, and looks at threads,
    frequency, memory and swap. With a bundle or a GGUF file, also checks its types and the memory it
    needs. Exit status 1 if anything is an error.
    """
    from rich.console import Console
    from rich.markup import escape

    from edge_dtm.core.errors import EdgeDtmError
    from edge_dtm.device.cpu import read_cpu
    from edge_dtm.device.doctor import errors, examine, to_json

    if json_file is not None:
        require_folder_of(json_file, bundle_or_gguf)
    findings = examine(bundle_or_gguf, n_ctx)
    console = Console()
    for finding in findings:
        colour = _COLOURS[finding.level]
        label = f"[{colour}]{finding.level:7}[/{colour}]"
        lines = [f"{label} [bold]{escape(finding.what)}[/bold]", f"        {escape(finding.why)}"]
        if finding.command:
            lines.append(f"        [bold]$[/bold] {escape(finding.command)}")
        # Never wrapped, so that a command can be copied.
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, to_json(findings, read_cpu()))
    if wrong := errors(findings):
        what = "; ".join(finding.what for finding in wrong)
        raise EdgeDtmError(f"{what}: see above what mends it")


COMMANDS = (doctor,)
