"""The vocabulary of a GGUF: ids of texts, and texts of ids."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.llamacpp.probe_model import LlamaShape, finish, llama_writer
from edge_dtm.llamacpp.vocabulary import LlamaVocab, tokenize

WORDS = ["Ġhello", "ĊĊ", "ðŁĺ", "naÃ¯ve", "<|im_start|>", "<0x41>"]


@pytest.fixture(scope="module")
def bpe_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary without a model that could be run."""
    import numpy as np

    path = tmp_path_factory.mktemp("bpe") / "bpe.gguf"
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *WORDS]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types[tokens.index("<|im_start|>")] = gguf.TokenType.CONTROL
    writer = llama_writer(path, LlamaShape(32, 1, 1, 1, 32, len(tokens), 64))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{a} {b}" for a, b in [("h", "e"), ("l", "l")]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    finish(writer)
    return path


def test_sentencepiece(tiny_gguf: Path) -> None:
    text = "naïve 😀 abc"
    with LlamaVocab(tiny_gguf) as vocabulary:
        ids = vocabulary.encode(text, add_special=False)
        assert "".join(vocabulary.texts(ids)).removeprefix(" ") == text


def test_byte_level(bpe_gguf: Path) -> None:
    with LlamaVocab(bpe_gguf) as vocabulary:
        assert {vocabulary._piece(i) for i in range(256)} == {bytes([b]) for b in range(256)}
        special = 256 + WORDS.index("<|im_start|>")
        assert vocabulary.texts([256, special]) == [" hello", "<|im_start|>"]


def test_texts_of_parts_of_a_character_and_of_ids_beyond(tiny_gguf: Path) -> None:
    bytes_of = [3 + b for b in "ï".encode()]  # <0x00> is token 3
    with LlamaVocab(tiny_gguf) as vocabulary:
        assert vocabulary.texts([*bytes_of, 3 + ord("x")]) == ["", "ï", "x"]
        assert vocabulary.texts(bytes_of[:1]) == ["\ufffd"]
        n = vocabulary.n_tokens
        assert vocabulary.texts([n, -5]) == [f"[{n}]", "[-5]"]


def test_tokenize(tiny_gguf: Path) -> None:
    bos, eos = 1, 2
    ids = tokenize(tiny_gguf, ["", "</s>", "é\n", "a b", "😀" * 1000])
    assert ids[:2] == [[bos], [bos, eos]]
    assert ids[2][-3:] == [3 + byte for byte in "é\n".encode()]
    assert ids[3][0] == bos and len(ids[3]) == 3
    assert len(ids[4]) > 4000
    with LlamaVocab(tiny_gguf) as vocabulary:
        assert vocabulary.encode("</s>", add_special=False) == [eos]


def test_a_damaged_file(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:5000])
    with pytest.raises(EdgeDtmError):
        LlamaVocab(path)
