"""Parameter types, exit codes and files that several commands share."""

from __future__ import annotations

import functools
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_dtm.core.errors import EdgeDtmError

if TYPE_CHECKING:
    from edge_dtm.formats.profile import DeviceProfile

EXIT_ERROR, EXIT_USAGE, EXIT_VERIFIED_AND_FAILED = 1, 2, 3
PATH = click.Path(path_type=Path)


class Bytes(click.ParamType[int]):
    """A number of bytes with an optional unit: 105000000, 105M (10^6), 4.2G (10^9)."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text, factor = str(value).strip(), 1
        if text and text[-1].upper() in "KMG":
            factor = {"K": 10**3, "M": 10**6, "G": 10**9}[text[-1].upper()]
            text = text[:-1]
        try:
            number = float(text) * factor
        except ValueError:
            self.fail(f"{value!r} is no size: write 105000000, 105M or 4.2G", param, ctx)
        if not 0 < number < 2**63:
            self.fail(f"{value!r} is no size a file can have", param, ctx)
        return int(number)


class Types(click.ParamType[tuple[str, ...]]):
    """GGML type names with commas between."""

    name = "types"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        from edge_dtm.formats.ggml_types import ALLOWED_TYPES

        names = tuple(n.strip() for n in str(value).split(",") if n.strip())
        unknown = [n for n in names if n not in ALLOWED_TYPES]
        if unknown or not names:
            self.fail(
                f"unknown types {', '.join(unknown) or '(none given)'}; choose among "
                f"{', '.join(ALLOWED_TYPES)}",
                param,
                ctx,
            )
        return names


class Profile(click.ParamType["DeviceProfile"]):
    """A device profile: the name of a packaged one, or a .toml file."""

    name = "profile"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> DeviceProfile:
        from edge_dtm.formats.profile import load_profile

        return load_profile(str(value))


class TrustedKeys(click.ParamType["Mapping[str, Any]"]):
    """A folder of .pub files, read: key id -> public key."""

    name = "path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Mapping[str, Any]:
        from edge_dtm.formats.signing import load_trusted

        return load_trusted(Path(value))


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


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*") if p.is_file())


def read_json(path: Path) -> Any:
    from edge_dtm.core import strict_json

    try:
        return strict_json.loads(path.read_bytes())
    except FileNotFoundError:
        raise EdgeDtmError(f"{path} does not exist: give a folder that compress made") from None
    except ValueError as error:
        raise EdgeDtmError(f"{path} is no JSON ({error}): make the bundle again") from None


def write_json(path: Path, data: Any) -> None:
    """Numbers that are not finite become null, as the readers expect it."""
    from edge_dtm.core import strict_json
    from edge_dtm.core.files import write_whole

    write_whole(path, strict_json.dumps(data).encode())


def require_folder_of(path: Path, bundle: Path | None = None) -> None:
    """EdgeDtmError when a result could not be written to path: asked before the long run.

    bundle: what the result is about, often a bundle's folder. verify and pack refuse a bundle with
    a strange file in it.
    """
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EdgeDtmError(f"{path} cannot be written: give a file in a folder that exists")
    if bundle is not None:
        require_outside(path, bundle)


def require_outside(path: Path, bundle: Path) -> None:
    """EdgeDtmError when path would be a strange file in the folder `bundle`."""
    from edge_dtm.formats.bundle import TOLERATED_FILES

    if path.resolve().parent == bundle.resolve() and path.name not in TOLERATED_FILES:
        raise EdgeDtmError(
            f"{path} would lie in the bundle, which then is not as it was made: give a file "
            "elsewhere"
        )
