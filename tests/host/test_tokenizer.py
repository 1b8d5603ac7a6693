"""The checkpoint's tokenizer against llama.cpp with the vocabulary written for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import make_smollm2
import pytest

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import default_model_dir
from edge_dtm.data import packaged_records
from edge_dtm.host.checkpoint import pre_tokenizer
from edge_dtm.host.checkpoint.gguf_checkpoint import GgufTokenizer
from edge_dtm.host.checkpoint.hf_tokenizer import HfTokenizer
from edge_dtm.host.checkpoint.pre_tokenizer import (
    PROBE_TEXTS,
    tokenization_mismatches,
    write_head,
)
from edge_dtm.llamacpp.vocabulary import LlamaVocab

VOCAB_SIZE = 768
CHAT = [
    {"role": "user", "content": "What is  a\nlighthouse? 12345"},
    {"role": "assistant", "content": "A tower 🙂 with a lamp."},
    {"role": "user", "content": "Who don't need it?"},
]
PROMPTS = [r["prompt"] for r in packaged_records() if "prompt" in r]
CHATS = [r["messages"] for r in packaged_records() if "messages" in r]


def _write(path: Path, add: Callable[[gguf.GGUFWriter], None]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add(writer)
    write_head(writer)
    writer.close()
    return path


def _from_gguf(path: Path) -> GgufTokenizer:
    return GgufTokenizer(path, gguf.GGUFReader(path))


def _edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    data = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), "utf-8")


def _copied(source: Path, target: Path, *ignored: str) -> Path:
    """A copy without weights, free to be changed."""
    ignore = shutil.ignore_patterns("*.safetensors", *ignored)
    return Path(shutil.copytree(source, target, ignore=ignore))


@pytest.fixture
def sentencepiece_folder(tiny_llamas: Callable[[str], Path], tmp_path: Path) -> Path:
    return _copied(tiny_llamas("sentencepiece"), tmp_path / "hf")


@pytest.fixture
def bpe_folder(tiny_llamas: Callable[[str], Path], tmp_path: Path) -> Path:
    return _copied(tiny_llamas("bpe"), tmp_path / "hf")


@pytest.fixture(params=["sentencepiece", "sentencepiece_json", "bpe"])
def folder(
    request: pytest.FixtureRequest, tiny_llamas: Callable[[str], Path], tmp_path: Path
) -> Path:
    name = request.param.removesuffix("_json")
    ignored = ["tokenizer.model"] if request.param != name else []
    return _copied(tiny_llamas(name), tmp_path / "hf", *ignored)


def _fits(tokenizer: HfTokenizer, folder: Path, texts: Iterable[str]) -> Path:
    """The vocabulary as a GGUF, in which llama.cpp tokenizes the texts as the checkpoint does."""
    path = _write(folder / "vocab.gguf", tokenizer.add_metadata)
    assert tokenization_mismatches(tokenizer, path, [*PROBE_TEXTS, *texts]) == []
    with LlamaVocab(path) as vocab:
        assert vocab.n_tokens == tokenizer.vocab_size
        assert set(tokenizer.eos_ids) <= set(vocab.eos_ids())
    return path


def _chats_fit(tokenizer: HfTokenizer, folder: Path) -> Path:
    chats = [tokenizer.encode_chat(messages) for messages in [CHAT, *CHATS]]
    path = _fits(tokenizer, folder, [*PROMPTS, *(text for _, text in chats)])
    from_gguf = _from_gguf(path)
    assert [from_gguf.encode_chat(messages) for messages in [CHAT, *CHATS]] == chats
    assert [tokenizer.encode(text) for _, text in chats] == [ids for ids, _ in chats]
    assert not any(text.startswith("<s>") for _, text in chats)
    return path


@pytest.mark.parametrize("rows", [VOCAB_SIZE, VOCAB_SIZE + 32])
def test_llama_cpp_agrees_on_everything(folder: Path, tmp_path: Path, rows: int) -> None:
    tokenizer = HfTokenizer(folder, rows)
    path = _chats_fit(tokenizer, tmp_path)
    from_gguf = _from_gguf(path)
    for text in [*PROBE_TEXTS, *PROMPTS]:
        if "▁" not in text:  # SentencePiece cannot tell it from a space
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert from_gguf.decode(from_gguf.encode(text)) == text
    assert _write(tmp_path / "again.gguf", from_gguf.add_metadata).read_bytes() == path.read_bytes()


def test_chat_text_is_what_transformers_renders(folder: Path) -> None:
    from transformers import AutoTokenizer

    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    _, text = HfTokenizer(folder, VOCAB_SIZE).encode_chat(CHAT)
    assert rendered.removeprefix("<s>") == text


def test_no_fitting_pre_tokenizer_names_the_text(
    bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pre_tokenizer, "PRE_CANDIDATES", ("no-such-name", "deepseek-coder"))
    tokenizer = HfTokenizer(bpe_folder, VOCAB_SIZE)
    with pytest.raises(EdgeDtmError, match=r"the closest, deepseek-coder, .* texts differ: '"):
        _write(tmp_path / "v.gguf", tokenizer.add_metadata)


def test_class_named_in_the_config_does_not_change_tokenizer_json(
    bpe_folder: Path, tmp_path: Path
) -> None:
    folder = bpe_folder
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    _edit(
        folder,
        "tokenizer.json",
        pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, data["pre_tokenizer"]]},
    )
    _edit(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    tokenizer = HfTokenizer(folder, VOCAB_SIZE)
    assert len(tokenizer.encode("20242024")) == 8
    _fits(tokenizer, tmp_path, PROMPTS)


def test_added_tokens_of_a_sentencepiece_folder(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = sentencepiece_folder
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": VOCAB_SIZE + 1}))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    decoder = config["added_tokens_decoder"] | {
        str(VOCAB_SIZE): {"content": "<|im_end|>", "special": True}
    }
    _edit(folder, "tokenizer_config.json", added_tokens_decoder=decoder, eos_token="<|im_end|>")
    tokenizer = HfTokenizer(folder, VOCAB_SIZE + 4)
    assert tokenizer.eos_ids == (VOCAB_SIZE, 2)
    text = "one <tool> two<|im_end|>\n<|im_end|><tool>  x"
    assert {VOCAB_SIZE, VOCAB_SIZE + 1} <= set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    _fits(tokenizer, tmp_path, [text])


@pytest.mark.parametrize("adds", [True, False])
def test_bos_as_the_config_says(sentencepiece_folder: Path, tmp_path: Path, adds: bool) -> None:
    folder = sentencepiece_folder
    _edit(folder, "tokenizer_config.json", add_bos_token=adds)
    tokenizer = HfTokenizer(folder, VOCAB_SIZE)
    path = _fits(tokenizer, tmp_path, [])
    assert (tokenizer.encode("a")[0] == 1) is adds
    # Either way the template's own BOS is there exactly once.
    ids, text = tokenizer.encode_chat(CHAT)
    assert ids.count(1) == 1
    assert text.startswith("<s>") is not adds
    assert _from_gguf(path).encode_chat(CHAT) == (ids, text)


def test_template_without_bos_gets_the_one_the_tokenizer_adds(
    sentencepiece_folder: Path, tmp_path: Path
) -> None:
    folder = sentencepiece_folder
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}:")
    ids, text = HfTokenizer(folder, VOCAB_SIZE).encode_chat(CHAT)
    assert text == CHAT[0]["content"] + ":"
    assert ids[0] == 1


def test_template_errors_are_named(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = sentencepiece_folder
    template = folder / "chat_template.jinja"
    template.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(EdgeDtmError, match="roles must alternate"):
        HfTokenizer(folder, VOCAB_SIZE).encode_chat(CHAT)
    template.write_text("{{ messages[0]['content'] }}")
    _edit(folder, "tokenizer_config.json", add_eos_token=True)
    with pytest.raises(EdgeDtmError, match="does not encode to its tokens"):
        HfTokenizer(folder, VOCAB_SIZE).encode_chat(CHAT)
    template.unlink()
    _edit(folder, "tokenizer_config.json", chat_template=None)
    with pytest.raises(EdgeDtmError, match="no chat template"):
        HfTokenizer(folder, VOCAB_SIZE).encode_chat(CHAT)


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeDtmError, match="768 tokens, but the model only 700"):
        HfTokenizer(folder, 700)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EdgeDtmError, match="has no tokenizer"):
        HfTokenizer(empty, VOCAB_SIZE)
    (empty / "tokenizer.json").write_text("{}")
    with pytest.raises(EdgeDtmError, match=r"tokenizer\.json cannot be used"):
        HfTokenizer(empty, VOCAB_SIZE)


def test_ggufs_that_cannot_be_used(tmp_path: Path) -> None:
    bare = _write(tmp_path / "bare.gguf", lambda writer: None)
    with pytest.raises(EdgeDtmError, match=r"llama\.cpp cannot load the model"):
        _from_gguf(bare)


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    folder = default_model_dir()
    if not (folder / "tokenizer.json").is_file():
        assert make_smollm2.main([]) == 0
    rows = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    tokenizer = HfTokenizer(folder, rows)
    path = _chats_fit(tokenizer, tmp_path)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == "smollm"
