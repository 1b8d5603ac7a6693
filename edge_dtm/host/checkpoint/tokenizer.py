"""What edge-dtm needs of a tokenizer, wherever it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import gguf

Message = dict[str, str]


class Tokenizer(Protocol):
    """What the rest of edge-dtm needs of a tokenizer."""

    vocab_size: int
    """Tokens, equal to the rows of the embedding matrix."""

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids with the special tokens the tokenizer adds; special tokens in `text` are parsed."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text with special tokens spelled out, less a leading BOS that `encode` would add."""
        ...

    def encode_chat(self, messages: list[Message]) -> tuple[list[int], str]:
        """Ids of the conversation with the generation prompt, and the text that encodes to them.

        EdgeDtmError when the template refuses the messages, or no text encodes to its ids.
        """
        ...

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Write tokenizer.ggml.* and tokenizer.chat_template."""
        ...
