"""Texts side by side: what the original said, what the compressed model would have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_dtm.llamacpp.token_text import TokenTexts
from edge_dtm.report.tags import Child, Markup, tag, text
from edge_dtm.report.words import plural

PROMPT_CHARACTERS = 700  # of a long prompt; its end is what the answer goes on from


@dataclass(frozen=True)
class Example:
    """One sequence: its prompt, a text a token on both sides, and at which positions they differ.

    title: why it is shown; row: of the held-out sequences.
    """

    title: str
    row: int
    prompt: str
    original: Sequence[str]
    compressed: Sequence[str]
    different: Sequence[bool]

    @property
    def first(self) -> int | None:
        return self.different.index(True) if True in self.different else None


def chosen_rows(
    first: npt.NDArray[np.int64], divergent: npt.NDArray[np.int64]
) -> list[tuple[str, int]]:
    """(title, row) of the best, the median and the worst sequence, without saying one twice.

    In order of the first divergent token, and of fewer divergent ones where that is equal.
    """
    order = np.lexsort((np.arange(len(first)), -divergent, first))
    out: list[tuple[str, int]] = []
    for title, at in (("Best", len(order) - 1), ("Median", len(order) // 2), ("Worst", 0)):
        if len(order) and order[at] not in [row for _, row in out]:
            out.append((title, int(order[at])))
    return out


def example(
    title: str,
    row: int,
    prompt: str,
    original: Sequence[int],
    compressed: Sequence[int],
    vocabulary: TokenTexts,
    fed: bool,
) -> Example:
    """fed: whether the compressed model was fed the original's tokens, so that each of its tokens
    follows those and not its own."""
    different = [a != b for a, b in zip(original, compressed, strict=True)]
    own = vocabulary.texts(original)
    if not fed:
        other = vocabulary.texts(compressed)
    else:
        # A token alone may be part of a character; where it is the original's, so is its text.
        other = [
            vocabulary.texts([b])[0] if d else a
            for a, b, d in zip(own, compressed, different, strict=True)
        ]
    return Example(title, row, prompt, own, other, different)


def block(shown: Example, fed: bool) -> Markup:
    n, first = len(shown.original), shown.first
    others = sum(shown.different)
    if first is None:
        words = f"identical, all {plural(n, 'token')}"
    else:
        words = f"the first other token is number {first + 1} of {n}"
        if fed and others > 1:
            words += f", {others} differ in all"
    prompt = shown.prompt
    if len(prompt) > PROMPT_CHARACTERS:
        prompt = "… " + prompt[-PROMPT_CHARACTERS:]
    return tag(
        "article",
        tag("h3", f"{shown.title}: ", tag("span", words)),
        tag(
            "div",
            tag("h4", "Prompt"),
            tag("div", prompt or "(empty)", class_="text"),
            class_="prompt",
        ),
        tag(
            "div",
            _side("Original", shown.original, shown, False, fed),
            _side("Compressed", shown.compressed, shown, True, fed),
            class_="sides",
        ),
        class_="example",
    )


def _side(title: str, pieces: Sequence[str], shown: Example, compressed: bool, fed: bool) -> Markup:
    first = shown.first
    out: list[Child] = []
    plain = ""
    for i, piece in enumerate(pieces):
        kind = None
        if i == first:
            kind = "first" if compressed else "own"
        elif compressed and fed and shown.different[i]:
            kind = "other"
        if kind is None:
            plain += piece
            continue
        shown_piece = _visible(piece)
        # A space before a word would be marked at the end of the line before it.
        word = shown_piece.lstrip(" ")
        plain += " " * (len(shown_piece) - len(word))
        out += [text(plain), tag("mark", word, class_=kind)]
        plain = ""
    out.append(text(plain))
    return tag("div", tag("h4", title), tag("div", out, class_="text"))


def _visible(piece: str) -> str:
    """A marked token that one could not see, made visible."""
    if piece and not piece.isspace():
        return piece
    return piece.replace(" ", "␣").replace("\n", "⏎\n").replace("\t", "⇥") or "∅"
