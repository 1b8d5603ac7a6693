"""Texts of tokens, against llama.cpp's own pieces."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.llamacpp.token_text import TokenTexts
from edge_dtm.llamacpp.vocabulary import LlamaVocab

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
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{a} {b}" for a, b in [("h", "e"), ("l", "l")]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _same_as_llama(path: Path) -> TokenTexts:
    found = TokenTexts(path)
    with LlamaVocab(path) as vocabulary:
        assert len(found) == vocabulary.n_tokens
        for token in range(len(found)):
            assert found.piece(token) == vocabulary._piece(token), token
    return found


def test_sentencepiece(tiny_gguf: Path) -> None:
    found = _same_as_llama(tiny_gguf)
    with LlamaVocab(tiny_gguf) as vocabulary:
        text = "naïve 😀 abc"
        ids = vocabulary.encode(text, add_special=False)
    assert "".join(found.texts(ids)).removeprefix(" ") == text


def test_byte_level(bpe_gguf: Path) -> None:
    found = _same_as_llama(bpe_gguf)
    assert {found.piece(i) for i in range(256)} == {bytes([b]) for b in range(256)}


def test_a_character_of_several_tokens_belongs_to_the_last(tiny_gguf: Path) -> None:
    found = TokenTexts(tiny_gguf)
    bytes_of = [3 + b for b in "ï".encode()]  # <0x00> is token 3
    assert found.texts([*bytes_of, 3 + ord("x")]) == ["", "ï", "x"]
    assert found.texts(bytes_of[:1]) == ["\ufffd"]


def test_ids_beyond_the_vocabulary(tiny_gguf: Path) -> None:
    found = TokenTexts(tiny_gguf)
    n = len(found)
    assert found.texts([n, -5]) == [f"[{n}]", "[-5]"]
    for token in (n, -1):
        with pytest.raises(IndexError):
            found.piece(token)


def test_a_damaged_file(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:5000])
    with pytest.raises(EdgeDtmError, match="truncated"):
        TokenTexts(path)
