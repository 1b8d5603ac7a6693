"""The runner against llama-cpp-python's own high-level API and against itself."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core import machine
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.metrics import divergent_mask, share_of_divergent_tokens
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import PADDING, TOP_K, Reference
from edge_dtm.llamacpp import runner
from edge_dtm.llamacpp.gguf_header import read_header
from edge_dtm.llamacpp.runner import LlamaRunner


def forced(path: Path, reference: Reference, **settings: int) -> Record:
    with LlamaRunner(path, RunSettings(**{"threads": 1, **settings}), 256) as llama:
        return llama.teacher_forced(reference)


def test_teacher_forcing_on_its_own_text_repeats_greedy(
    tiny_gguf: Path, tiny_greedy: tuple[Reference, Record]
) -> None:
    reference, greedy = tiny_greedy
    record = forced(tiny_gguf, reference)
    mask = divergent_mask(greedy.ids, record.ids, reference.generated_lengths)
    assert share_of_divergent_tokens(mask, reference.generated_lengths) < 0.01
    counted = record.ids != PADDING
    np.testing.assert_array_equal(counted.sum(axis=1), reference.generated_lengths)
    np.testing.assert_allclose(
        record.top_logits[counted], greedy.top_logits[counted], rtol=0, atol=0.05
    )
    assert len(np.unique(record.ids)) > 20, "the fixture should not repeat one token"


def test_greedy_feeds_what_it_chose(
    tiny_gguf: Path, tiny_reference: Reference, tiny_greedy: tuple[Reference, Record]
) -> None:
    """Its answer must not depend on the reference's ids."""
    other = dataclasses.replace(
        tiny_reference, generated_ids=np.where(tiny_reference.generated_ids >= 0, 5, PADDING)
    )
    with LlamaRunner(tiny_gguf, RunSettings(threads=1, batch_tokens=64), 256) as llama:
        record = llama.greedy(other)
    np.testing.assert_array_equal(record.ids, tiny_greedy[1].ids)
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
        assert sum(done) == runner.replay_tokens(tiny_reference)
        done.clear()
        llama.greedy(tiny_reference, done.append)
        assert sum(done) == runner.replay_tokens(tiny_reference)
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
    with pytest.raises(EdgeDtmError, match="not a record"):
        Record.load(tmp_path / "reference.npz")


def test_speed_is_measured(tiny_gguf: Path) -> None:
    with LlamaRunner(tiny_gguf, RunSettings(threads=1), 160) as llama:
        prefill, decode = llama.measure_speed()
        assert prefill > 0
        assert decode > 0
        with pytest.raises(EdgeDtmError, match="do not fit"):
            llama.measure_speed(200, 32)


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
    ("data", "message"),
    [
        ({"threads": 0}, "threads: is 0"),
        ({"threads": 1, "micro_batch_tokens": 0}, "micro_batch_tokens: is 0"),
        ({"threads": 1, "batch_tokens": 2**40}, "batch_tokens: is "),
        ({"threads": 1, "parallel_sequences": 65}, "parallel_sequences: is 65"),
        ({"threads": 1, "repack": 1}, "repack: is 1"),
        ({"threads": True}, "threads: is True"),
        ({"threads": "2"}, "threads: is '2'"),
        ({"threads": 1, "colour": 1}, "colour: is unknown"),
        ({}, "threads: is missing"),
    ],
)
def test_wrong_settings_are_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(EdgeDtmError, match=message):
        RunSettings.from_json(data)


def test_records_without_the_newer_settings_are_read() -> None:
    old = {"threads": 2, "batch_tokens": 64, "parallel_sequences": 1, "flash_attention": False}
    settings = RunSettings.from_json(old | {"kv_type": "F16"})
    assert settings == RunSettings(threads=2, batch_tokens=64, parallel_sequences=1)
    assert settings.repack


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
    for call in runner.calls(reference, batch_tokens, sequences):
        assert len({feed.slot for feed in call}) == len(call) <= sequences
        fresh = 0
        for row, slot, kept in call:
            tokens = reference.prompt(row) + reference.generated(row)[:-1]
            assert kept < len(reference.prompt(row)), "the logits behind the prompt are wanted"
            assert kept <= len(cache[slot])
            cache[slot] = cache[slot][:kept] + tokens[kept:]
            assert cache[slot] == tokens
            fresh += len(tokens) - kept
            rows.append(row)
        assert fresh <= batch_tokens or len(call) == 1
    assert sorted(rows) == list(range(len(reference)))


