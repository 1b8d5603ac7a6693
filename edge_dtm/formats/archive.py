"""The packed bundle: one `.edge` file, a tar archive in zstd, and how it is opened with care.

Its members are manifest.json, manifest.sig where the bundle is signed, then the listed files by
name. Behind the zstd frame stands the SHA-256 of all before it, in a skippable frame (RFC 8878,
3.1.2), which zstd and tar step over: zstd's own checksum leaves bits that nothing looks at.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import zstandard

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import Advance
from edge_dtm.core.scratch import Scratch
from edge_dtm.formats.bundle import (
    COPY_BYTES,
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    SIGNATURE,
    SIGNATURE_LIMIT_BYTES,
    Bundle,
    Manifest,
    read_head,
)
from edge_dtm.formats.signing import Trusted, check_signature, sign_manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SUFFIX = ".edge"
# Level 19 makes a quantized model 0.1 % smaller than level 10 and takes fifty times as long.
COMPRESSION_LEVEL = 10
# More than any level up to 22 needs; without a bound a frame may ask for gigabytes.
_WINDOW_LIMIT_BYTES = 2**27
# zstd can turn 4 bytes into 128 KiB, so a small read bounds what one step can unfold to 32 MiB.
_COMPRESSED_READ_BYTES = 1024
_TAR_BLOCK = tarfile.BLOCKSIZE
_TAR_END_LIMIT_BYTES = 2**20
# Magic number of a skippable frame, any of sixteen, and the size of what it holds.
_TRAILER_HEAD = (0x184D2A5E).to_bytes(4, "little") + (32).to_bytes(4, "little")
_TRAILER_BYTES = len(_TRAILER_HEAD) + 32


def open_bundle(
    path: Path, progress: Advance | None = None, trusted: Trusted | None = None
) -> Bundle:
    """Open a folder or a packed file; a packed one is unpacked and checked on the way.

    progress: called with the bytes unpacked. trusted: what `sign.load_trusted` gave; without it a
    signature must only fit its manifest. EdgeDtmError when path is no bundle and as in
    `sign.check_signature`.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, path, trusted)
    if not path.exists():
        raise EdgeDtmError(f"{path} does not exist")
    place = Path(tempfile.gettempdir())
    try:
        scratch = Scratch("edge-dtm", place)
    except OSError as error:
        raise _failed(f"cannot unpack {path} into {place}", error) from None
    try:
        folder = scratch.path / "bundle"
        _unpack(path, folder, progress, trusted, None)
        bundle = _open_folder(path, folder, trusted)
    except BaseException:
        scratch.close()
        raise
    bundle._temporary = scratch
    return bundle


def pack(
    folder: Path,
    out_path: Path,
    level: int = COMPRESSION_LEVEL,
    progress: Advance | None = None,
    sign_with: Ed25519PrivateKey | None = None,
) -> str | None:
    """Check a bundle folder and write it as one file; returns the id of the key that signed it.

    The same files and key give the same bytes (with the same zstd release). Only the manifest,
    its signature and what it lists go in; sign_with replaces a signature that the folder has.
    out_path is replaced when the new file is complete. progress: called with the bytes packed.
    EdgeDtmError as in Bundle.check.
    """
    folder, out_path = Path(folder), Path(out_path)
    if folder.is_file():
        raise EdgeDtmError(f"{folder} is a file: give the folder of a bundle")
    data, signature = read_head(folder)
    if sign_with is not None:
        signature = sign_manifest(data, sign_with)
    key = check_signature(data, signature, None, folder)
    manifest = Manifest.parse(data, str(folder / MANIFEST))
    Bundle(folder, folder, manifest).check()
    if out_path.is_dir():
        raise EdgeDtmError(f"{out_path} is a folder: give the name of a file")
    heads = {MANIFEST: data} if signature is None else {MANIFEST: data, SIGNATURE: signature}
    try:
        with Scratch(out_path.name, out_path.parent) as scratch:
            with (scratch / out_path.name).open("wb") as file:
                _write(file, heads, folder, manifest, level, progress)
                file.flush()
                os.fsync(file.fileno())
            (scratch / out_path.name).replace(out_path)
    except OSError as error:
        raise _failed(f"cannot write {out_path}", error) from None
    return key


