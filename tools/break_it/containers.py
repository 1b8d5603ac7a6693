"""Damage to npz files and packed bundles (tar in zstd), and how to write broken ones."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import zstandard

from break_it.mutations import INTEGERS, mutate_bytes, mutate_json


def read_npz(data: bytes) -> dict[str, bytes]:
    """Name of each member -> its npy bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        return {info.filename: members.read(info) for info in members.infolist()}


def mutate_npz(source: random.Random, members: dict[str, bytes]) -> bytes:
    """A valid zip of changed members: heads, data, the JSON head, names, ways of packing."""
    items = list(members.items())
    how = zipfile.ZIP_DEFLATED
    for _ in range(source.choice((1, 1, 2))):
        at = source.randrange(len(items))
        name, data = items[at]
        kind = source.randrange(12)
        if kind < 4:
            items[at] = (name, mutate_npy_head(source, data))
        elif kind == 4:
            items[at] = (name, mutate_bytes(source, data, [d for _, d in items]))
        elif kind == 5:
            items[at] = (name, _mutate_values(source, data))
        elif kind < 9:
            head = next((i for i, (n, _) in enumerate(items) if n == "meta.npy"), None)
            if head is not None:
                text = mutate_json(source, _npy_data(members["meta.npy"]))
                items[head] = ("meta.npy", npy(f"({len(text)},)", "'|u1'", text))
        elif kind == 9:
            items[at] = (source.choice(("x.npy", "", "../x.npy", name.upper(), "a" * 300)), data)
        elif kind == 10:
            if source.random() < 0.5 and len(items) > 1:
                del items[at]
            else:
                items.append(source.choice(items))
        else:
            how = source.choice((zipfile.ZIP_STORED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2))
    return write_npz(items, how)


def write_npz(items: Sequence[tuple[str, bytes]], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of these members, in this order; a name may come twice."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in items:
            # Without its own date a member has the time of day in it.
            info = zipfile.ZipInfo(name or "/", (1980, 1, 1, 0, 0, 0))
            info.compress_type = how
            # zipfile warns of a second member of one name; that is what is wanted here.
            archive.NameToInfo.pop(info.filename, None)
            archive.writestr(info, data)
    return out.getvalue()


def npy(shape: str, descr: str, data: bytes, fortran: str = "False") -> bytes:
    """An array in npy format 1.0 whose head says what it is told to, true or not."""
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    return _npy_of(text.encode(), data)


def _npy_of(text: bytes, data: bytes, version: bytes = b"\1\0") -> bytes:
    head = text + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(head) % 2**16) + head + data


def _npy_parts(data: bytes) -> tuple[bytes, bytes]:
    (size,) = struct.unpack("<H", data[8:10].ljust(2, b"\0"))
    return data[10 : 10 + size], data[10 + size :]


def _npy_data(data: bytes) -> bytes:
    return _npy_parts(data)[1]


def mutate_npy_head(source: random.Random, data: bytes) -> bytes:
    """The same data under a head of another shape or type, or that is no head at all."""
    head, values = _npy_parts(data)
    number = source.choice((*INTEGERS, -1, -(2**63), 10**30))
    shape = source.choice((
        f"({number},)", f"({number}, {number})", f"({number}, 0)", f"(1, {number}, 8)", "()", "(,)",
        "(1.5,)", "('a',)", "[1]", "(True,)", "None", f"{'(' * 90}1,{')' * 90}", "(1,) * 9",
        f"({'1, ' * 70})", f"({'1, ' * 30})",
    ))  # fmt: skip
    descr = source.choice((
        "'<i4'", "'>i4'", "'<i8'", "'<f4'", "'<f8'", "'<f2'", "'|u1'", "'|b1'", "'<c8'", "'|O'",
        "'<U0'", "'|S0'", "'|V0'", f"'<U{number}'", "'|S5'", "'<M8[s]'", "[('a', '<i4')]",
        "[('a', '|O')]", "'nonsense'", "''", "None", "5", "{}", "[" * 150 + "]" * 150,
    ))  # fmt: skip
    kind = source.randrange(8)
    text = head.decode("latin-1")
    if kind < 3:
        text = _replaced(text, "'shape': ", shape)
    elif kind < 5:
        text = _replaced(text, "'descr': ", descr)
    elif kind == 5:
        text = text.replace("False", source.choice(("True", "0", "None", "1e999")))
    elif kind == 6:
        text = source.choice((
            "", "{", "(" * 5000, "'" * 3, '"""', "{'descr': '<i4'", "\\", "0" * 9000, "{}", "[]",
            "{'a': " * 100, "-" * 9000, "x\0", "\n\n  x\n y", "{**{}}", "f'{1}'", "1+1j", "\x0c",
        ))  # fmt: skip
    else:
        changed = mutate_bytes(source, head)
        return _npy_of(changed[:60000], values, source.choice((b"\1\0", b"\2\0", b"\3\0", b"\7\0")))
    return _npy_of(text.rstrip().encode("latin-1"), values)


