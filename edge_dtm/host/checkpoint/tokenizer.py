"""What edge-dtm needs of a tokenizer, wherever it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from edge_dtm.core.errors import EdgeDtmError

UNUSED_SCORE = -1000.0
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

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[list[int], str]:
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


@dataclass(frozen=True)
class Vocabulary:
    """tokens, types, scores: by id. scores: for model "llama", merges: for "gpt2". bos, eos, unk,
    pad: ids, None without one. add_bos, add_eos: whether they are added to every text."""

    model: str
    tokens: list[str]
    types: list[int]
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool | None = None

    def pad_to(self, vocab_size: int, folder: Path) -> None:
        """Add unused tokens. EdgeDtmError when there are more than vocab_size already."""
        if len(self.tokens) > vocab_size:
            raise EdgeDtmError(
                f"{folder}: the tokenizer has {len(self.tokens)} tokens, but the model only "
                f"{vocab_size}; take tokenizer files that belong to the model"
            )
        missing = range(len(self.tokens), vocab_size)
        self.tokens.extend(f"[PAD{i}]" for i in missing)
        self.types.extend([TokenType.UNUSED] * len(missing))
        if self.scores is not None:
            self.scores.extend([UNUSED_SCORE] * len(missing))


def decode_runs(
    ids: Sequence[int], special: Mapping[int, str], decode_run: Callable[[list[int]], str]
) -> str:
    """Runs between special tokens decoded one by one: each may have a space prefix to drop."""
    parts = []
    for is_special, group in groupby(ids, key=special.__contains__):
        run = list(group)
        parts += [special[i] for i in run] if is_special else [decode_run(run)]
    return "".join(parts)