def unpack(
    file: Path,
    out_dir: Path,
    progress: Advance | None = None,
    trusted: Trusted | None = None,
    max_unpacked_bytes: int | None = None,
) -> str | None:
    """Unpack and check what pack wrote; returns the id of the key that signed it, if one did.

    out_dir must not exist yet and appears whole or not at all. progress: called with the bytes
    unpacked. trusted: as in open_bundle, checked before any listed file is written.
    max_unpacked_bytes: most bytes of the listed files together. EdgeDtmError for an existing
    out_dir, a broken archive, and any member that the manifest, which comes first, does not list
    with exactly this size and hash; links, devices and paths are such.
    """
    file, out_dir = Path(file), Path(out_dir)
    if os.path.lexists(out_dir):
        raise EdgeDtmError(f"{out_dir} exists already: give another folder or remove it")
    try:
        with Scratch(out_dir.name, out_dir.parent) as scratch:
            key = _unpack(file, scratch / "bundle", progress, trusted, max_unpacked_bytes)
            (scratch / "bundle").rename(out_dir)
    except OSError as error:
        raise _failed(f"cannot write {out_dir}", error) from None
    return key


def _open_folder(source: Path, folder: Path, trusted: Trusted | None) -> Bundle:
    data, signature = read_head(folder)
    key = check_signature(data, signature, trusted, source)
    return Bundle(source, folder, Manifest.parse(data, str(folder / MANIFEST)), key)


def _failed(what: str, error: OSError) -> EdgeDtmError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EdgeDtmError(f"{what}: the disk is full; make room and start again")
    return EdgeDtmError(f"{what}: {error.strerror or error}")


class _Folding:
    """Compresses what is written, into a file, and puts the hash of the result behind it."""

    def __init__(self, file: BinaryIO, level: int) -> None:
        self._file = file
        # One thread: with several, the bytes depend on how many.
        compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, threads=0)
        self._object = compressor.compressobj()
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._put(self._object.compress(data))
        return len(data)

    def finish(self) -> None:
        self._put(self._object.flush())
        self._file.write(_TRAILER_HEAD + self._digest.digest())

    def _put(self, packed: bytes) -> None:
        self._digest.update(packed)
        self._file.write(packed)


def _write(
    file: BinaryIO,
    heads: dict[str, bytes],
    folder: Path,
    manifest: Manifest,
    level: int,
    progress: Advance | None,
) -> None:
    out = _Folding(file, level)
    stream: Any = out  # tarfile asks no more of a stream than that it can be written to
    # GNU writes a size above 8 GiB into the header itself, so a bundle never has the extended
    # headers that unpack refuses.
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for name in (*heads, *sorted(manifest.files)):
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            if name in heads:
                info.size = len(heads[name])
                archive.addfile(info, io.BytesIO(heads[name]))
            else:
                with (folder / name).open("rb") as source:
                    info.size = os.fstat(source.fileno()).st_size
                    archive.addfile(info, source)
            if progress:
                progress(info.size)
    out.finish()


class _Unfolding:
    """Reads exactly as much decompressed data as asked for; EdgeDtmError on a broken stream."""

    def __init__(self, path: Path, source: BinaryIO) -> None:
        self._path = path
        self._source = source
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT_BYTES)
        self._object = decompressor.decompressobj()
        self._digest = hashlib.sha256()
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
        self._digest.update(data[: len(data) - len(self._object.unused_data)])
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
            part = self.read_some(min(size, COPY_BYTES))
            if not part:
                raise EdgeDtmError(f"{self._path} is truncated: copy it again")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def check_trailer(self) -> None:
        """EdgeDtmError unless the frame is followed by its hash, and that by nothing."""
        tail = self._object.unused_data + self._source.read(_TRAILER_BYTES + 1)
        if len(tail) < _TRAILER_BYTES:
            raise EdgeDtmError(f"{self._path} is truncated: copy it again")
        if len(tail) > _TRAILER_BYTES:
            raise EdgeDtmError(f"{self._path} has data behind its end; do not use this archive")
        if tail != _TRAILER_HEAD + self._digest.digest():
            raise EdgeDtmError(f"{self._path} is damaged (its checksum differs): copy it again")


