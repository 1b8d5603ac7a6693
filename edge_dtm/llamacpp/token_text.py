"""Texts of token ids, by the vocabulary inside a GGUF file.

A byte-level BPE vocabulary ("gpt2") writes each byte as a printable character, by the map of
OpenAI's encoder.py (bytes_to_unicode); a SentencePiece one ("llama") writes a space as ▁ and a
byte as <0xNN>. One character may take several tokens, so pieces are bytes.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.llamacpp.runner import check_gguf

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # gguf.TokenType
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """The vocabulary of a GGUF. EdgeDtmError when the file is damaged or has none that is known."""

    def __init__(self, path: Path) -> None:
        check_gguf(path)
        import gguf

        try:
            reader = gguf.GGUFReader(path)
            model = reader.get_field("tokenizer.ggml.model")
            self._tokens: Any = reader.get_field("tokenizer.ggml.tokens")
            self._types: Any = reader.get_field("tokenizer.ggml.token_type")
            self.model = model.contents() if model is not None else None
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise EdgeDtmError(f"gguf cannot read {path} ({error}): make it again") from None
        if self._tokens is None or self.model not in ("llama", "gpt2"):
            raise EdgeDtmError(
                f"{path} has a tokenizer of the kind {self.model!r}, needed is llama or gpt2"
            )

    def __len__(self) -> int:
        return len(self._tokens.data)

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for, special tokens spelled out. IndexError beyond the
        vocabulary."""
        if not 0 <= token < len(self):
            raise IndexError(f"token {token} of {len(self)}")
        raw: bytes = self._tokens.parts[self._tokens.data[token]].tobytes()
        kind = None
        if self._types is not None and token < len(self._types.data):
            kind = int(self._types.contents(token))
        text = raw.decode("utf-8", "replace")
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            return raw
        if self.model == "gpt2":
            return _from_byte_characters(text)
        byte = _BYTE_PIECE.fullmatch(text)
        if byte and kind in (None, _BYTE):
            return bytes([int(byte[1], 16)])
        return text.replace("▁", " ").encode()

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """One text a token, which joined are the whole: a character that takes several tokens
        belongs to its last one. An id beyond the vocabulary is shown as a number."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        out = []
        for i, token in enumerate(tokens):
            piece = self.piece(token) if 0 <= token < len(self) else f"[{token}]".encode()
            out.append(decoder.decode(piece, final=i == len(tokens) - 1))
        return out


def _from_byte_characters(text: str) -> bytes:
    table = _byte_of_character()
    # A character outside the map can only be an added token's.
    return b"".join(
        bytes([table[ch]]) if ch in table else ch.encode("utf-8", "replace") for ch in text
    )


@cache
def _byte_of_character() -> dict[str, int]:
    """Printable bytes of Latin-1 stand for themselves, the others for U+0100 and up in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
