"""What a careless wire and a hostile hand do to a file: bytes, JSON, TOML, npz and tar. Pure.

Every function takes a random.Random and gives bytes, the same for the same state.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import zstandard

# Where sizes, counts and offsets turn over.
INTEGERS = (
    0, 1, 2, 3, 7, 8, 31, 32, 127, 128, 255, 256, 4095, 4096, 65535, 65536,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
# Marks in a tree that are replaced in its text, since json.dumps cannot write these.
_RAW = {
    "@deep@": "[" * 100_000 + "]" * 100_000,
    "@deep object@": '{"a":' * 5000 + "0" + "}" * 5000,
    "@below the limit@": "[" * 900 + "]" * 900,
    "@infinity@": "1e999",
    "@nan@": "NaN",
    "@minus infinity@": "-Infinity",
    "@digits@": "9" * 5000,
    "@broken@": "nul",
    "@surrogate@": '"\\ud800"',
}
_VALUES: tuple[Any, ...] = (
    *_RAW,
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, 5e-324, 10**400, 2**31, 2**53 + 1, 2**63,
    -(2**63), 2**64, "", "a", "0", "\x1b[31m", "a\nb", "\0", "../x", "a" * 5000, "é\u202e",
    [], {}, [[]], [1, 2], {"a": 1}, [{}], "NaN", "1e999",
)  # fmt: skip


def mutate_bytes(source: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to four changes: bits, integers, cuts, chunks doubled, moved, or from one of others."""
    out = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        kind = source.randrange(9)
        at = source.randrange(len(out) + 1)
        size = source.choice((1, 2, 4, 8, 16, 64, 512))
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << source.randrange(8)
        elif kind == 1 and out:
            out[at % len(out)] = source.randrange(256)
        elif kind == 2:
            number, width = source.choice(INTEGERS), source.choice((1, 2, 4, 8))
            order = source.choice(("little", "little", "little", "big"))
            out[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + size]
        elif kind == 5:
            chunk = out[at : at + size]
            out[at:at] = chunk * source.choice((1, 1, 2, 100))
        elif kind == 6:
            out[at:at] = source.randbytes(size)
        elif kind == 7:
            out[at : at + size] = source.randbytes(size)
        else:
            other = source.choice(others) if others else bytes(out)
            start = source.randrange(len(other) + 1)
            out[at:] = other[start:]
    return bytes(out)


def random_bytes(source: random.Random, magic: bytes = b"") -> bytes:
    """Noise of up to 4 KB, half of the time behind what the kind of file begins with."""
    data = source.randbytes(int(4096 ** source.random()))
    return magic + data if source.random() < 0.5 else data


def mutate_tree(source: random.Random, tree: Any) -> Any:
    """A copy with one to three nodes replaced, removed, renamed, doubled or exchanged."""
    tree = json.loads(json.dumps(tree))
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return _value(source)
        holder, key = source.choice(places)
        kind = source.randrange(10)
        if kind < 5:
            holder[key] = _value(source)
        elif kind == 5:
            del holder[key]
        elif kind == 6 and isinstance(holder, dict):
            name = source.choice([v for v in _VALUES if isinstance(v, str) and v not in _RAW])
            holder[name] = holder.pop(key)
        elif kind == 7:
            other, place = source.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        elif kind == 8 and isinstance(holder, list):
            holder.extend([holder[key]] * source.choice((1, 40)))
        elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = source.choice(INTEGERS) * source.choice((1, -1))
        else:
            return _value(source) if source.random() < 0.1 else tree
    return tree


def _value(source: random.Random) -> Any:
    """A copy, since later changes would be seen by all inputs."""
    return copy.deepcopy(source.choice(_VALUES))


def _places(tree: Any) -> Any:
    """(container, key or index) of every node below the root."""
    stack = [tree]
    while stack:
        node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(items):
            yield node, key
            if isinstance(value, (dict, list)) and value:
                stack.append(value)


def json_bytes(tree: Any) -> bytes:
    """The tree as text, its marks replaced by what json.dumps would refuse or never write."""
    text = json.dumps(tree)
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode("utf-8", "surrogatepass")


def mutate_json(source: random.Random, data: bytes) -> bytes:
    """A changed tree of valid JSON, as bytes."""
    out = json_bytes(mutate_tree(source, json.loads(data)))
    if source.random() < 0.03:
        out = source.choice(
            (b"\xef\xbb\xbf" + out, out.decode("utf-8", "replace").encode("utf-16"))
        )
    return out


def mutate_toml(source: random.Random, data: bytes) -> bytes:
    """Lines of TOML without, twice, in another order, or with another value."""
    lines = data.decode().splitlines()
    for _ in range(source.choice((1, 1, 2, 3))):
        at = source.randrange(len(lines))
        kind = source.randrange(6)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, source.choice(lines))
        elif kind == 2:
            other = source.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            value = source.choice((
                "nan", "inf", "-1", "0", "0x" + "f" * 5000, "9" * 5000, "1e999", "true", "''",
                "'\\u001b[31m'", '"""a\nb"""', "[" * 3000 + "]" * 3000, "[" * 300 + "]" * 300,
                "{a={a={a=1}}}", "1979-05-27", "[1, 'a']", '"\x1b"', "9223372036854775808",
                '"' + "a" * 5000 + '"', "[]", "[[]]", '["Q8_0", "Q8_0"]', "'../../x'",
            ))  # fmt: skip
            lines[at] = f"{lines[at].partition('=')[0].rstrip()} = {value}"
        if not lines:
            break
    return "\n".join(lines).encode()


# --- npz -----------------------------------------------------------------------------------


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