def _replaced(text: str, key: str, value: str) -> str:
    """value for what stands behind key, up to the next key or the end."""
    before, found, after = text.partition(key)
    end = after.find(", '")
    end = after.rfind(", }") if end < 0 else end
    return f"{before}{found}{value}{after[end:]}" if found else text


def _mutate_values(source: random.Random, data: bytes) -> bytes:
    """Four-byte items replaced by limits of integers and by nan and infinities."""
    head, values = _npy_parts(data)
    out = bytearray(values)
    for _ in range(source.choice((1, 1, 5, 1000))):
        if len(out) < 4:
            break
        at = source.randrange(len(out) // 4) * 4
        out[at : at + 4] = source.choice((
            struct.pack("<f", source.choice((float("nan"), float("inf"), -float("inf"), 3e38))),
            struct.pack("<i", source.choice((-1, 0, 1, 2**31 - 1, -(2**31), 5))),
        ))  # fmt: skip
    return _npy_of(head.rstrip(), bytes(out))


# --- the packed archive --------------------------------------------------------------------

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes, **changes: Any) -> Member:
    """A tar member; changes: other attributes of its TarInfo, such as size, type, linkname."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, data


def tar(members: Sequence[Member], end: bytes = bytes(1024)) -> bytes:
    """The members one after the other, whatever their heads say of their sizes."""
    out = bytearray()
    for info, data in members:
        try:
            out += info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        except ValueError:  # a number that no head can hold
            info.size = info.mode = info.mtime = 0
            out += info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        out += data + bytes(-len(data) % tarfile.BLOCKSIZE)
    return bytes(out) + end


def frame(data: bytes, level: int = 1) -> bytes:
    """data in zstd, with the hash behind it that edge-dtm's archives end with."""
    packed = zstandard.ZstdCompressor(level=level, write_checksum=True).compress(data)
    return seal_frame(packed)


def seal_frame(packed: bytes) -> bytes:
    return packed + b"\x5e\x2a\x4d\x18\x20\0\0\0" + hashlib.sha256(packed).digest()


def mutate_members(
    source: random.Random, members: Sequence[Member], mutate_manifest: Callable[[bytes], bytes]
) -> list[Member]:
    """Members renamed, doubled, moved, of other kinds and sizes; or another manifest."""
    out = [member(i.name, d, size=i.size, type=i.type) for i, d in members]
    for _ in range(source.choice((1, 1, 2))):
        at = source.randrange(len(out))
        info, data = out[at]
        kind = source.randrange(9)
        if kind < 3:
            out[0] = member("manifest.json", mutate_manifest(members[0][1]))
        elif kind == 3:
            info.name = source.choice(
                (
                    "../x",
                    "/etc/x",
                    "./model.gguf",
                    "",
                    "a" * 300,
                    "x\0y",
                    "a/b",
                    "é",
                    "..",
                    "\x1b[2J",
                )
            )
        elif kind == 4:
            info.type = source.choice(
                (*(bytes([c]) for c in b"0123456789LKxgSDMNVX"), b"\0", source.randbytes(1))
            )
            info.linkname = source.choice(("", "/etc/passwd", "model.gguf", "../x"))
        elif kind == 5:
            info.size = source.choice((*INTEGERS, -1))
        elif kind == 6:
            if source.random() < 0.5 and len(out) > 1:
                del out[at]
            else:
                out.insert(at, source.choice(out))
        elif kind == 7:
            other = source.randrange(len(out))
            out[at], out[other] = out[other], out[at]
        else:
            out[at] = (info, mutate_bytes(source, data))
            if source.random() < 0.5:
                info.size = len(out[at][1])
    return out
