"""Which tokens go to llama.cpp in which call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from edge_dtm.formats.reference import Reference

BEGINNING_TOKENS = 16  # those that sequences are sorted by, so that neighbours begin alike


class Step(NamedTuple):
    """One token of a decode call; slot: its sequence in the KV cache; row: of the reference; target:
    its index in the generated tokens, -1 if its logits are not wanted."""

    token: int
    position: int
    slot: int = 0
    row: int = 0
    target: int = -1


class Feed(NamedTuple):
    """A sequence in a call. slot: where in the KV cache; cached: how many of its tokens, from the
    first on, lie there already, from the sequence before."""

    row: int
    slot: int
    cached: int


def calls(reference: Reference, batch_tokens: int, sequences: int) -> Iterator[list[Feed]]:
    """The sequences of each call; each row is in one call.

    As many as `sequences` share a call if they fit into batch_tokens; one that is longer has a
    call of its own, to be fed in chunks. Tokens that the slot's sequence before began with stay in
    the cache, up to where logits are wanted; so neighbours should begin alike (a chat template's
    beginning is fed once a slot) and have about one length, since llama.cpp feeds equal lengths at
    once.
    """
    fed = [reference.prompt(row) + reference.generated(row)[:-1] for row in range(len(reference))]
    slots: list[list[int]] = [[] for _ in range(sequences)]
    order = sorted(range(len(fed)), key=lambda row: (fed[row][:BEGINNING_TOKENS], len(fed[row])))
    call: list[Feed] = []
    size = 0
    for row in order:
        cached = _cached(reference, row, slots[len(call) % sequences], fed[row])
        if call and (len(call) == sequences or size + len(fed[row]) - cached > batch_tokens):
            yield call
            call, size = [], 0
            cached = _cached(reference, row, slots[0], fed[row])
        slots[len(call)] = fed[row]
        call.append(Feed(row, len(call), cached))
        size += len(fed[row]) - cached
    if call:
        yield call


def _cached(reference: Reference, row: int, slot: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens in front of the first wanted logits `slot` has already."""
    first = int(reference.prompt_lengths[row]) - 1
    pairs = zip(slot, tokens[:first], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(slot), first))


def steps_of(reference: Reference, feed: Feed) -> list[Step]:
    """The tokens of a feed that the cache does not have yet."""
    row, slot, cached = feed
    tokens = reference.prompt(row) + reference.generated(row)[:-1]
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
    return int(
        reference.prompt_lengths.sum(dtype=np.int64)
        + reference.generated_lengths.sum(dtype=np.int64)
        - len(reference)
    )


def context_needed(reference: Reference) -> int:
    """Tokens of the longest sequence, prompt and generated ones together."""
    lengths = reference.prompt_lengths.astype(np.int64) + reference.generated_lengths
    return int(lengths.max()) if len(reference) else 1
