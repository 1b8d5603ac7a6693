"""The work folder: what stages leave, named after all it depends on, so that a killed run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from edge_dtm.core.files import digest_of

T = TypeVar("T")


@dataclass(frozen=True)
class Kind(Generic[T]):
    """How one kind of result is kept.

    name: what its files begin with. suffix: what they end with, none for a folder. load, save: one
    whole result; save leaves it whole or not at all. marker: the file of a folder that is written
    last. version: of the method; raise it when the method changes, and what older code left is
    made again.
    """

    name: str
    suffix: str
    load: Callable[[Path], T]
    save: Callable[[T, Path], object]
    marker: str | None = None
    version: int = 1

    def is_complete(self, path: Path) -> bool:
        return path.is_file() if self.marker is None else (path / self.marker).is_file()


@dataclass(frozen=True)
class Work:
    """A folder of results. note: tells the user what was found there."""

    folder: Path
    note: Callable[[str], None]

    def path(self, name: str, inputs: Any, suffix: str = "") -> Path:
        """inputs: all that the result depends on, as JSON can hold it."""
        return self.folder / f"{name}-{digest_of(inputs)}{suffix}"

    def path_of(self, kind: Kind[Any], inputs: Any) -> Path:
        return self.path(kind.name, [kind.version, inputs], kind.suffix)

    def load_or_make(self, kind: Kind[T], inputs: Any, make: Callable[[Path], T]) -> T:
        """The kept result of these inputs, or what `make` returns, which is kept.

        make: called with the path, where it may save parts of unfinished work.
        """
        path = self.path_of(kind, inputs)
        if kind.is_complete(path):
            self.note(f"{kind.name}: taken from the work folder")
            return kind.load(path)
        result = make(path)
        kind.save(result, path)
        return result
