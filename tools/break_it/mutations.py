"""Damage to bytes, JSON and TOML.

Every function takes a random.Random and returns bytes: the same for the same state.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

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
