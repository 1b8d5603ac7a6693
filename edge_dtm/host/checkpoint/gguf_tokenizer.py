"""The tokenizer inside a GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType

from edge_dtm.host.checkpoint.tokenizer import SPECIAL, Tokenizer
from edge_dtm.llamacpp.vocabulary import LlamaVocab

_KEYS = {"unk": "unknown", "pad": "padding"}


class GgufTokenizer(Tokenizer):
    """The tokenizer inside a GGUF, run by llama.cpp; its metadata is copied as it is.

    EdgeDtmError when the file holds no tokenizer, or one that llama.cpp refuses.
    """

    def __init__(self, path: Path, reader: gguf.GGUFReader) -> None:
        self._vocab = LlamaVocab(path)
        self._fields = {n: f for n, f in reader.fields.items() if n.startswith("tokenizer.")}
        self.vocab_size = self._vocab.n_tokens
        self.eos_ids = self._vocab.eos_ids()
        template = self._fields.get("tokenizer.chat_template")
        self.chat_template = template.contents() if template else None
        ids = {
            name: self._fields.get(f"tokenizer.ggml.{_KEYS.get(name, name)}_token_id")
            for name in SPECIAL
        }
        self.special = {
            f"{name}_token": self._token(-1 if field is None else field.contents())
            for name, field in ids.items()
        }
        self.added_bos = None
        bos = self._vocab.bos_id
        if bos is not None and self._vocab.adds_bos:
            self.special["bos_token"] = self.added_bos = self._token(bos)

    def _token(self, index: int) -> str:
        known = 0 <= index < self.vocab_size
        return str(self._fields["tokenizer.ggml.tokens"].contents(index)) if known else ""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return self._vocab.encode(text, add_special=add_special)

    def decode(self, ids: Sequence[int]) -> str:
        return self._vocab.decode(ids)

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Copy every tokenizer.* field with its type."""
        for name, field in self._fields.items():
            kind, inner = field.types[0], field.types[-1]
            if inner == GGUFValueType.STRING:  # which need not be UTF-8
                value: Any = [field.parts[i].tobytes() for i in field.data]
            else:
                value = field.contents()
            if kind == GGUFValueType.STRING:
                (value,) = value
            # The writer has no empty arrays; llama.cpp reads none the same.
            if kind != GGUFValueType.ARRAY or value:
                writer.add_key_value(name, value, kind, inner)
