"""The bundle: a folder with all a device needs to judge a model by itself.

manifest.json lists every other file with its SHA-256, so nothing is read unchecked; manifest.sig,
where there is one, says who made that list (`sign`). `archive` opens bundles and packs them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from edge_dtm.core import strict_json
from edge_dtm.core.errors import EdgeDtmError, os_errors
from edge_dtm.core.files import Advance, read_within, write_whole
from edge_dtm.core.strict_json import Count, Sha256, StrictModel, check_version, validated
from edge_dtm.formats.signing import Trusted, check_signature
from edge_dtm.formats.thresholds import Thresholds

SCHEMA_VERSION = 2
KIND = "edge-dtm bundle"
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
MODEL, REFERENCE, HOST_RECORD = "model.gguf", "reference.npz", "host.npz"
PROBE_RECORD = "probe.npz"  # what device/probe_model.py's small F16 model said on the host
REQUIRED_FILES = (MODEL, REFERENCE, HOST_RECORD, PROBE_RECORD)
PLAN, REPORT = "plan.json", "report.md"
LISTED_FILES = (*REQUIRED_FILES, PLAN, REPORT)  # what compress puts into a manifest
# What edge-dtm makes of a bundle and may lie in its folder: never listed, packed or read.
TOLERATED_FILES = ("report.html", "frontier.png")

MANIFEST_LIMIT_BYTES = 16 * 2**20
SIGNATURE_LIMIT_BYTES = 4096  # ten times what `sign` writes
FILES_LIMIT = 256  # of a manifest; bundles have half a dozen
COPY_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,98}")  # at most 99: a tar header's name field


class FileEntry(StrictModel, extra="ignore"):
    sha256: Sha256
    size_bytes: Count


def _plain_names(files: dict[str, FileEntry]) -> dict[str, FileEntry]:
    problems = [
        f"{name!r} is not a plain file name"
        for name in files
        if not _NAME.fullmatch(name) or name.casefold() in (MANIFEST, SIGNATURE)
    ]
    folded = Counter(name.casefold() for name in files)
    # A file system that ignores case would let one overwrite the other.
    problems += [f"{name!r} comes twice" for name in files if folded[name.casefold()] > 1]
    if problems:
        raise ValueError("; ".join(problems))
    return files


class Manifest(StrictModel, extra="ignore"):
    """manifest.json, checked. provenance and measured: free-form JSON objects."""

    files: Annotated[
        dict[str, FileEntry], Field(max_length=FILES_LIMIT), AfterValidator(_plain_names)
    ]
    thresholds: Thresholds
    provenance: dict[str, Any]
    measured: dict[str, Any]

    def noise_floor(self, source: Path) -> dict[str, Any]:
        """What was measured of it. EdgeDtmError, naming source, when its near_tie_margin is no
        number of 0 or more; it may be absent."""
        floor = self.measured.get("noise_floor", {})
        margin = floor.get("near_tie_margin", 0) if isinstance(floor, dict) else None
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or margin < 0:
            raise EdgeDtmError(f"{source}: the noise floor in its manifest cannot be read")
        return dict(floor)

    @classmethod
    def parse(cls, data: bytes, source: str) -> Manifest:
        """EdgeDtmError, naming source, unless data is a manifest of this schema."""
        tree = strict_json.parse(data, source)
        check_version(tree, SCHEMA_VERSION, source, KIND)
        return validated(cls, tree, source, "copy the bundle again")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; a context manager, because a packed one lies in a temporary folder.

    source: what was opened; folder: where its files are; key_id: of the key that signed the
    manifest, None when it is not signed; temporary: removes the folder of a packed one.
    """

    source: Path
    folder: Path
    manifest: Manifest
    key_id: str | None = None
    temporary: ExitStack | None = None

    @classmethod
    def of(
        cls,
        source: Path,
        folder: Path,
        manifest: bytes,
        signature: bytes | None,
        trusted: Trusted | None = None,
    ) -> Bundle:
        """manifest, signature: contents of the two files. EdgeDtmError as in check_signature."""
        key = check_signature(manifest, signature, trusted, source)
        return cls(source, folder, Manifest.parse(manifest, f"{source}: {MANIFEST}"), key)

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *error: object) -> None:
        if self.temporary is not None:
            self.temporary.close()

    @property
    def size_bytes(self) -> int:
        """Bytes of all listed files, the total of check's progress when all is well."""
        return sum(entry.size_bytes for entry in self.manifest.files.values())

    def path(self, name: str) -> Path:
        """Where a listed file is. EdgeDtmError when the manifest does not list it."""
        if name not in self.manifest.files:
            raise EdgeDtmError(f"{self.source} lists no {name}")
        return self.folder / name

    def check(self, progress: Advance | None = None) -> None:
        """Hash every file. EdgeDtmError naming each one missing, changed or not listed.

        progress: called with the bytes hashed since its last call. Subfolders, TOLERATED_FILES
        and names that begin with a dot are not looked at, nothing reads them.
        """
        problems = [
            f"{name} is not listed" for name in REQUIRED_FILES if name not in self.manifest.files
        ]
        for name, entry in sorted(self.manifest.files.items()):
            if reason := _file_problem(self.folder / name, entry, progress):
                problems.append(f"{name} {reason}")
        known = {MANIFEST, SIGNATURE, *self.manifest.files, *REQUIRED_FILES, *TOLERATED_FILES}
        problems += [
            f"{item.name} is not listed"
            for item in sorted(self.folder.iterdir())
            if item.name not in known and not item.name.startswith(".") and not item.is_dir()
        ]
        if problems:
            raise EdgeDtmError(
                f"{self.source} is not as it was made: {'; '.join(problems)}; copy it again"
            )


