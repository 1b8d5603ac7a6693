"""The tokenizer inside a GGUF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.chat_template import encode_chat_with
from edge_dtm.host.checkpoint.tokenizer import Message
from edge_dtm.llamacpp.vocabulary import LlamaVocab


class GgufTokenizer:
    """The tokenizer inside a GGUF, run by llama.cpp; its metadata is copied as it is."""

    def __init__(self, vocab: LlamaVocab, fields: Mapping[str, Any]) -> None:
        self._vocab = vocab
        self._fields = fields
        self.vocab_size = vocab.n_tokens
        self.eos_ids = vocab.eos_ids()

    @classmethod
    def from_gguf(cls, path: Path) -> GgufTokenizer:
        """EdgeDtmError when the file holds no tokenizer, or one that llama.cpp refuses."""
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as error:
            raise EdgeDtmError(f"{path} cannot be read as GGUF: {error}") from None
        fields = {
            name: field for name, field in reader.fields.items() if name.startswith("tokenizer.")
        }
        if "tokenizer.ggml.tokens" not in fields:
            raise EdgeDtmError(f"{path} holds no tokenizer (tokenizer.ggml.tokens is missing)")
        return cls(LlamaVocab(path), fields)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def _chat_template(self) -> str | None:
        field = self._fields.get("tokenizer.chat_template")
        return (field.contents() or None) if field is not None else None

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        return self._vocab.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer.decode."""
        return self._vocab.decode(ids)

    def encode_chat(self, messages: list[Message]) -> tuple[list[int], str]:
        """See Tokenizer.encode_chat."""
        texts = {
            f"{name}_token": self._token_text(f"tokenizer.ggml.{key}_token_id")
            for name, key in (
                ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"),
            )
        }  # fmt: skip
        bos = self._vocab.bos_id
        if bos is not None and self._vocab.adds_bos:
            texts["bos_token"] = self._token(bos)
        added_bos = texts["bos_token"] if self._vocab.adds_bos else None
        return encode_chat_with(self._vocab, self._chat_template, messages, texts, added_bos)

    def _token(self, index: int) -> str:
        return str(self._fields["tokenizer.ggml.tokens"].contents(index))

    def _token_text(self, key: str) -> str:
        field = self._fields.get(key)
        index = -1 if field is None else int(field.contents())
        return self._token(index) if 0 <= index < self.vocab_size else ""

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Copy every tokenizer.* field with its type."""
        for name, field in self._fields.items():
            kind = field.types[0]
            if kind == GGUFValueType.STRING:
                writer.add_key_value(name, field.parts[-1].tobytes(), kind)
            elif kind != GGUFValueType.ARRAY:
                writer.add_key_value(name, field.contents(), kind)
            elif len(field.data):  # the writer has no empty arrays; llama.cpp reads none the same
                inner = field.types[-1]
                value = (
                    [field.parts[i].tobytes() for i in field.data]
                    if inner == GGUFValueType.STRING
                    else field.contents()
                )
                writer.add_key_value(name, value, kind, inner)
