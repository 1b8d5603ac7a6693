"""Unpacking a bundle with care: nothing in the archive is believed before it is checked."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tarfile
from pathlib import Path
from typing import BinaryIO

import zstandard

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import Advance, write_synced
from edge_dtm.formats.bundle import (
    COPY_BYTES,
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    SIGNATURE,
    SIGNATURE_LIMIT_BYTES,
    Manifest,
)
from edge_dtm.formats.signing import Trusted, check_signature

# More than any level up to 22 needs; without a bound a frame may ask for gigabytes.
_WINDOW_LIMIT_BYTES = 2**27
# zstd can turn 4 bytes into 128 KiB, so a small read bounds what one step can unfold to 32 MiB.
_COMPRESSED_READ_BYTES = 1024
_TAR_BLOCK = tarfile.BLOCKSIZE
_TAR_END_LIMIT_BYTES = 2**20
# Magic number of a skippable frame, any of sixteen, and the size of what it holds.
TRAILER_HEAD = (0x184D2A5E).to_bytes(4, "little") + (32).to_bytes(4, "little")
_TRAILER_BYTES = len(TRAILER_HEAD) + 32


def disk_error(what: str, error: OSError) -> EdgeDtmError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EdgeDtmError(f"{what}: the disk is full; make room and start again")
    return EdgeDtmError(f"{what}: {error.strerror or error}")


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
        if tail != TRAILER_HEAD + self._digest.digest():
            raise EdgeDtmError(f"{self._path} is damaged (its checksum differs): copy it again")


def unpack_into(
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
            raise disk_error(f"cannot unpack {path} into {folder.parent.parent}", error) from None


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
    write_synced(folder / MANIFEST, data, "xb")
    if signature is not None:
        write_synced(folder / SIGNATURE, signature, "xb")
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
