"""Texts side by side: which sequences are shown, and what is marked in them."""

from __future__ import annotations

import numpy as np

from edge_dtm.report import examples


def test_chosen_rows() -> None:
    first, divergent = np.array([5, 0, 9, 0, 7]), np.array([1, 4, 0, 9, 1])
    assert examples.chosen_rows(first, divergent) == [("Best", 2), ("Median", 0), ("Worst", 3)]
    assert examples.chosen_rows(first[:1], divergent[:1]) == [("Best", 0)]


def test_what_is_marked() -> None:
    def marks(fed: bool) -> list[tuple[str, str]]:
        shown = examples.Example(
            "Worst", 0, "", ["a", " b", "\n", "d"], ["a", " x", " ", "d"],
            [False, True, True, False], fed,
        )  # fmt: skip
        return [(mark, text) for _, pieces in shown.sides for text, mark in pieces if mark]

    assert marks(fed=True) == [("own", "b"), ("first", "x"), ("other", "␣")]
    # What is generated behind the first other token is another text, no mistake.
    assert marks(fed=False) == [("own", "b"), ("first", "x")]


def test_pieces_are_the_whole_text() -> None:
    same = examples.Example("Best", 0, "p" * 800, ["a", " b"], ["a", " b"], [False, False], True)
    assert [pieces for _, pieces in same.sides] == [[("a b", "")], [("a b", "")]]
    assert same.words == "identical, all 2 tokens"
    assert same.short_prompt == "… " + "p" * examples.PROMPT_CHARACTERS
