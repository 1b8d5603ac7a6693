"""The greedy reference against transformers' generate, and prompts from files."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Made

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.reference import (
    CALIBRATION,
    EXTRA,
    HELD_OUT,
    PACKAGED,
    PADDING,
    TOP_K,
    Reference,
)
from edge_dtm.host.checkpoint.derived import DerivedCheckpoint
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.checkpoint.tokenizer import Tokenizer
from edge_dtm.host.trajectory import decode
from edge_dtm.host.trajectory import generate as module
from edge_dtm.host.trajectory.decode import Decoding, sequences_at_once
from edge_dtm.host.trajectory.generate import check_lengths, generate_reference, signed_margins
from edge_dtm.host.trajectory.prompts import Prompt, packaged_prompts, read_prompts, sample_prefixes
from edge_dtm.host.trajectory.reference import split_prompts

TOKENS = 32
TEXTS = [
    "The baker went to the market, and there she met an old friend who had",
    "Anna",
    "def count_items(items):",
    "Once upon a time, in a quiet village by the sea, there lived a carpenter. One day",
    "1. Wash the",
    "The weather in Oslo",
    "Dear Clara,",
    "{",
    "What is two plus two?",
]


@pytest.fixture(scope="session")
def model(made: Made) -> Llama:
    return made.llama


@pytest.fixture(scope="session")
def tokenizer(made: Made) -> Tokenizer:
    return made.checkpoint.tokenizer


@pytest.fixture(scope="session")
def prompts(tokenizer: Tokenizer) -> list[Prompt]:
    return [Prompt(tuple(tokenizer.encode(t)), t) for t in TEXTS]


def _reference(
    model: Llama, prompts: list[Prompt], eos: tuple[int, ...], parts: Path, **options: Any
) -> Reference:
    return generate_reference(
        model,
        prompts,
        tokens=TOKENS,
        eos_ids=eos,
        split=np.full(len(prompts), CALIBRATION, np.uint8),
        provenance={"model": "tiny"},
        parts=parts,
        **options,
    )


@pytest.fixture(scope="session")
def reference(
    model: Llama, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "BATCH_SEQUENCES", 4)
        return _reference(model, prompts, (), tmp_path_factory.mktemp("generate") / "parts")


def test_same_tokens_as_transformers_one_by_one(
    reference: Reference, prompts: list[Prompt], trained_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(trained_folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    same = 0
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )[0, len(prompt.ids) :].numpy()
        assert reference.prompt(row) == list(prompt.ids)
        different = np.flatnonzero(reference.generated_ids[row] != out)
        if different.size:  # only a tie may go the other way
            assert reference.margins[row, different[0]] < 1e-3
        same += different.size == 0
    assert same >= len(prompts) - 1


@pytest.mark.parametrize("name", ["bias_rope", "bpe", "mistral"])
def test_prompts_of_other_lengths_go_on_side_by_side(
    tiny_llamas: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Logits of every step against transformers' on each sequence alone, whatever memory held."""
    from transformers import AutoModelForCausalLM

    folder = tiny_llamas(name)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [30], [12, 400, 13]]
    model = Llama(open_checkpoint(folder), torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda shape, **named: torch.full(shape, torch.nan, **named))
        decoding = Decoding(model, prompts, 6)
    for _ in range(6):
        with torch.no_grad():
            logits = torch.stack(
                [theirs(input_ids=torch.tensor([p])).logits[0, -1] for p in prompts]
            )
        assert torch.allclose(decoding.logits, logits, atol=1e-4)
        chosen = decoding.logits.argmax(-1)
        decoding.step(chosen)
        prompts = [[*p, int(i)] for p, i in zip(prompts, chosen, strict=True)]


