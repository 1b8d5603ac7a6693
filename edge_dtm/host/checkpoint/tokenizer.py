"""What edge-dtm needs of a tokenizer, wherever it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import gguf

from edge_dtm.core.errors import EdgeDtmError

Message = dict[str, str]
SPECIAL = ("bos", "eos", "unk", "pad")


class Tokenizer(ABC):
    """vocab_size: tokens, equal to the rows of the embedding matrix. eos_ids: tokens that end a
    generation. chat_template: in Jinja, or None. special: `bos_token` and so on -> text, as chat
    templates want them. added_bos: text of the BOS that `encode` adds, or None."""

    vocab_size: int
    eos_ids: tuple[int, ...]
    chat_template: str | None
    special: Mapping[str, str]
    added_bos: str | None

    @abstractmethod
    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids with the special tokens the tokenizer adds; special tokens in `text` are parsed."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text with special tokens spelled out, less a leading BOS that `encode` would add."""

    @abstractmethod
    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Write tokenizer.ggml.* and tokenizer.chat_template."""

    def encode_chat(self, messages: list[Message]) -> tuple[list[int], str]:
        """Ids of the conversation with the generation prompt, and the text that encodes to them.

        EdgeDtmError when the template refuses the messages, or no text encodes to its ids.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self.chat_template:
            raise EdgeDtmError("this model has no chat template: give prompts instead of messages")
        options: dict[str, Any] = {"add_generation_prompt": True, **self.special}
        try:
            rendered = render_jinja_template(
                [messages], chat_template=self.chat_template, **options
            )[0][0]
        # A template is a program: it may also fail with TypeError, OverflowError and others.
        except Exception as error:
            raise EdgeDtmError(f"the chat template cannot render these messages: {error}") from None
        text = rendered.removeprefix(self.added_bos or "")
        ids = self.encode(text)
        # Templates without BOS for tokenizers that add it are common (TinyLlama's), and whatever
        # runs the GGUF adds it to them too; so the ids with BOS are what counts there.
        without_bos = ids[1:] if self.added_bos and text == rendered else ids
        if self.encode(rendered, add_special=False) != without_bos:
            raise EdgeDtmError(
                f"the chat template's text does not encode to its tokens: it begins "
                f"{rendered[:40]!r}, and the tokenizer adds special tokens to that; give prompts "
                f"instead of messages, or mend the template or add_bos_token / add_eos_token"
            )
        return ids, text
