"""Parameter types, options and files that several commands share."""

from __future__ import annotations

import functools
import os
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_dtm.core.errors import EdgeDtmError

if TYPE_CHECKING:
    from edge_dtm.formats.profile import DeviceProfile

PATH = click.Path(path_type=Path)
THREADS = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads [default: all cores]."
)


def json_option(what: str) -> Callable[[Any], Any]:
    return click.option("--json", "json_file", type=PATH, help=f"Also write {what} as JSON.")


def size_bytes(text: str) -> int:
    """A number of bytes with an optional unit: 105000000, 105M (10^6), 4.2G (10^9)."""
    text = text.strip().upper()
    factor = {"K": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:], 1)
    try:
        number = float(text if factor == 1 else text[:-1]) * factor
    except ValueError:
        raise click.BadParameter(f"{text!r} is no size: write 105000000, 105M or 4.2G") from None
    if not 0 < number < 2**63:
        raise click.BadParameter(f"{text!r} is no size a file can have")
    return int(number)


def device(text: str) -> str:
    """Where torch computes."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise click.BadParameter(f"{text!r} is none of auto, cpu, cuda and cuda:N")
    return text


def types(text: str) -> tuple[str, ...]:
    """GGML type names with commas between."""
    from edge_dtm.formats.ggml_types import ALLOWED_TYPES

    names = tuple(n.strip() for n in text.split(",") if n.strip())
    if not names or not set(names) <= set(ALLOWED_TYPES):
        raise click.BadParameter(f"{text!r}: choose among {', '.join(ALLOWED_TYPES)}")
    return names


def load_profile(text: str) -> DeviceProfile:
    from edge_dtm.formats import profile

    return profile.load_profile(text)


def _trusted_keys(text: str) -> Mapping[str, Any]:
    from edge_dtm.formats.signing import load_trusted

    return load_trusted(text)


TRUSTED_KEYS = click.option(
    "--trusted-keys",
    "trusted",
    type=_trusted_keys,
    metavar="PATH",
    help="Folder of .pub files. Refuse a bundle that none of these keys signed.",
)


def grouped(**classes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hand the options of a command over as dataclasses.

    grouped(goal="package.module:Goal") gathers the options that are fields of Goal into one
    argument, `goal`. An option that is None leaves the field's default. The module is imported
    when the command runs.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*arguments: Any, **options: Any) -> None:
            groups = {}
            for name, path in classes.items():
                group = pkgutil.resolve_name(path)
                own = {f.name: options.pop(f.name) for f in fields(group) if f.name in options}
                groups[name] = group(**{k: v for k, v in own.items() if v is not None})
            command(*arguments, **options, **groups)

        return run

    return decorate


def beside(bundle: Path, ending: str) -> Path:
    """Where what is made of a bundle goes unless told otherwise: BUNDLE, less .edge, and ending."""
    path = bundle.resolve()
    return path.with_name(path.name.removesuffix(".edge") + ending)


def write_json(path: Path | None, data: Any) -> None:
    """Numbers that are not finite become null, as the readers expect it. None: nothing is asked."""
    from edge_dtm.core import strict_json
    from edge_dtm.core.files import write_whole

    if path is not None:
        write_whole(path, strict_json.dumps(data).encode())


def require_writable(bundle: Path | None, *paths: Path | None) -> None:
    """EdgeDtmError when a result could not be written to one of paths: asked before the long run.

    bundle: what the results are about; a folder with a strange file in it is no bundle any more.
    """
    from edge_dtm.formats.bundle import TOLERATED_FILES

    for path in filter(None, paths):
        folder = path.resolve().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise EdgeDtmError(f"{path} cannot be written: give a file in a folder that exists")
        if bundle and folder == bundle.resolve() and path.name not in TOLERATED_FILES:
            raise EdgeDtmError(
                f"{path} would lie in the bundle, which then is not as it was made: give a file "
                "elsewhere"
            )
