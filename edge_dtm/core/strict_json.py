"""JSON that others wrote, read so that nothing in it surprises later; and written as it is read.

json.loads takes NaN, numbers that no float holds, halves of characters, and nests as deep as the
stack allows; each of them would fail far from the file that it came from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import read_within

LIMIT_BYTES = 16 * 2**20  # of a file; a thousand times what verify writes
MAX_DEPTH = 32  # our own files have less than ten
MAX_DIGITS = 20  # 2^64
_SHOWN = 20


def loads(data: bytes) -> Any:
    """The tree of UTF-8 text. ValueError, in one line, for no JSON or more than any of our files has."""
    text = data.decode()
    try:
        tree = json.loads(text, parse_int=_integer, parse_float=_real, parse_constant=_real)
        too_deep = _depth(tree) > MAX_DEPTH
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ValueError("it is nested too deeply")
    # UnicodeEncodeError, a ValueError, for half a character.
    json.dumps(tree, ensure_ascii=False).encode()
    return tree


def _depth(node: Any) -> int:
    if not isinstance(node, (dict, list)):
        return 0
    return 1 + max(map(_depth, node.values() if isinstance(node, dict) else node), default=0)


def read(path: Path) -> Any:
    """The tree of a JSON file of LIMIT_BYTES at most. EdgeDtmError, in one line, for another."""
    return parse(read_within(path, LIMIT_BYTES), str(path))


def parse(data: bytes, source: str) -> Any:
    """The tree of UTF-8 text. EdgeDtmError, in one line that begins with source, for another."""
    try:
        return loads(data)
    except ValueError as error:
        raise EdgeDtmError(f"{source} is no JSON ({error}): make or copy it again") from None


def plain(tree: Any) -> Any:
    """The same tree with null for NaN and the infinities."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def dumps(tree: Any) -> str:
    """A file's text: sorted keys, indented by one space, numbers that are not finite as null."""
    return json.dumps(plain(tree), indent=1, sort_keys=True, allow_nan=False) + "\n"


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:_SHOWN]}... has too many digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_SHOWN]} is no JSON number, or too large")
    return value
