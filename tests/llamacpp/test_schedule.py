"""Which tokens go to llama.cpp in which call."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.formats.reference import PADDING, TOP_K, Reference
from edge_dtm.llamacpp.schedule import calls


@st.composite
def references(draw: st.DrawFn) -> Reference:
    """Sequences of few different tokens, so that many begin alike."""
    sizes = draw(
        st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    start = rng.integers(0, 2, 40)
    s, p, n = len(sizes), max(a for a, _ in sizes), max(b for _, b in sizes)
    prompts, generated = np.full((s, p), PADDING), np.full((s, n), PADDING)
    for row, (a, b) in enumerate(sizes):
        # The start that all have, up to where this one goes its own way.
        own = rng.integers(0, 45)
        ids = np.where(np.arange(a + b) < own, np.resize(start, a + b), rng.integers(0, 2, a + b))
        prompts[row, :a], generated[row, :b] = ids[:a], ids[a:]
    return Reference(
        prompt_ids=prompts.astype(np.int32),
        prompt_lengths=np.array([a for a, _ in sizes], dtype=np.int32),
        generated_ids=generated.astype(np.int32),
        generated_lengths=np.array([b for _, b in sizes], dtype=np.int32),
        top_ids=np.zeros((s, n, TOP_K), dtype=np.int32),
        top_logits=np.zeros((s, n, TOP_K), dtype=np.float32),
        log_normalizers=np.zeros((s, n), dtype=np.float32),
        split=np.zeros(s, dtype=np.uint8),
        texts=np.full(s, ""),
        provenance={},
    )


@given(references(), st.integers(1, 60), st.integers(1, 5))
def test_calls_feed_each_sequence_as_if_alone(
    reference: Reference, batch_tokens: int, sequences: int
) -> None:
    """Replays the calls on lists in place of the KV cache."""
    cache: list[list[int]] = [[] for _ in range(sequences)]
    rows = []
    for call in calls(reference, batch_tokens, sequences):
        assert len({feed.slot for feed in call}) == len(call) <= sequences
        fresh = 0
        for row, slot, cached in call:
            tokens = reference.prompt(row) + reference.generated(row)[:-1]
            assert cached < len(reference.prompt(row)), "the logits behind the prompt are wanted"
            assert cached <= len(cache[slot])
            cache[slot] = cache[slot][:cached] + tokens[cached:]
            assert cache[slot] == tokens
            fresh += len(tokens) - cached
            rows.append(row)
        assert fresh <= batch_tokens or len(call) == 1
    assert sorted(rows) == list(range(len(reference)))


def test_a_shared_beginning_is_fed_once_a_slot(tiny_reference: Reference) -> None:
    many = tiny_reference.rows(np.array([1] * 9))
    first = int(many.prompt_lengths[0]) - 1
    cached = [feed.cached for call in calls(many, 500, 2) for feed in call]
    assert cached == [0, 0] + [first] * 7
