"""The original's text and hidden states, and runs of both that were cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Made

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.distill import teacher as module
from edge_dtm.host.distill.teacher import (
    TeacherText,
    batches_by_length,
    padded,
    reference_sequences,
    sample_texts,
)
from edge_dtm.host.trajectory.prompts import Prompt


class _Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def starts(made: Made) -> list[Prompt]:
    ref = made.reference
    return [Prompt(tuple(ref.prompt(r)), str(ref.texts[r])) for r in range(len(ref))]


def test_reference_sequences_are_prompts_and_answers(made: Made) -> None:
    found = reference_sequences(made.reference)
    assert len(found) == len(made.reference)
    for row, ids in enumerate(found):
        assert ids == made.ids(row)[0].tolist()


def test_batches_hold_all_sequences_once_within_the_tokens() -> None:
    lengths = [5, 1, 9, 3, 3, 20, 2]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches = batches_by_length(lengths, order, 9)
    assert [i for b in batches for i in b] == order
    assert all(len(b) * max(lengths[i] for i in b) <= 9 for b in batches if len(b) > 1)
    assert [5] in batches  # longer than a batch, yet there
    assert padded([[4, 5], [6]]).tolist() == [[4, 5], [6, 0]]


def test_sampled_texts_are_reproducible_and_follow_the_model(
    made: Made, starts: list[Prompt], tmp_path: Path
) -> None:
    eos = made.checkpoint.tokenizer.eos_ids
    first = sample_texts(made.model, starts, 20, 16, 7, eos)
    again = sample_texts(made.model, starts, 20, 16, 7, eos, parts=tmp_path)
    assert first == again and len(first) == 20
    assert first != sample_texts(made.model, starts, 20, 16, 8, eos)
    heads = {s.ids[:4] for s in starts}
    for text in first:
        assert any(tuple(text[: len(h)]) == h for h in heads)
        assert len(text) <= 16 and not set(text[4:]) & set(eos)
    # Every start is used before one is used again.
    assert len({tuple(t[:4]) for t in first[: len(starts)]}) == len({s.ids[:4] for s in starts})
    # Draws follow the model's own distribution: far likelier than uniform ids.
    total = []
    for text in first:
        logits = made.model(input_ids=torch.tensor([text[:-1]])).logits[0].log_softmax(-1)
        total += logits.gather(1, torch.tensor(text[1:])[:, None])[3:, 0].tolist()
    assert np.mean(total) > -np.log(made.checkpoint.config.vocab) + 1


def test_sampling_ends_before_eos(made: Made, starts: list[Prompt]) -> None:
    every = range(made.checkpoint.config.vocab)
    for text in sample_texts(made.model, starts, 3, 16, 0, list(every)):
        assert len(text) <= 4
    assert sample_texts(made.model, [], 3, 16, 0, []) == []


def test_sampling_goes_on_after_a_kill(
    made: Made, starts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_SEQUENCES", 4)
    sampled: list[int] = []
    whole = sample_texts(made.model, starts, 12, 12, 7, [], progress=sampled.append)
    calls = 0

    def stop(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:  # in the second batch
            raise _Stopped

    with pytest.raises(_Stopped):
        sample_texts(made.model, starts, 12, 12, 7, [], parts=tmp_path, progress=stop)
    assert len(list(tmp_path.glob("*.json"))) == 1
    done: list[int] = []
    again = sample_texts(made.model, starts, 12, 12, 7, [], parts=tmp_path, progress=done.append)
    assert again == whole
    assert sum(done) == sum(sampled)
    # Parts of other arguments are not taken.
    other = sample_texts(made.model, starts, 12, 12, 8, [], parts=tmp_path)
    assert other == sample_texts(made.model, starts, 12, 12, 8, [])


def test_hidden_states_give_the_models_own_logits(made: Made, tmp_path: Path) -> None:
    sequences = [*reference_sequences(made.reference), [5], list(range(3, 40))]
    text = TeacherText(tmp_path, sequences, made.checkpoint.config.hidden)
    done: list[int] = []
    text.capture(made.model, done.append)
    assert sum(done) == text.tokens == sum(map(len, sequences))
    assert (tmp_path / "hidden.bin").stat().st_size == text.size_bytes
    head = made.model.lm_head.weight
    for row in (0, len(sequences) - 2, len(sequences) - 1):
        logits = made.model(input_ids=torch.tensor([sequences[row]])).logits[0]
        found = text.hidden_states([row]) @ head.T
        assert (found - logits).abs().max() < 2e-3 * logits.abs().max()
    both = text.hidden_states([1, 0])
    assert torch.equal(both[: text.lengths[1]], text.hidden_states([1]))
    text.remove()
    assert not tmp_path.exists()


def test_capture_goes_on_after_a_kill(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)
    sequences = reference_sequences(made.reference)
    hidden = made.checkpoint.config.hidden
    whole = TeacherText(tmp_path / "whole", sequences, hidden)
    whole.capture(made.model)

    def stop(_: int) -> None:
        raise _Stopped

    cut = TeacherText(tmp_path / "cut", sequences, hidden)
    with pytest.raises(_Stopped):
        cut.capture(made.model, stop)
    again = TeacherText(tmp_path / "cut", sequences, hidden)
    assert not again.captured
    with pytest.raises(EdgeDtmError, match="not complete"):
        again.hidden_states([0])
    done: list[int] = []
    again.capture(made.model, done.append)
    assert sum(done) == again.tokens
    rows = range(len(sequences))
    assert torch.equal(again.hidden_states(rows), whole.hidden_states(rows))
    # Another text in the same folder does not find these states.
    assert not TeacherText(tmp_path / "cut", sequences[:-1], hidden).captured


def test_errors_say_what_to_do(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EdgeDtmError, match="no text"):
        TeacherText(tmp_path, [[]], 4)
    text = TeacherText(tmp_path / "a", [[1, 2]], made.checkpoint.config.hidden)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("U", (), {"free": 10})())
    with pytest.raises(EdgeDtmError, match="free some space"):
        text.capture(made.model)
    monkeypatch.undo()
    text.capture(made.model)
    (tmp_path / "a" / "hidden.bin").write_bytes(b"short")
    with pytest.raises(EdgeDtmError, match="--no-resume"):
        text.hidden_states([0])
    (tmp_path / "a" / "teacher.json").write_text("{", encoding="utf-8")
    with pytest.raises(EdgeDtmError, match="damaged"):
        TeacherText(tmp_path / "a", [[1, 2]], made.checkpoint.config.hidden)
