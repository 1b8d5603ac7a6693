"""Commands that show what is in a file."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dtm.commands.common import PATH, require_folder_of, write_json


@click.command()
@click.argument("file", type=PATH)
@click.option("--json", "json_file", type=PATH, help="Also write it as JSON.")
def inspect(file: Path, json_file: Path | None) -> None:
    """Types, bytes, zeros and a map layer by layer of a bundle, packed or not, or any GGUF."""
    from edge_dtm.formats.archive import SUFFIX, open_bundle
    from edge_dtm.formats.bundle import MODEL

    if json_file is not None:
        require_folder_of(json_file, file)
    if file.suffix == SUFFIX and file.is_file():
        with open_bundle(file) as bundle:
            bundle.check()
            _show(bundle.path(MODEL), f"{file}, {MODEL} of it", json_file)
    else:
        path = file / MODEL if file.is_dir() else file
        _show(path, str(path), json_file)


def _show(path: Path, name: str, json_file: Path | None) -> None:
    """Print what is in the GGUF at path; name: what to call it."""
    from rich.console import Console
    from rich.table import Table

    from edge_dtm.llamacpp.runner import check_gguf
    from edge_dtm.llamacpp.tensors import describe
    from edge_dtm.report import summary

    check_gguf(path)
    tensors = describe(path)
    counts: dict[str, list[int]] = {}
    for t in tensors:
        entry = counts.setdefault(t.type, [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + t.size_bytes
    console = Console()
    table = Table("type", "tensors", "bytes", "share", box=None, pad_edge=False)
    size = path.stat().st_size
    for kind, (n, total) in sorted(counts.items(), key=lambda item: -item[1][1]):
        table.add_row(kind, str(n), f"{total:,}", f"{total / size:.1%}")
    console.print(f"{name}: {size:,} bytes", highlight=False, soft_wrap=True)
    console.print(table)
    console.print(summary.map_table({t.component: t.text for t in tensors if t.is_matrix}))
    if any(t.zero_share is not None and t.zero_share >= 0.05 for t in tensors):
        console.print(f"%0: share of exact zeros (F16, Q8_0), shown from 5 %. {summary.ZEROS_NOTE}")
    if json_file is not None:
        write_json(
            json_file,
            {"file": path.name, "size_bytes": size, "tensors": [t.to_json() for t in tensors]},
        )


COMMANDS = (inspect,)