def test_a_shared_beginning_is_fed_once_a_slot(tiny_reference: Reference) -> None:
    many = tiny_reference.rows(np.array([1] * 9))
    first = int(many.prompt_lengths[0]) - 1
    kept = [feed.kept for call in runner.calls(many, 500, 2) for feed in call]
    assert kept == [0, 0] + [first] * 7


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


def test_the_room_that_settings_ask_for() -> None:
    settings = RunSettings(threads=1, batch_tokens=100, parallel_sequences=3, micro_batch_tokens=40)
    assert settings.cache_tokens(256) == 3 * 256
    assert settings.cache_tokens(257) == 3 * 512
    assert settings.logits_bytes(1000) == 4 * 1000 * 140
    few = RunSettings(threads=1, batch_tokens=2, parallel_sequences=3, micro_batch_tokens=40)
    assert few.sequences_per_call == 2 and few.logits_bytes(10) == 4 * 10 * 4


@given(
    st.lists(st.integers(-5, 5), min_size=TOP_K, max_size=3000),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_summarize_is_a_stable_sort(values: list[int], seed: int, spread: bool) -> None:
    logits = np.array(values, dtype=np.float32)
    if spread:
        logits += np.random.default_rng(seed).standard_normal(len(values)).astype(np.float32)
    ids, top, normalizer = runner.summarize(logits)
    order = np.argsort(-logits, kind="stable")[:TOP_K]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(top, logits[order])
    exact = np.log(np.exp(logits.astype(np.float64)).sum())
    assert normalizer == pytest.approx(exact, abs=1e-5)


def test_the_head_agrees_with_ggufs_own_reader(tiny_gguf: Path) -> None:
    import gguf

    header = read_header(tiny_gguf)
    reader = gguf.GGUFReader(tiny_gguf)
    assert [(t.name, t.shape, t.type, t.offset_bytes, t.size_bytes) for t in header.tensors] == [
        (t.name, tuple(map(int, t.shape)), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    assert header.architecture == "llama"
    for key, value in header.values.items():
        if not isinstance(value, tuple):
            assert value == pytest.approx(reader.fields[key].contents())
    assert header.integer("block_count") == 2
    assert header.integer("attention.key_length") is None
    assert "tokenizer.ggml.tokens" not in header.values


@given(st.data())
def test_a_damaged_head_is_refused_or_read(data: st.DataObject) -> None:
    good = _small_gguf()
    broken = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 9))
        kind = data.draw(st.sampled_from(["byte", "word", "cut"]))
        if kind == "byte":
            broken[at] = data.draw(st.integers(0, 255))
        elif kind == "word":
            number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
            broken[at : at + 8] = number.to_bytes(8, "little")
        else:
            del broken[-at - 1 :]
            break
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(broken)
        file.flush()
        try:
            header = read_header(Path(file.name))
        except EdgeDtmError as error:
            assert "\n" not in str(error)
        else:
            assert all(t.end_bytes <= len(broken) for t in header.tensors)


@cache
def _small_gguf() -> bytes:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_token_list(["a", "bc"])
        writer.add_block_count(2)
        writer.add_rope_scaling_factor(1.5)
        writer.add_tensor("t", np.zeros((2, 4), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


@pytest.mark.parametrize("count", [2**40, 2**64 - 1])
def test_no_count_keeps_the_reader_going(tmp_path: Path, count: int) -> None:
    """A file that promises more than it holds is refused before any loop over it."""
    path = tmp_path / "many.gguf"
    key = b"tokens"
    array = len(key).to_bytes(8, "little") + key + (9).to_bytes(4, "little")
    for head in (
        (1).to_bytes(8, "little") + count.to_bytes(8, "little"),
        count.to_bytes(8, "little") + (0).to_bytes(8, "little"),
        bytes(8) + (1).to_bytes(8, "little") + array + (8).to_bytes(4, "little")
        + count.to_bytes(8, "little"),
    ):  # fmt: skip
        path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + head + bytes(1000))
        with pytest.raises(EdgeDtmError, match="truncated or no GGUF"):
            read_header(path)


def test_checking_leaves_no_weights_in_memory(tiny_gguf: Path) -> None:
    """Its pages would count twice: once for the check and once for llama.cpp."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    runner.check_gguf(tiny_gguf)
    assert str(tiny_gguf) not in maps.read_text()


def test_summarize_takes_the_lowest_id_on_ties() -> None:
    logits = np.zeros(40, dtype=np.float32)
    logits[[30, 7, 21]] = [2, 2, 1]
    ids, values, normalizer = runner.summarize(logits)
    assert ids.tolist() == [7, 30, 21, 0, 1, 2, 3, 4]
    assert values.tolist() == [2, 2, 1, 0, 0, 0, 0, 0]
    assert normalizer == pytest.approx(math.log(2 * math.exp(2) + math.exp(1) + 37), abs=1e-6)
    logits[3] = np.nan
    with pytest.raises(EdgeDtmError, match="not finite"):
        runner.summarize(logits)


def test_tokenize(tiny_gguf: Path) -> None:
    bos, eos = 1, 2
    ids = runner.tokenize(tiny_gguf, ["", "</s>", "é\n", "a b"])
    assert ids[0] == [bos]
    assert ids[1] == [bos, eos]
    assert ids[2][-3:] == [3 + byte for byte in "é\n".encode()]
    assert ids[3][0] == bos
    assert len(ids[3]) == 3
    assert runner.tokenize(tiny_gguf, ["", "</s>"], add_special=False) == [[], [eos]]
    assert runner.tokenize(tiny_gguf, []) == []
    long = runner.tokenize(tiny_gguf, ["😀" * 1000])[0]
    assert len(long) > 4000


def test_whole_files_pass_the_check(tiny_gguf: Path) -> None:
    runner.check_gguf(tiny_gguf)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.003, 0.1, 0.5, 0.9999])
def test_truncated_gguf(tiny_gguf: Path, tmp_path: Path, share: float) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(EdgeDtmError) as caught:
        runner.check_gguf(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_foreign_files(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "foreign.gguf"
    data = tiny_gguf.read_bytes()
    for content, message in [
        (b"PK\3\4" + bytes(100), "no GGUF file"),
        (data[:4] + b"\2\0\0\0" + data[8:], "version 3"),
        (data[:4] + b"\0\0\0\3" + data[8:], "version 3"),
        (data.replace(b"llama", b"bloom"), "architecture 'bloom'"),
        (data[:8] + b"\xff" * 16 + data[24:], "truncated or no GGUF"),
    ]:
        path.write_bytes(content)
        with pytest.raises(EdgeDtmError, match=message):
            runner.check_gguf(path)
    with pytest.raises(EdgeDtmError, match="cannot read"):
        runner.check_gguf(tmp_path / "absent.gguf")


def test_llama_cpp_says_why_it_cannot_load(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "foreign.gguf"
    path.write_bytes(b"not a model, not a model")
    with pytest.raises(EdgeDtmError, match=r"cannot load the model \(.*magic"):
        LlamaRunner(path, RunSettings(threads=1), 32)
    with pytest.raises(EdgeDtmError, match="cannot load the model"):
        runner.tokenize(path, ["a"])
    assert capfd.readouterr() == ("", "")
    with pytest.raises(EdgeDtmError, match="no GGML type"):
        LlamaRunner(path, RunSettings(threads=1, kv_type="F15"), 32)


def test_log_is_shown_when_asked_for(tiny_gguf: Path) -> None:
    code = "import sys; from edge_dtm.llamacpp.runner import tokenize; tokenize(sys.argv[1], ['a'])"
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


def test_other_weights_give_another_answer(
    make_tiny_gguf: Callable[[Path, int], None], tiny_reference: Reference, tmp_path: Path
) -> None:
    make_tiny_gguf(tmp_path / "other.gguf", 1)
    record = forced(tmp_path / "other.gguf", tiny_reference)
    mask = divergent_mask(
        tiny_reference.generated_ids, record.ids, tiny_reference.generated_lengths
    )
    assert share_of_divergent_tokens(mask, tiny_reference.generated_lengths) > 0.5


def test_machine_facts() -> None:
    assert 10 * 2**20 < machine.peak_rss_bytes() < 2**40
    info = runner.runtime_info()
    assert info["llama_cpp_python"]
    assert info["system_info"]
    assert info["cpus"] >= machine.default_threads() >= 1
