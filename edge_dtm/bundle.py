"""The bundle: a folder, or one packed file, with all a device needs to judge a model by itself.

manifest.json lists every other file with its SHA-256, so nothing is read unchecked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import zstandard

from edge_dtm.errors import EdgeDtmError

SCHEMA_VERSION = 2
KIND = "edge-dtm bundle"
MANIFEST = "manifest.json"
MODEL, REFERENCE, HOST_RECORD = "model.gguf", "reference.npz", "host.npz"
PROBE_RECORD = "probe.npz"  # what device/probe_model.py's small F16 model said on the host
REQUIRED_FILES = (MODEL, REFERENCE, HOST_RECORD, PROBE_RECORD)

# Level 19 makes a quantized model 0.1 % smaller than level 10 and takes fifty times as long.
COMPRESSION_LEVEL = 10
MANIFEST_LIMIT_BYTES = 16 * 2**20
# More than any level up to 22 needs; without a bound a frame may ask for gigabytes.
_WINDOW_LIMIT_BYTES = 2**27
# zstd can turn 4 bytes into 128 KiB, so a small read bounds what one step can unfold to 32 MiB.
_COMPRESSED_READ_BYTES = 1024
_COPY_BYTES = 2**20
_TAR_BLOCK = tarfile.BLOCKSIZE
_TAR_END_LIMIT_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,98}")  # at most 99: a tar header's name field
_SHA256 = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Thresholds:
    """What a device must reach.

    Against the original: max_sdt, share (0 to 1) of divergent tokens; min_fdt, tokens, mean over
    sequences. Against the host's run of the same file, where healthy kernels differ too:
    max_kl_vs_host, nats, mean over positions, on the host's stored top logits, renormalized, each
    position's capped at 1; max_decided_sdt_vs_host, share of other argmaxes among the positions
    that the host decided by decided_margin logits or more. max_kl_probe: nats, mean over
    positions of the small F16 model, whose kernels leave no room.
    """

    max_sdt: float
    min_fdt: float
    max_kl_vs_host: float
    decided_margin: float
    max_decided_sdt_vs_host: float
    max_kl_probe: float

    def __post_init__(self) -> None:
        problems = []
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                problems.append(f"{item.name} is no number")
            elif not math.isfinite(value) or value < 0:
                problems.append(f"{item.name} is {value}, needs to be finite and 0 or more")
            elif "sdt" in item.name and value > 1:
                problems.append(f"{item.name} is {value}, a share is at most 1")
        if problems:
            raise EdgeDtmError(f"wrong thresholds: {'; '.join(problems)}")

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> Thresholds:
        """EdgeDtmError when a name is missing or unknown or a value is no finite number."""
        names = {item.name for item in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise EdgeDtmError(f"thresholds need exactly the names {', '.join(sorted(names))}")
        return cls(**data)


@dataclass(frozen=True)
class FileEntry:
    """One line of the manifest: SHA-256 in hex and size in bytes."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """manifest.json, checked. provenance and measured: free-form JSON objects."""

    files: Mapping[str, FileEntry]
    thresholds: Thresholds
    provenance: Mapping[str, Any]
    measured: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "thresholds": self.thresholds.to_json(),
            "provenance": dict(self.provenance),
            "measured": dict(self.measured),
        }

    @classmethod
    def parse(cls, data: bytes, source: str) -> Manifest:
        """EdgeDtmError, naming source, unless data is a manifest of this schema."""
        try:
            tree = json.loads(data.decode(), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise EdgeDtmError(f"{source} is no JSON ({error}): copy the bundle again") from None
        if not isinstance(tree, dict) or tree.get("kind") != KIND:
            raise EdgeDtmError(f"{source} is not the manifest of an edge-dtm bundle")
        if tree.get("schema_version") != SCHEMA_VERSION:
            raise EdgeDtmError(
                f"{source} has schema version {tree.get('schema_version')!r}, this edge-dtm reads "
                f"{SCHEMA_VERSION}: use the edge-dtm that wrote it"
            )
        problems = []
        entries: dict[str, FileEntry] = {}
        listed = tree.get("files")
        if not isinstance(listed, dict):
            problems.append("no files")
            listed = {}
        problems += _name_problems(list(listed))
        for name, entry in listed.items():
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("sha256"), str)
                or not _SHA256.fullmatch(entry["sha256"])
                or type(entry.get("size_bytes")) is not int
                or entry["size_bytes"] < 0
            ):
                problems.append(f"{name!r} needs a sha256 and a size_bytes")
            else:
                entries[name] = FileEntry(entry["sha256"], entry["size_bytes"])
        for key in ("provenance", "measured"):
            if not isinstance(tree.get(key), dict):
                problems.append(f"no {key}")
        if problems:
            raise EdgeDtmError(f"{source} is wrong: {'; '.join(problems)}")
        try:
            thresholds = Thresholds.from_json(tree.get("thresholds"))
        except EdgeDtmError as error:
            raise EdgeDtmError(f"{source}: {error}") from None
        return cls(entries, thresholds, tree["provenance"], tree["measured"])


@dataclass
class Bundle:
    """An opened bundle; a context manager, because a packed one lies in a temporary folder.

    source: what was opened; folder: where its files are.
    """

    source: Path
    folder: Path
    manifest: Manifest
    _temporary: Path | None = None

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary folder of a packed bundle; a second call does nothing."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all listed files, the total of check's progress when all is well."""
        return sum(entry.size_bytes for entry in self.manifest.files.values())

    def path(self, name: str) -> Path:
        """Where a listed file is. EdgeDtmError when the manifest does not list it."""
        if name not in self.manifest.files:
            raise EdgeDtmError(f"{self.source} lists no {name}")
        return self.folder / name

    def check(self, progress: Progress | None = None) -> None:
        """Hash every file. EdgeDtmError naming each one missing, changed or not listed.

        progress: called with the bytes hashed since its last call. Subfolders and names that
        begin with a dot are not looked at, nothing reads them.
        """
        problems = [
            f"{name} is not listed" for name in REQUIRED_FILES if name not in self.manifest.files
        ]
        for name, entry in sorted(self.manifest.files.items()):
            if reason := _file_problem(self.folder / name, entry, progress):
                problems.append(f"{name} {reason}")
        known = {MANIFEST, *self.manifest.files, *REQUIRED_FILES}
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

    EdgeDtmError for a missing file, a name that is not plain, or a value JSON cannot hold.
    """
    folder = Path(folder)
    problems = _name_problems(list(files))
    problems += [f"{name} is missing" for name in files if not (folder / name).is_file()]
    if problems:
        raise EdgeDtmError(f"cannot write the manifest of {folder}: {'; '.join(problems)}")
    entries = {name: _entry(folder / name) for name in files}
    manifest = Manifest(entries, thresholds, provenance, measured)
    try:
        text = json.dumps(manifest.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise EdgeDtmError(f"cannot write the manifest of {folder}: {error}") from None
    temporary = folder / f".{MANIFEST}.tmp"
    with temporary.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    return manifest


def open_bundle(path: Path, progress: Progress | None = None) -> Bundle:
    """Open a folder or a packed file; a packed one is unpacked and checked on the way.

    progress: called with the bytes unpacked. EdgeDtmError when path is no bundle.
    """
    path = Path(path)
    if path.is_dir():
        return Bundle(path, path, _read_manifest(path))
    if not path.exists():
        raise EdgeDtmError(f"{path} does not exist")
    temporary = Path(tempfile.mkdtemp(prefix="edge-dtm-"))
    try:
        unpack(path, temporary / "bundle", progress)
        folder = temporary / "bundle"
        return Bundle(path, folder, _read_manifest(folder), temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def pack(
    folder: Path,
    out_path: Path,
    level: int = COMPRESSION_LEVEL,
    progress: Progress | None = None,
) -> None:
    """Check a bundle folder and write it as one zstd-compressed tar file.

    The same files give the same bytes (with the same zstd release). Only the manifest and what it
    lists go in. out_path is replaced when the new file is complete. progress: called with the
    bytes packed. EdgeDtmError as in Bundle.check.
    """
    folder, out_path = Path(folder), Path(out_path)
    bundle = open_bundle(folder)
    bundle.check()
    if out_path.is_dir():
        raise EdgeDtmError(f"{out_path} is a folder: give the name of a file")
    temporary = out_path.with_name(out_path.name + ".tmp")
    # One thread: with several, the bytes depend on how many.
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, threads=0)
    try:
        with temporary.open("wb") as file:
            # GNU writes a size above 8 GiB into the header itself, so a bundle never has the
            # extended headers that unpack refuses.
            with (
                compressor.stream_writer(file, closefd=False) as stream,
                tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive,
            ):
                for name in (MANIFEST, *sorted(bundle.manifest.files)):
                    with (folder / name).open("rb") as source:
                        info = tarfile.TarInfo(name)
                        info.size = os.fstat(source.fileno()).st_size
                        info.mode = 0o644
                        archive.addfile(info, source)
                    if progress:
                        progress(info.size)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out_path)
    except OSError as error:
        raise EdgeDtmError(f"cannot write {out_path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def unpack(file: Path, out_dir: Path, progress: Progress | None = None) -> None:
    """Unpack and check what pack wrote, into a folder that must not exist yet.

    out_dir appears whole or not at all. progress: called with the bytes unpacked. EdgeDtmError
    for an existing out_dir, a broken archive, and any member that the manifest, which comes
    first, does not list with exactly this size and hash; links, devices and paths are such.
    """
    file, out_dir = Path(file), Path(out_dir)
    if os.path.lexists(out_dir):
        raise EdgeDtmError(f"{out_dir} exists already: give another folder or remove it")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    except OSError as error:
        raise EdgeDtmError(f"cannot write {out_dir}: {error.strerror or error}") from None
    try:
        with file.open("rb") as source:
            _unpack(file, _Unfolding(file, source), temporary, progress)
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep other users out
        temporary.rename(out_dir)
    except OSError as error:
        raise EdgeDtmError(f"cannot unpack {file}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Unfolding:
    """Reads exactly as much decompressed data as asked for; EdgeDtmError on a broken stream."""

    def __init__(self, path: Path, source: BinaryIO) -> None:
        self._path = path
        self._source = source
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT_BYTES)
        self._object = decompressor.decompressobj()
        self._buffer = bytearray()
        self._start = 0

    def _more(self) -> bool:
        if self._object.eof:
            return False
        data = self._source.read(_COMPRESSED_READ_BYTES)
        if not data:
            raise EdgeDtmError(f"{self._path} is truncated: copy it again")
        del self._buffer[: self._start]
        self._start = 0
        try:
            self._buffer += self._object.decompress(data)
        except zstandard.ZstdError as error:
            raise EdgeDtmError(
                f"{self._path} is damaged or no packed bundle ({error}): copy it again"
            ) from None
        return True

    def read_some(self, limit: int) -> bytes:
        """1 to limit bytes, none at the end of the frame."""
        while self._start == len(self._buffer):
            if not self._more():
                return b""
        end = min(self._start + limit, len(self._buffer))
        data = bytes(self._buffer[self._start : end])
        self._start = end
        return data

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.read_some(min(size, _COPY_BYTES))
            if not part:
                raise EdgeDtmError(f"{self._path} is truncated: copy it again")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def at_end_of_file(self) -> bool:
        return not self._object.unused_data and not self._source.read(1)


def _unpack(path: Path, stream: _Unfolding, folder: Path, progress: Progress | None) -> None:
    # tarfile itself reads extended headers of any size into memory and follows links; the few
    # members a bundle may have need only its header parser.
    first = _read_header(path, stream)
    if first is None or first.name != MANIFEST or not first.isreg():
        raise EdgeDtmError(f"{path} is no packed bundle: {MANIFEST} is not its first member")
    if first.size > MANIFEST_LIMIT_BYTES:
        raise EdgeDtmError(
            f"{path}: its manifest has {first.size} bytes, the limit is {MANIFEST_LIMIT_BYTES}"
        )
    data = stream.read(first.size)
    _skip_padding(path, stream, first.size)
    manifest = Manifest.parse(data, f"{path}: {MANIFEST}")
    needed = sum(entry.size_bytes for entry in manifest.files.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EdgeDtmError(f"{path} unpacks to {needed} bytes, only {free} are free: make room")
    (folder / MANIFEST).write_bytes(data)
    seen: set[str] = set()
    while (member := _read_header(path, stream)) is not None:
        name = member.name
        entry = manifest.files.get(name)
        if not member.isreg():
            raise EdgeDtmError(f"{path}: {name!r} is not a plain file; do not use this archive")
        if entry is None:
            raise EdgeDtmError(f"{path}: {name!r} is not listed; do not use this archive")
        if name in seen:
            raise EdgeDtmError(f"{path}: {name!r} comes twice; do not use this archive")
        if member.size != entry.size_bytes:
            raise EdgeDtmError(
                f"{path}: {name!r} has {member.size} bytes, the manifest says {entry.size_bytes}"
            )
        seen.add(name)
        digest = hashlib.sha256()
        with (folder / name).open("xb") as out:
            left = member.size
            while left:
                part = stream.read(min(left, _COPY_BYTES))
                out.write(part)
                digest.update(part)
                left -= len(part)
                if progress:
                    progress(len(part))
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != entry.sha256:
            raise EdgeDtmError(f"{path}: {name} is changed (its hash differs): copy it again")
        _skip_padding(path, stream, member.size)
    if missing := sorted(set(manifest.files) - seen):
        raise EdgeDtmError(f"{path} lacks {', '.join(missing)}: pack or copy it again")
    rest = 0
    while part := stream.read_some(_COPY_BYTES):
        rest += len(part)
        if part.strip(b"\0") or rest > _TAR_END_LIMIT_BYTES:
            raise EdgeDtmError(f"{path} has data behind its end; do not use this archive")
    if not stream.at_end_of_file():
        raise EdgeDtmError(f"{path} has data behind its end; do not use this archive")


def _read_header(path: Path, stream: _Unfolding) -> tarfile.TarInfo | None:
    """The next member, None at the end mark."""
    block = stream.read(_TAR_BLOCK)
    if not block.strip(b"\0"):
        return None
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise EdgeDtmError(f"{path} is damaged or no packed bundle ({error})") from None
    if member.size < 0:
        raise EdgeDtmError(f"{path}: {member.name!r} has a negative size")
    return member


def _skip_padding(path: Path, stream: _Unfolding, size: int) -> None:
    if stream.read(-size % _TAR_BLOCK).strip(b"\0"):
        raise EdgeDtmError(f"{path} has data between its members; do not use this archive")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MANIFEST_LIMIT_BYTES:
            raise EdgeDtmError(f"{path} is above {MANIFEST_LIMIT_BYTES} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        raise EdgeDtmError(f"{folder} is no bundle: it has no {MANIFEST}") from None
    except OSError as error:
        raise EdgeDtmError(f"cannot read {path}: {error.strerror or error}") from None
    return Manifest.parse(data, str(path))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _name_problems(names: Sequence[str]) -> list[str]:
    problems = [
        f"{name!r} is not a plain file name"
        for name in names
        if not _NAME.fullmatch(name) or name.casefold() == MANIFEST
    ]
    folded = [name.casefold() for name in names]
    # A file system that ignores case would let one overwrite the other.
    problems += [
        f"{name!r} comes twice" for i, name in enumerate(names) if name.casefold() in folded[:i]
    ]
    return problems


def _entry(path: Path, progress: Progress | None = None) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(_COPY_BYTES):
            digest.update(part)
            size += len(part)
            if progress:
                progress(len(part))
    return FileEntry(digest.hexdigest(), size)


def _file_problem(path: Path, entry: FileEntry, progress: Progress | None) -> str:
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
