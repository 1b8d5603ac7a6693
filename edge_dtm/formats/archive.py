"""The packed bundle: one `.edge` file, a tar archive in zstd, and how it is opened with care.

Its members are manifest.json, manifest.sig where the bundle is signed, then the listed files by
name. Behind the zstd frame stands the SHA-256 of all before it, in a skippable frame (RFC 8878,
3.1.2), which zstd and tar step over: zstd's own checksum leaves bits that nothing looks at.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import zstandard

from edge_dtm.core.errors import EdgeDtmError, os_errors
from edge_dtm.core.files import Advance, scratch_folder
from edge_dtm.formats.bundle import MANIFEST, SIGNATURE, Bundle, read_head
from edge_dtm.formats.signing import Trusted, sign_manifest
from edge_dtm.formats.unpack import TRAILER_HEAD, unpack_into

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SUFFIX = ".edge"
# Level 19 makes a quantized model 0.1 % smaller than level 10 and takes fifty times as long.
COMPRESSION_LEVEL = 10


def open_bundle(
    path: Path, progress: Advance | None = None, trusted: Trusted | None = None
) -> Bundle:
    """Open a folder or a packed file; a packed one is unpacked and checked on the way.

    progress: called with the bytes unpacked. trusted: what `sign.load_trusted` gave; without it a
    signature must only fit its manifest. EdgeDtmError when path is no bundle and as in
    `sign.check_signature`.
    """
    if path.is_dir():
        return Bundle.of(path, path, *read_head(path), trusted)
    if not path.exists():
        raise EdgeDtmError(f"{path} does not exist")
    with os_errors(f"cannot unpack {path}"), ExitStack() as stack:
        folder = stack.enter_context(scratch_folder()) / "bundle"
        bundle = unpack_into(path, folder, progress, trusted, None)
        return replace(bundle, temporary=stack.pop_all())


def pack(
    folder: Path,
    out_path: Path,
    progress: Advance | None = None,
    sign_with: Ed25519PrivateKey | None = None,
) -> str | None:
    """Check a bundle folder and write it as one file; returns the id of the key that signed it.

    The same files and key give the same bytes (with the same zstd release). Only the manifest,
    its signature and what it lists go in; sign_with replaces a signature that the folder has.
    out_path is replaced when the new file is complete. progress: called with the bytes packed.
    EdgeDtmError as in Bundle.check.
    """
    if folder.is_file():
        raise EdgeDtmError(f"{folder} is a file: give the folder of a bundle")
    data, signature = read_head(folder)
    if sign_with is not None:
        signature = sign_manifest(data, sign_with)
    bundle = Bundle.of(folder, folder, data, signature)
    bundle.check()
    if out_path.is_dir():
        raise EdgeDtmError(f"{out_path} is a folder: give the name of a file")
    heads = {MANIFEST: data} if signature is None else {MANIFEST: data, SIGNATURE: signature}
    with (
        os_errors(f"cannot write {out_path}"),
        scratch_folder(out_path.name, out_path.parent) as scratch,
    ):
        with (scratch / out_path.name).open("w+b") as file:
            _write(file, heads, bundle, progress)
        (scratch / out_path.name).replace(out_path)
    return bundle.key_id


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
    if os.path.lexists(out_dir):
        raise EdgeDtmError(f"{out_dir} exists already: give another folder or remove it")
    with (
        os_errors(f"cannot write {out_dir}"),
        scratch_folder(out_dir.name, out_dir.parent) as scratch,
    ):
        bundle = unpack_into(file, scratch / "bundle", progress, trusted, max_unpacked_bytes)
        (scratch / "bundle").rename(out_dir)
    return bundle.key_id


def _write(
    file: io.BufferedRandom,
    heads: dict[str, bytes],
    bundle: Bundle,
    progress: Advance | None,
) -> None:
    # One thread: with several, the bytes depend on how many.
    compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=True, threads=0)
    with (
        compressor.stream_writer(file, closefd=False) as stream,
        # GNU writes a size above 8 GiB into the header itself, so a bundle never has the extended
        # headers that unpack refuses.
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive,
    ):
        for name in (*heads, *sorted(bundle.manifest.files)):
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            with (
                io.BytesIO(heads[name]) if name in heads else bundle.path(name).open("rb") as source
            ):
                info.size = source.seek(0, os.SEEK_END)
                source.seek(0)
                archive.addfile(info, source)
            if progress:
                progress(info.size)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").digest()
    file.write(TRAILER_HEAD + digest)
    file.flush()
    os.fsync(file.fileno())
