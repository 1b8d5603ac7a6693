"""Texts side by side: what the original said, and what the compressed model says there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import Reference
from edge_dtm.llamacpp.vocabulary import LlamaVocab
from edge_dtm.report.numbers import plural

PROMPT_CHARACTERS = 700  # of a long prompt; its end is what the answer goes on from
Piece = tuple[str, str]  # text, and the class of its mark in report.css or ""


@dataclass(frozen=True)
class Example:
    """One sequence: its prompt, a text a token on both sides, and at which positions they differ.

    title: why it is shown; row: of the held-out sequences; fed: whether the compressed model was
    fed the original's tokens, so that each of its tokens follows those and not its own.
    """

    title: str
    row: int
    prompt: str
    original: Sequence[str]
    compressed: Sequence[str]
    different: Sequence[bool]
    fed: bool

    @property
    def first(self) -> int | None:
        """Index of the first divergent token."""
        return self.different.index(True) if True in self.different else None

    @property
    def short_prompt(self) -> str:
        cut = "… " if len(self.prompt) > PROMPT_CHARACTERS else ""
        return cut + self.prompt[-PROMPT_CHARACTERS:] or "(empty)"

    @property
    def words(self) -> str:
        """How much differs."""
        n, others = len(self.original), sum(self.different)
        if self.first is None:
            return f"identical, all {plural(n, 'token')}"
        words = f"the first other token is number {self.first + 1} of {n}"
        return f"{words}, {others} differ in all" if self.fed and others > 1 else words

    @property
    def sides(self) -> list[tuple[str, list[Piece]]]:
        """(heading, pieces) of both texts."""
        own = [""] * len(self.original)
        # What is generated behind the first other token is another text, no mistake.
        other = ["other" if d and self.fed else "" for d in self.different]
        if self.first is not None:
            own[self.first], other[self.first] = "own", "first"
        return [
            ("Original", list(_pieces(self.original, own))),
            ("Compressed", list(_pieces(self.compressed, other))),
        ]


def _pieces(texts: Sequence[str], marks: Sequence[str]) -> Iterator[Piece]:
    plain = ""
    for text, mark in zip(texts, marks, strict=True):
        if not mark:
            plain += text
            continue
        visible = _visible(text)
        # A space before a word would be marked at the end of the line before it.
        word = visible.lstrip(" ")
        yield plain + " " * (len(visible) - len(word)), ""
        yield word, mark
        plain = ""
    yield plain, ""


def _visible(text: str) -> str:
    """A marked token that one could not see, made visible."""
    if text and not text.isspace():
        return text
    return text.replace(" ", "␣").replace("\n", "⏎\n").replace("\t", "⇥") or "∅"


def chosen_rows(
    first: npt.NDArray[np.int64], divergent: npt.NDArray[np.int64]
) -> list[tuple[str, int]]:
    """(title, row) of the best, the median and the worst sequence, none of them twice.

    first, divergent: first divergent token and number of divergent tokens, shape (sequences,), at
    least one. In order of the first, and of fewer divergent ones where that is equal.
    """
    order = np.lexsort((np.arange(len(first)), -divergent, first))
    chosen: dict[int, str] = {}
    for title, at in (("Best", -1), ("Median", len(order) // 2), ("Worst", 0)):
        chosen.setdefault(int(order[at]), title)
    return [(title, row) for row, title in chosen.items()]


def chosen(
    model: Path,
    reference: Reference,
    record: Record,
    first: npt.NDArray[np.int64],
    divergent: npt.NDArray[np.int64],
) -> list[Example]:
    """Examples of chosen_rows, with the vocabulary of a GGUF file.

    record: the answers to reference; first, divergent: as in chosen_rows.
    """
    vocabulary = LlamaVocab(model)
    fed = record.mode == "teacher_forced"
    examples = []
    for title, row in chosen_rows(first, divergent if fed else np.zeros_like(divergent)):
        ids = reference.generated(row)
        other_ids = [int(i) for i in record.ids[row, : len(ids)]]
        different = [a != b for a, b in zip(ids, other_ids, strict=True)]
        texts, others = vocabulary.texts(ids), vocabulary.texts(other_ids)
        if fed:
            # A token alone may be part of a character; where it is the original's, so is its text.
            others = [
                vocabulary.texts([b])[0] if d else text
                for text, b, d in zip(texts, other_ids, different, strict=True)
            ]
        examples.append(
            Example(title, row, str(reference.texts[row]), texts, others, different, fed)
        )
    return examples
