"""The runner against llama-cpp-python's own high-level API and against itself."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.metrics import divergent_mask, share_of_divergent_tokens
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import PADDING, TOP_K, Reference
from edge_dtm.llamacpp import schedule
from edge_dtm.llamacpp.runner import LlamaRunner, summarize


def forced(path: Path, reference: Reference, **settings: int) -> Record:
    with LlamaRunner(path, RunSettings(**{"threads": 1, **settings}), 256) as llama:
        return llama.teacher_forced(reference)


def test_teacher_forcing_on_its_own_text_repeats_greedy(
    tiny_gguf: Path, tiny_reference: Reference
) -> None:
    record = forced(tiny_gguf, tiny_reference)
    lengths = tiny_reference.generated_lengths
    mask = divergent_mask(tiny_reference.generated_ids, record.ids, lengths)
    assert share_of_divergent_tokens(mask, lengths) < 0.01
    counted = record.ids != PADDING
    np.testing.assert_array_equal(counted.sum(axis=1), lengths)
    np.testing.assert_allclose(
        record.top_logits[counted], tiny_reference.top_logits[counted], rtol=0, atol=0.05
    )
    assert len(np.unique(record.ids)) > 20, "the fixture should not repeat one token"


def test_greedy_feeds_what_it_chose(tiny_gguf: Path, tiny_reference: Reference) -> None:
    """Its answer must not depend on the reference's ids."""
    other = dataclasses.replace(
        tiny_reference, generated_ids=np.where(tiny_reference.generated_ids >= 0, 5, PADDING)
    )
    with LlamaRunner(tiny_gguf, RunSettings(threads=1, batch_tokens=64), 256) as llama:
        record = llama.greedy(other)
    np.testing.assert_array_equal(record.ids, tiny_reference.generated_ids)
    assert np.isnan(record.reference_log_probabilities).all()
    assert record.decode_tokens_per_s > 0
    assert record.prefill_tokens_per_s > 0


def test_logits_are_those_of_the_high_level_api(tiny_gguf: Path, tiny_reference: Reference) -> None:
    import llama_cpp

    record = forced(tiny_gguf, tiny_reference)
    llama = llama_cpp.Llama(
        str(tiny_gguf), n_ctx=256, n_threads=1, n_gpu_layers=0, logits_all=True, verbose=False
    )
    for row in range(len(tiny_reference)):
        prompt, generated = tiny_reference.prompt(row), tiny_reference.generated(row)
        llama.reset()
        llama.eval(prompt + generated[:-1])
        logits = llama.scores[len(prompt) - 1 : len(prompt) + len(generated) - 1]
        logits = logits.astype(np.float64)
        n = len(generated)
        normalizers = np.log(np.exp(logits).sum(axis=1))
        np.testing.assert_array_equal(record.ids[row, :n], logits.argmax(axis=1))
        top = np.sort(logits, axis=1)[:, ::-1][:, :TOP_K]
        np.testing.assert_allclose(record.top_logits[row, :n], top, rtol=0, atol=1e-2)
        np.testing.assert_allclose(record.log_normalizers[row, :n], normalizers, rtol=0, atol=1e-2)
        np.testing.assert_allclose(
            record.reference_log_probabilities[row, :n],
            logits[np.arange(n), generated] - normalizers,
            rtol=0,
            atol=1e-2,
        )
    llama.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_tokens": 16},
        {"parallel_sequences": 1},
        {"parallel_sequences": 3},
        {"parallel_sequences": 64, "batch_tokens": 200},
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 7},
        {"repack": False},
    ],
)
def test_chunks_and_parallel_sequences_do_not_change_the_answer(
    tiny_gguf: Path, tiny_reference: Reference, settings: dict[str, int]
) -> None:
    whole = forced(tiny_gguf, tiny_reference)
    other = forced(tiny_gguf, tiny_reference, **settings)
    np.testing.assert_array_equal(other.ids, whole.ids)
    np.testing.assert_allclose(other.top_logits, whole.top_logits, rtol=0, atol=0.05)


def test_progress_adds_up_and_observe_sees_every_position(
    tiny_gguf: Path, tiny_reference: Reference
) -> None:
    done: list[int] = []
    seen = np.full(tiny_reference.generated_ids.shape, PADDING)

    def observe(row: int, position: int, logits: np.ndarray) -> None:
        seen[row, position] = logits.argmax()

    with LlamaRunner(tiny_gguf, RunSettings(threads=1, batch_tokens=16), 256) as llama:
        record = llama.teacher_forced(tiny_reference, done.append, observe)
        assert sum(done) == schedule.replay_tokens(tiny_reference)
        done.clear()
        llama.greedy(tiny_reference, done.append)
        assert sum(done) == schedule.replay_tokens(tiny_reference)
    np.testing.assert_array_equal(seen, record.ids)
    assert math.isnan(record.decode_tokens_per_s)


