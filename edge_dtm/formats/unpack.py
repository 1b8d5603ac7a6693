"""Unpacking a bundle with care: nothing in the archive is believed before it is checked."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from edge_dtm.core.errors import EdgeDtmError, os_errors
from edge_dtm.core.files import Advance, write_synced
from edge_dtm.formats.bundle import (
    COPY_BYTES,
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    SIGNATURE,
    SIGNATURE_LIMIT_BYTES,
    Bundle,
    FileEntry,
)
from edge_dtm.formats.signing import Trusted

# More than any level up to 22 needs; without a bound a frame may ask for gigabytes.
_WINDOW_LIMIT_BYTES = 2**27
_TAR_END_LIMIT_BYTES = 2**20
# Magic number of a skippable frame, any of sixteen, and the size of what it holds.
TRAILER_HEAD = (0x184D2A5E).to_bytes(4, "little") + (32).to_bytes(4, "little")
_TRAILER_BYTES = len(TRAILER_HEAD) + 32


class _Hashed:
    """A packed file up to its trailer, which is the hash of all that is read here."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = max(os.fstat(file.fileno()).st_size - _TRAILER_BYTES, 0)
        self._digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        self._digest.update(data)
        return data

    def trailer_fits(self) -> bool:
        return self._file.read() == TRAILER_HEAD + self._digest.digest()


class _Archive:
    """The tar archive in a packed file, read forward; EdgeDtmError for what `pack` never writes.

    tarfile itself reads extended headers of any size into memory and follows links. The few
    members of a bundle need only its header parser.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._source = _Hashed(file)
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT_BYTES)
        self._stream = decompressor.stream_reader(
            cast(BinaryIO, self._source), read_across_frames=True
        )

    def read(self, size: int, or_less: bool = False) -> bytes:
        """That many bytes; or_less: what is left will do."""
        try:
            data = self._stream.read(size)
        except zstandard.ZstdError as error:
            raise EdgeDtmError(
                f"{self._path} is damaged or no packed bundle ({error}): copy it again"
            ) from None
        if len(data) < size and not or_less:
            raise EdgeDtmError(f"{self._path} is truncated: copy it again")
        return data

    def refusal(self, why: str) -> EdgeDtmError:
        return EdgeDtmError(f"{self._path}: {why}; do not use this archive")

    def header(self) -> tarfile.TarInfo | None:
        """The next member, None at the end mark."""
        block = self.read(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return None
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise EdgeDtmError(f"{self._path} is damaged or no packed bundle ({error})") from None
        if member.type != tarfile.REGTYPE or member.size < 0:
            raise self.refusal(f"{member.name!r} is not a plain file")
        return member

    def skip_padding(self, size: int) -> None:
        """What fills the last block of a member of that size."""
        if self.read(-size % tarfile.BLOCKSIZE).strip(b"\0"):
            raise self.refusal("it has data between its members")

    def contents(self, member: tarfile.TarInfo, limit_bytes: int) -> bytes:
        if member.size > limit_bytes:
            raise self.refusal(
                f"its {member.name} has {member.size} bytes, the limit is {limit_bytes}"
            )
        data = self.read(member.size)
        self.skip_padding(member.size)
        return data

    def check_end(self) -> None:
        rest = 0
        while part := self.read(COPY_BYTES, or_less=True):
            rest += len(part)
            if part.strip(b"\0") or rest > _TAR_END_LIMIT_BYTES:
                raise self.refusal("it has data behind its end")
        if not self._source.trailer_fits():
            raise EdgeDtmError(f"{self._path} is damaged (its checksum differs): copy it again")


def unpack_into(
    path: Path,
    folder: Path,
    progress: Advance | None,
    trusted: Trusted | None,
    max_unpacked_bytes: int | None,
) -> Bundle:
    """Make folder and unpack into it; what is there when this fails is worth nothing."""
    place = folder.parent.parent
    with os_errors(f"cannot unpack {path} into {place}"), path.open("rb") as source:
        folder.mkdir()
        archive = _Archive(path, source)
        member = archive.header()
        if member is None or member.name != MANIFEST:
            raise EdgeDtmError(f"{path} is no packed bundle: {MANIFEST} is not its first member")
        data, signature = archive.contents(member, MANIFEST_LIMIT_BYTES), None
        member = archive.header()
        if member is not None and member.name == SIGNATURE:
            signature = archive.contents(member, SIGNATURE_LIMIT_BYTES)
            member = archive.header()
        bundle = Bundle.of(path, folder, data, signature, trusted)
        for limit, words in (
            (max_unpacked_bytes, "are allowed: do not use it, or raise --max-unpacked-bytes"),
            (shutil.disk_usage(folder).free, f"is all that is free in {place}: make room"),
        ):
            if limit is not None and bundle.size_bytes > limit:
                raise EdgeDtmError(f"{path} unpacks to {bundle.size_bytes} bytes, {limit} {words}")
        write_synced(folder / MANIFEST, data, "xb")
        if signature is not None:
            write_synced(folder / SIGNATURE, signature, "xb")
        missing = dict(bundle.manifest.files)
        while member is not None:
            entry = missing.pop(member.name, None)
            if entry is None:
                raise archive.refusal(f"{member.name!r} is not listed, or comes twice")
            _unpack_member(archive, member, entry, folder, progress)
            member = archive.header()
        if missing:
            raise EdgeDtmError(f"{path} lacks {', '.join(sorted(missing))}: pack or copy it again")
        archive.check_end()
    return bundle


def _unpack_member(
    archive: _Archive,
    member: tarfile.TarInfo,
    entry: FileEntry,
    folder: Path,
    progress: Advance | None,
) -> None:
    if member.size != entry.size_bytes:
        raise archive.refusal(
            f"{member.name!r} has {member.size} bytes, the manifest says {entry.size_bytes}"
        )
    digest, left = hashlib.sha256(), member.size
    with (folder / member.name).open("xb") as out:
        while left:
            part = archive.read(min(left, COPY_BYTES))
            out.write(part)
            digest.update(part)
            left -= len(part)
            if progress:
                progress(len(part))
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != entry.sha256:
        raise archive.refusal(f"{member.name} is changed (its hash differs)")
    archive.skip_padding(member.size)
