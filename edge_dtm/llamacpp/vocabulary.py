"""The tokenizer of a GGUF as llama.cpp runs it, without loading any weights."""

from __future__ import annotations

import codecs
import ctypes
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from edge_dtm.llamacpp import llama

# enum llama_token_attr: unknown, control, user-defined; text is split at such tokens.
_SPLITTING = 1 | 8 | 16


class LlamaVocab(AbstractContextManager["LlamaVocab"]):
    """A GGUF's vocabulary in llama.cpp; a context manager, or call `close`.

    pre: a value of tokenizer.ggml.pre to use instead of the file's. EdgeDtmError when llama.cpp
    refuses the file, with its own words.
    """

    def __init__(self, path: Path, *, pre: str | None = None) -> None:
        self._lib: Any = llama.library()
        model = llama.load_model(path, vocab_only=True, pre=pre)
        self._free = weakref.finalize(self, self._lib.llama_model_free, model)
        self._vocab = self._lib.llama_model_get_vocab(model)
        self.n_tokens: int = int(self._lib.llama_vocab_n_tokens(self._vocab))

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the vocabulary; harmless when done before."""
        self._free()

    @property
    def bos_id(self) -> int | None:
        """The BOS token, or None without one."""
        token = int(self._lib.llama_vocab_bos(self._vocab))
        return token if token >= 0 else None

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` puts BOS first."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    def eos_ids(self) -> tuple[int, ...]:
        """Every token at which llama.cpp ends a generation, rising."""
        is_eog = self._lib.llama_vocab_is_eog
        return tuple(i for i in range(self.n_tokens) if is_eog(self._vocab, i))

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; special tokens in the text are parsed, BOS and EOS added as the file says."""
        data = text.encode()
        room = len(data) + 8
        while True:
            ids = (self._lib.llama_token * room)()
            count = self._lib.llama_tokenize(
                self._vocab, data, len(data), ids, room, add_special, True
            )
            if count >= 0:
                return list(ids[:count])
            room = -count

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled out, less a BOS that `encode` would add."""
        # Not llama_detokenize: it drops spaces before punctuation, and keeps the space prefix
        # behind a BOS.
        prefix = b"".join(map(self._piece, self.encode("x", add_special=False))).startswith(b" ")
        out: list[bytes] = []
        after_special = True
        rest = ids[1:] if self.adds_bos and len(ids) and ids[0] == self.bos_id else ids
        for token in rest:
            piece = self._piece(token)
            special = bool(self._lib.llama_vocab_get_attr(self._vocab, token) & _SPLITTING)
            if prefix and after_special and not special:
                piece = piece.removeprefix(b" ")
            out.append(piece)
            after_special = special
        return b"".join(out).decode("utf-8", errors="replace")

    def _piece(self, token: int, room: int = 64) -> bytes:
        buffer = ctypes.create_string_buffer(room)
        count = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, True)
        # A negative count is the room that it needs.
        return buffer.raw[:count] if count >= 0 else self._piece(token, -count)

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """One text a token, which joined are the whole.

        A character that takes several tokens belongs to its last one. An id beyond the vocabulary
        is shown as a number.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        known = range(self.n_tokens)
        pieces = [self._piece(t) if t in known else f"[{t}]".encode() for t in tokens]
        return [decoder.decode(p, final=i == len(pieces) - 1) for i, p in enumerate(pieces)]


def tokenize(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text by the GGUF's own vocabulary, with the BOS and EOS it asks for."""
    with LlamaVocab(path) as vocabulary:
        return [vocabulary.encode(text) for text in texts]