def test_keys_and_values_bound_the_batch(made: Made) -> None:
    c = made.config
    each = c.layers * c.kv_heads * c.head_dim * 2 * 4
    assert sequences_at_once(c, 1) == decode.BATCH_SEQUENCES
    assert sequences_at_once(c, decode.CACHE_BYTES // each // 5) == 5
    assert sequences_at_once(c, 10 * decode.CACHE_BYTES) == 1


def test_logits_and_normalizers_are_the_models(reference: Reference, made: Made) -> None:
    assert len(set(reference.prompt_lengths.tolist())) > 3  # so that padding is at work
    for row in range(len(reference)):
        ids = torch.tensor([(reference.prompt(row) + reference.generated(row))[:-1]])
        with torch.no_grad():
            logits = made.model(input_ids=ids, use_cache=False).logits[0]
        logits = logits[reference.prompt_lengths[row] - 1 :]
        assert len(logits) == reference.generated_lengths[row] == TOKENS
        values, indices = logits.topk(TOP_K)
        assert np.allclose(reference.top_logits[row], values.numpy(), atol=1e-3)
        assert np.allclose(reference.log_normalizers[row], logits.logsumexp(-1).numpy(), atol=1e-3)
        assert (reference.top_ids[row] == indices.numpy()).mean() > 0.99
        assert np.array_equal(reference.top_ids[row, :, 0], reference.generated_ids[row])


def test_eos_ends_a_sequence_and_counts(
    reference: Reference, model: Llama, prompts: list[Prompt], tmp_path: Path
) -> None:
    eos = (int(reference.generated_ids[0, 7]), int(reference.generated_ids[3, 2]))
    counted: list[int] = []
    stopped = _reference(model, prompts, eos, tmp_path / "parts", progress=counted.append)
    assert sum(counted) == stopped.generated_lengths.sum()
    for row, n in enumerate(stopped.generated_lengths.tolist()):
        ends = np.flatnonzero(np.isin(reference.generated_ids[row], eos))
        assert n == (ends[0] + 1 if ends.size else TOKENS)
        assert np.array_equal(stopped.generated_ids[row, :n], reference.generated_ids[row, :n])
        assert (stopped.generated_ids[row, n:] == PADDING).all()
        assert (stopped.top_ids[row, n:] == PADDING).all()
        assert np.allclose(stopped.top_logits[row, :n], reference.top_logits[row, :n], atol=1e-3)
        assert not stopped.top_logits[row, n:].any()
    assert stopped.generated_lengths.min() < TOKENS


def test_goes_on_with_the_parts_that_are_there(
    reference: Reference,
    model: Llama,
    prompts: list[Prompt],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "BATCH_SEQUENCES", 4)
    decoded: list[int] = []
    real = module._decode
    monkeypatch.setattr(
        module, "_decode", lambda *given: (decoded.append(len(given[1])), real(*given))[1]
    )
    for expected in ([4, 4, 1], [4]):
        again = _reference(model, prompts, (), tmp_path)
        for field in dataclasses.fields(reference):
            a, b = getattr(again, field.name), getattr(reference, field.name)
            assert np.array_equal(a, b), field.name
        assert decoded == expected
        decoded.clear()
        files = sorted(tmp_path.iterdir())
        assert len(files) == 3
        files[1].unlink()


def test_split_is_drawn_by_the_seed() -> None:
    a, b, c = ([Prompt((first, i), "") for i in range(30)] for first in range(3))
    prompts, split = split_prompts([*a, *a], [*a[:5], *b], [*b, *c], 5)
    assert prompts == [*a, *b, *c]
    assert Counter(split[:30].tolist()) == {HELD_OUT: 20, CALIBRATION: 10}
    assert (split[30:60] == EXTRA).all() and (split[60:] == PACKAGED).all()
    assert np.array_equal(split, split_prompts(a, b, c, 5)[1])
    assert not np.array_equal(split, split_prompts(a, b, c, 6)[1])


def test_too_long_prompts_are_named(prompts: list[Prompt]) -> None:
    longest = max(len(p.ids) for p in prompts)
    check_lengths(prompts, 10, longest + 10)
    with pytest.raises(EdgeDtmError, match="1 prompts do not fit the context of .* number 4 with"):
        check_lengths(prompts, 10, longest + 9)


def test_sampled_prompts_encode_to_themselves(
    model: Llama, tokenizer: Tokenizer, prompts: list[Prompt]
) -> None:
    prefixes = sample_prefixes(model, tokenizer, prompts, 6, seed=0)
    assert 3 <= len(prefixes) <= 6
    assert all(tuple(tokenizer.encode(p.text)) == p.ids for p in prefixes)
    assert prefixes == sample_prefixes(model, tokenizer, prompts, 6, seed=0)
    assert prefixes != sample_prefixes(model, tokenizer, prompts, 6, seed=1)
    assert sample_prefixes(model, tokenizer, [], 6, seed=0) == []


def _write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_text_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = ["one", "two  spaces ", "", "ünï 😀", '{"prompt": "not JSON here"}', "one"]
    read = read_prompts(_write(tmp_path / "p.txt", *lines), tokenizer)
    assert [p.text for p in read] == ["one", "two  spaces ", "ünï 😀", lines[4]]
    assert all(p.ids == tuple(tokenizer.encode(p.text)) for p in read)


def test_jsonl(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As Windows writes it too."""
    messages = [{"role": "user", "content": "Hello"}]
    records: list[Any] = [{"prompt": "one\ntwo"}, {"messages": messages}, {"prompt": "x", "id": 3}]
    records.append({"prompt": "a\u2028b\x85c\x0cd"})  # line ends for str.splitlines, not for JSON
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    path = _write(tmp_path / "p.jsonl", *lines)
    read = read_prompts(path, tokenizer)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_prompts(path, tokenizer) == read
    ids, text = tokenizer.encode_chat(messages)
    assert [p.text for p in read] == ["one\ntwo", text, "x", records[3]["prompt"]]
    assert list(read[1].ids) == ids


def test_bad_lines_are_listed_with_their_numbers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bad = ["{broken", "[1]", '{"prompt": 3}', '{"messages": [{"role": "user"}]}']
    lines = ['{"prompt": "fine"}', "", *bad, '{"prompt": "\\ud800"}']
    with pytest.raises(EdgeDtmError) as caught:
        read_prompts(_write(tmp_path / "p.jsonl", *lines), tokenizer)
    text = str(caught.value)
    assert "\n" not in text and "p.jsonl" in text
    assert all(f"line {n}: " in text for n in (3, 4, 5))
    assert "5 bad prompts" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "at least 4 are needed"),
        (b"a\nb\nc\na\n", "at least 4 are needed"),
        (b"na\xefve\n" * 5, "cannot be read as UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_used(
    tokenizer: Tokenizer, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EdgeDtmError, match=words):
        read_prompts(path, tokenizer)


def test_chats_need_a_template(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_template = packaged_prompts(tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    line = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    with pytest.raises(EdgeDtmError, match="line 1: .*no chat template"):
        read_prompts(_write(tmp_path / "p.jsonl", line), tokenizer)
    without = packaged_prompts(tokenizer)
    assert len(without) == len(with_template)
    assert not any("[INST]" in p.text for p in without)


class _Other(DerivedCheckpoint):
    """One that prefers other tokens here and there."""

    def _read(self, name: str) -> Any:
        data = self.original.hf_tensor(name)
        if "ffn_up" not in name:
            return data
        noise = np.random.default_rng(len(name)).standard_normal(data.shape, np.float32)
        return data + 0.5 * data.std() * noise


def test_signed_margins_are_their_definition(made: Made) -> None:
    model, ref = Llama(_Other(made.checkpoint, None), torch.device("cpu")), made.reference
    margins = signed_margins(model, ref)
    for row in range(len(ref)):
        (hidden,) = model.final_hidden([made.ids(row)[0].tolist()])
        logits = model.logits(hidden).numpy()
        at, n = logits[made.positions(row)], ref.generated_lengths[row]
        token = np.array(ref.generated(row))
        own = at[np.arange(n), token]
        at[np.arange(n), token] = -np.inf
        assert np.allclose(margins[row, :n], own - at.max(-1), atol=1e-4)
        assert not margins[row, n:].any()
    assert 0 < np.mean(margins < 0) < 1