def write_manifest(
    folder: Path,
    files: Sequence[str],
    thresholds: Thresholds,
    provenance: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> Manifest:
    """Hash the files, plain names in folder, and write manifest.json, whole or not at all.

    A manifest.sig of an earlier manifest is removed. ValueError or TypeError for a value that JSON
    cannot hold, EdgeDtmError when a file cannot be read or the disk is full.
    """
    with os_errors(f"cannot write the manifest of {folder}"):
        entries = {name: _entry(folder / name) for name in files}
    manifest = Manifest(
        files=entries,
        thresholds=thresholds,
        provenance=dict(provenance),
        measured=dict(measured),
    )
    tree = {"schema_version": SCHEMA_VERSION, "kind": KIND, **manifest.model_dump()}
    text = json.dumps(tree, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_whole(folder / MANIFEST, text.encode())
    (folder / SIGNATURE).unlink(missing_ok=True)
    return manifest


def read_head(folder: Path) -> tuple[bytes, bytes | None]:
    """The bytes of a folder's manifest and of its signature, None when there is none.

    EdgeDtmError when folder is no bundle or a file cannot be read or is above its limit.
    """
    manifest, signature = folder / MANIFEST, folder / SIGNATURE
    if not manifest.exists():
        raise EdgeDtmError(f"{folder} is no bundle: it has no {MANIFEST}")
    return (
        read_within(manifest, MANIFEST_LIMIT_BYTES),
        read_within(signature, SIGNATURE_LIMIT_BYTES) if signature.exists() else None,
    )


def _entry(path: Path, progress: Advance | None = None) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(COPY_BYTES):
            digest.update(part)
            size += len(part)
            if progress:
                progress(len(part))
    return FileEntry(sha256=digest.hexdigest(), size_bytes=size)


def _file_problem(path: Path, entry: FileEntry, progress: Advance | None) -> str:
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            return "is not a plain file"
        size = path.stat().st_size
        if size != entry.size_bytes:
            return f"is changed ({size} bytes instead of {entry.size_bytes})"
        return "" if _entry(path, progress) == entry else "is changed (its hash differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
