"""HTML elements as text, in which everything that is not made here is escaped.

Prompts, model names and figures of a bundle are untrusted: they go through `text`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_VOID = {"meta", "br", "wbr"}
# Control characters, surrogates, and those that turn the direction of what follows.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


class Markup(str):
    """Text that is HTML already, made by `tag` or written in this package."""

    __slots__ = ()


Child = object | Iterable["Child"]


def text(value: object) -> Markup:
    """Escaped, with characters that cannot be seen as U+FFFD."""
    return Markup(html.escape(_UNSEEN.sub("\ufffd", str(value)), quote=True))


def join(*children: Child) -> Markup:
    """Children in a row: Markup as it is, lists one by one, None left out, the rest as `text`."""
    out = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            out.append(child)
        elif isinstance(child, (list, tuple)):
            out.append(join(*child))
        else:
            out.append(text(child))
    return Markup("".join(out))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. Attributes as in HTML or SVG with _ for -, and class_ for class; None leaves one
    out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")