def test_record_survives_saving(tiny_gguf: Path, tiny_reference: Reference, tmp_path: Path) -> None:
    record = forced(tiny_gguf, tiny_reference)
    record.save(tmp_path / "host.npz", {"machine": "here"})
    loaded = Record.load(tmp_path / "host.npz")
    for item in dataclasses.fields(Record):
        if item.name != "meta":
            np.testing.assert_equal(getattr(loaded, item.name), getattr(record, item.name))
    assert loaded.meta == {"machine": "here"}
    assert RunSettings.from_json(loaded.settings) == RunSettings(threads=1)
    tiny_reference.save(tmp_path / "reference.npz")
    with pytest.raises(EdgeDtmError, match="no record"):
        Record.load(tmp_path / "reference.npz")


def test_speed_is_measured(tiny_gguf: Path) -> None:
    with LlamaRunner(tiny_gguf, RunSettings(threads=1), 160) as llama:
        timing = llama.time_decoding(128, 32)
        assert timing.prefill_tokens_per_s > 0 and timing.decode_tokens_per_s > 0
        assert len(timing.decode_s) == 32
        with pytest.raises(EdgeDtmError, match="do not fit"):
            llama.time_decoding(200, 32)


def test_what_does_not_fit_is_refused(tiny_gguf: Path, tiny_reference: Reference) -> None:
    with LlamaRunner(tiny_gguf, RunSettings(threads=1), 40) as llama:
        with pytest.raises(
            EdgeDtmError, match=r"sequences do not fit the context of 40 .*number 2"
        ):
            llama.teacher_forced(tiny_reference)
        ids = tiny_reference.generated_ids.copy()
        ids[2, 3] = llama.n_vocab
        wrong = dataclasses.replace(tiny_reference, generated_ids=ids).rows(np.array([2]))
        with pytest.raises(EdgeDtmError, match="outside the vocabulary"):
            llama.teacher_forced(wrong)
        llama.close()
        llama.close()


@pytest.mark.parametrize(
    ("data", "offender"),
    [
        ({"threads": 0}, "threads"),
        ({"threads": True}, "threads"),
        ({"threads": 1, "batch_tokens": 2**40}, "batch_tokens"),
        ({"threads": 1, "parallel_sequences": 65}, "parallel_sequences"),
        ({"threads": 1, "colour": 1}, "colour"),
        ({}, "threads"),
    ],
)
def test_wrong_settings_are_refused(data: dict[str, object], offender: str) -> None:
    with pytest.raises(EdgeDtmError, match=f"{offender}: is "):
        RunSettings.from_json(data)


def test_sequences_that_share_the_cache_answer_as_alone(
    tiny_gguf: Path, tiny_reference: Reference
) -> None:
    many = tiny_reference.rows(np.array([1, 0, 1, 5, 1, 1, 2, 0]))
    alone = [forced(tiny_gguf, many.rows(np.array([row]))) for row in range(len(many))]
    with LlamaRunner(tiny_gguf, RunSettings(threads=1, parallel_sequences=2), 256) as llama:
        # Twice: the second run finds the cache full of the first.
        for record in (llama.teacher_forced(many), llama.teacher_forced(many)):
            for row, one in enumerate(alone):
                n = int(many.generated_lengths[row])
                np.testing.assert_array_equal(record.ids[row, :n], one.ids[0, :n])
                np.testing.assert_allclose(
                    record.top_logits[row, :n], one.top_logits[0, :n], rtol=0, atol=0.05
                )


@given(
    st.lists(st.integers(-5, 5), min_size=TOP_K, max_size=3000),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_summarize_is_a_stable_sort(values: list[int], seed: int, spread: bool) -> None:
    logits = np.array(values, dtype=np.float32)
    if spread:
        logits += np.random.default_rng(seed).standard_normal(len(values)).astype(np.float32)
    ids, top, normalizer = summarize(logits)
    order = np.argsort(-logits, kind="stable")[:TOP_K]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(top, logits[order])
    exact = np.log(np.exp(logits.astype(np.float64)).sum())
    assert normalizer == pytest.approx(exact, abs=1e-5)


def test_summarize_takes_the_lowest_id_on_ties() -> None:
    logits = np.zeros(40, dtype=np.float32)
    logits[[30, 7, 21]] = [2, 2, 1]
    ids, values, normalizer = summarize(logits)
    assert ids.tolist() == [7, 30, 21, 0, 1, 2, 3, 4]
    assert values.tolist() == [2, 2, 1, 0, 0, 0, 0, 0]
    assert normalizer == pytest.approx(math.log(2 * math.exp(2) + math.exp(1) + 37), abs=1e-6)
    logits[3] = np.nan
    with pytest.raises(EdgeDtmError, match="not finite"):
        summarize(logits)


def test_llama_cpp_says_why_it_cannot_load(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "foreign.gguf"
    path.write_bytes(b"not a model, not a model")
    with pytest.raises(EdgeDtmError, match=r"cannot load the model \(.*magic"):
        LlamaRunner(path, RunSettings(threads=1), 32)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(EdgeDtmError, match="no GGML type"):
        LlamaRunner(path, RunSettings(threads=1, kv_type="F15"), 32)


def test_log_is_shown_when_asked_for(tiny_gguf: Path) -> None:
    code = "import sys; from edge_dtm.llamacpp.vocabulary import tokenize; tokenize(sys.argv[1], ['a'])"
    for value, shown in (("1", True), ("0", False)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tiny_gguf)],
            env={"EDGE_DTM_LLAMA_LOG": value, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("llama_model_loader" in done.stderr) is shown
        assert done.stdout == ""