def _unpack(
    path: Path,
    folder: Path,
    progress: Advance | None,
    trusted: Trusted | None,
    max_unpacked_bytes: int | None,
) -> str | None:
    """Make folder and unpack into it; what is there when this fails is worth nothing."""
    try:
        source = path.open("rb")
    except OSError as error:
        raise EdgeDtmError(f"cannot read {path}: {error.strerror or error}") from None
    with source:
        try:
            folder.mkdir()
            return _unpack_stream(
                path, _Unfolding(path, source), folder, progress, trusted, max_unpacked_bytes
            )
        except OSError as error:
            raise _failed(f"cannot unpack {path} into {folder.parent.parent}", error) from None


def _unpack_stream(
    path: Path,
    stream: _Unfolding,
    folder: Path,
    progress: Advance | None,
    trusted: Trusted | None,
    max_unpacked_bytes: int | None,
) -> str | None:
    # tarfile itself reads extended headers of any size into memory and follows links; the few
    # members a bundle may have need only its header parser.
    member = _read_header(path, stream)
    if member is None or member.name != MANIFEST or member.type != tarfile.REGTYPE:
        raise EdgeDtmError(f"{path} is no packed bundle: {MANIFEST} is not its first member")
    data = _read_small(path, stream, member, MANIFEST_LIMIT_BYTES)
    member = _read_header(path, stream)
    signature = None
    if member is not None and member.name == SIGNATURE and member.type == tarfile.REGTYPE:
        signature = _read_small(path, stream, member, SIGNATURE_LIMIT_BYTES)
        member = _read_header(path, stream)
    key = check_signature(data, signature, trusted, path)
    manifest = Manifest.parse(data, f"{path}: {MANIFEST}")
    _check_room(path, manifest, folder, max_unpacked_bytes)
    _write_file(folder / MANIFEST, data)
    if signature is not None:
        _write_file(folder / SIGNATURE, signature)
    seen: set[str] = set()
    while member is not None:
        _unpack_member(path, stream, member, manifest, seen, folder, progress)
        seen.add(member.name)
        member = _read_header(path, stream)
    if missing := sorted(set(manifest.files) - seen):
        raise EdgeDtmError(f"{path} lacks {', '.join(missing)}: pack or copy it again")
    rest = 0
    while part := stream.read_some(COPY_BYTES):
        rest += len(part)
        if part.strip(b"\0") or rest > _TAR_END_LIMIT_BYTES:
            raise EdgeDtmError(f"{path} has data behind its end; do not use this archive")
    stream.check_trailer()
    return key


def _check_room(
    path: Path, manifest: Manifest, folder: Path, max_unpacked_bytes: int | None
) -> None:
    needed = sum(entry.size_bytes for entry in manifest.files.values())
    if max_unpacked_bytes is not None and needed > max_unpacked_bytes:
        raise EdgeDtmError(
            f"{path} unpacks to {needed} bytes, {max_unpacked_bytes} are allowed: do not use it, "
            f"or raise --max-unpacked-bytes"
        )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EdgeDtmError(
            f"{path} unpacks to {needed} bytes, only {free} are free in {folder.parent.parent}: "
            f"make room"
        )


def _unpack_member(
    path: Path,
    stream: _Unfolding,
    member: tarfile.TarInfo,
    manifest: Manifest,
    seen: set[str],
    folder: Path,
    progress: Advance | None,
) -> None:
    name = member.name
    entry = manifest.files.get(name)
    if member.type != tarfile.REGTYPE:
        raise EdgeDtmError(f"{path}: {name!r} is not a plain file; do not use this archive")
    if entry is None:
        raise EdgeDtmError(f"{path}: {name!r} is not listed; do not use this archive")
    if name in seen:
        raise EdgeDtmError(f"{path}: {name!r} comes twice; do not use this archive")
    if member.size != entry.size_bytes:
        raise EdgeDtmError(
            f"{path}: {name!r} has {member.size} bytes, the manifest says {entry.size_bytes}; do "
            f"not use this archive"
        )
    digest = hashlib.sha256()
    with (folder / name).open("xb") as out:
        left = member.size
        while left:
            part = stream.read(min(left, COPY_BYTES))
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


def _read_small(path: Path, stream: _Unfolding, member: tarfile.TarInfo, limit_bytes: int) -> bytes:
    if member.size > limit_bytes:
        raise EdgeDtmError(
            f"{path}: its {member.name} has {member.size} bytes, the limit is {limit_bytes}; do "
            f"not use this archive"
        )
    data = stream.read(member.size)
    _skip_padding(path, stream, member.size)
    return data


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


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
