"""The original's text and hidden states, and sampling that was cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Made

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.sequences import batches_by_length, padded, reference_sequences
from edge_dtm.host.distill import teacher as module
from edge_dtm.host.distill.teacher import TEXT, capture, sample_texts

Sample = Callable[..., list[list[int]]]


class _Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def starts(made: Made) -> list[list[int]]:
    return [made.reference.prompt(r)[:4] for r in range(len(made.reference))]


@pytest.fixture
def sample(made: Made, starts: list[list[int]], tmp_path: Path) -> Sample:
    def go(
        count: int,
        tokens: int,
        seed: int,
        eos: Sequence[int] = (),
        parts: str = "parts",
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[list[int]]:
        folder = tmp_path / parts
        return sample_texts(
            made.model, starts, count, tokens, seed, eos, parts=folder, progress=progress
        )

    return go


def test_reference_sequences_are_prompts_and_answers(made: Made) -> None:
    sequences = reference_sequences(made.reference)
    assert sequences == [made.ids(row)[0].tolist() for row in range(len(made.reference))]


def test_batches_hold_all_sequences_once_within_the_tokens() -> None:
    lengths = [5, 1, 9, 3, 3, 20, 2]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches = batches_by_length(lengths, order, 9)
    assert [i for b in batches for i in b] == order
    assert all(len(b) * max(lengths[i] for i in b) <= 9 for b in batches if len(b) > 1)
    assert [5] in batches  # longer than a batch, yet there
    assert padded([[4, 5], [6]]).tolist() == [[4, 5], [6, 0]]


def test_sampled_texts_are_reproducible_and_follow_the_model(
    made: Made, starts: list[list[int]], sample: Sample
) -> None:
    eos = made.checkpoint.tokenizer.eos_ids
    texts = sample(20, 16, 7, eos=eos)
    assert texts == sample(20, 16, 7, eos=eos, parts="again") and len(texts) == 20
    assert texts != sample(20, 16, 8, eos=eos, parts="other")
    for text in texts:
        assert any(text[: len(h)] == h for h in starts)
        assert len(text) <= 16 and not set(text[4:]) & set(eos)
    # Every start is used before one is used again.
    used = {tuple(t[:4]) for t in texts[: len(starts)]}
    assert len(used) == len(set(map(tuple, starts)))
    # Draws follow the model's own distribution: far likelier than uniform ids.
    total = []
    for text in texts:
        logits = made.model(input_ids=torch.tensor([text[:-1]])).logits[0].log_softmax(-1)
        total += logits.gather(1, torch.tensor(text[1:])[:, None])[3:, 0].tolist()
    assert np.mean(total) > -np.log(made.checkpoint.config.vocab) + 1


def test_sampling_ends_before_eos(made: Made, sample: Sample) -> None:
    every = range(made.checkpoint.config.vocab)
    assert all(len(text) <= 4 for text in sample(3, 16, 0, eos=every))


def test_sampling_goes_on_after_a_kill(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_SEQUENCES", 4)
    whole: list[int] = []
    texts = sample(12, 12, 7, parts="whole", progress=whole.append)
    cut: list[int] = []

    def stop(tokens: int) -> None:
        cut.append(tokens)
        if len(cut) == 12:  # in the second batch
            raise _Stopped

    with pytest.raises(_Stopped):
        sample(12, 12, 7, progress=stop)
    rest: list[int] = []
    assert sample(12, 12, 7, progress=rest.append) == texts
    assert 0 < sum(rest) < sum(whole)


def test_hidden_states_give_the_models_own_logits(made: Made, tmp_path: Path) -> None:
    sequences = [*reference_sequences(made.reference), [5], list(range(3, 40))]
    done: list[int] = []
    text = capture(made.model, sequences, done.append)
    assert sum(done) == sum(map(len, sequences))
    TEXT.save(text, tmp_path / "text.pt")
    text = TEXT.load(tmp_path / "text.pt")
    assert text.sequences == sequences
    head = made.model.lm_head.weight
    for row in (0, len(sequences) - 2, len(sequences) - 1):
        logits = made.model(input_ids=torch.tensor([sequences[row]])).logits[0]
        ours = text.hidden_states([row]) @ head.T
        assert (ours - logits).abs().max() < 2e-3 * logits.abs().max()
    both = text.hidden_states([1, 0])
    assert torch.equal(both[: text.lengths[1]], text.hidden_states([1]))


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_bytes(b"short")
    with pytest.raises(EdgeDtmError, match="--no-resume"):
        TEXT.load(tmp_path / "text.pt")
