"""Which tokens go to llama.cpp in which call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_dtm.formats.reference import Reference

BEGINNING_TOKENS = 16  # those that sequences are sorted by, so that neighbours begin alike


class Step(NamedTuple):
    """One token of a decode call. slot: its sequence in the KV cache; row: of the reference;
    target: its index in the generated tokens, -1 if its logits are not wanted."""

    token: int
    position: int
    slot: int = 0
    row: int = 0
    target: int = -1


class Feed(NamedTuple):
    """A sequence in a call. cached: how many of its first tokens lie in the slot already."""

    row: int
    slot: int
    cached: int


def calls(reference: Reference, batch_tokens: int, sequences: int) -> Iterator[list[Feed]]:
    """The sequences of each call; each row is in one call.

    As many as `sequences` share a call if they fit into batch_tokens; one that is longer has a
    call of its own, to be fed in chunks. What a slot's sequence shares with the one before stays in
    the cache, up to where logits are wanted; so neighbours should begin alike and have about one
    length, since llama.cpp feeds equal lengths at once.
    """
    fed = [_fed(reference, row) for row in range(len(reference))]
    slots: list[list[int]] = [[] for _ in range(sequences)]

    def cached(row: int, slot: int) -> int:
        before_wanted = fed[row][: int(reference.prompt_lengths[row]) - 1]
        pairs = zip(slots[slot], before_wanted, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    call: list[Feed] = []
    size = 0
    for row in sorted(range(len(fed)), key=lambda r: (fed[r][:BEGINNING_TOKENS], len(fed[r]))):
        slot, length = len(call), len(fed[row])
        if slot == sequences or (call and size + length - cached(row, slot) > batch_tokens):
            yield call
            call, size, slot = [], 0, 0
        call.append(Feed(row, slot, cached(row, slot)))
        size += length - call[-1].cached
        slots[slot] = fed[row]
    if call:
        yield call


def _fed(reference: Reference, row: int) -> list[int]:
    """All tokens of a sequence but the last, behind which nothing is wanted."""
    return reference.prompt(row) + reference.generated(row)[:-1]


def steps_of(reference: Reference, feed: Feed) -> list[Step]:
    """The tokens of a feed that the cache does not have yet."""
    row, slot, cached = feed
    tokens = _fed(reference, row)
    first = int(reference.prompt_lengths[row]) - 1
    return [
        Step(tokens[i], i, slot, row, i - first if i >= first else -1)
        for i in range(cached, len(tokens))
    ]


def prompt_steps(prompt: Sequence[int]) -> list[Step]:
    last = len(prompt) - 1
    return [Step(token, i, target=0 if i == last else -1) for i, token in enumerate(prompt)]


def chunks(steps: Sequence[Step], size: int) -> Iterator[Sequence[Step]]:
    for start in range(0, len(steps), size):
        yield steps[start : start + size]


def replay_tokens(reference: Reference) -> int:
    """Tokens that teacher_forced or greedy feeds, the total that progress adds up to."""
    return int(_lengths(reference).sum()) - len(reference)


def context_needed(reference: Reference) -> int:
    """Tokens of the longest sequence, prompt and generated ones together."""
    return int(_lengths(reference).max(initial=1))


def _lengths(reference: Reference) -> npt.NDArray[np.int64]:
    return reference.prompt_lengths.astype(np.int64) + reference.generated_lengths
