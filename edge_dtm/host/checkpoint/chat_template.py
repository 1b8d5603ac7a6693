"""Chat prompts: a template's text, and the ids that text encodes to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.tokenizer import Message


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the model's turns for training."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(template: str, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    """A chat template's text, with the environment that transformers gives such templates."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter escapes for HTML, which no model was trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
        )
    # A template is a program: it may also fail with TypeError, OverflowError and others.
    except Exception as error:
        raise EdgeDtmError(f"the chat template cannot render these messages: {error}") from None


class Encoder(Protocol):
    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...


def encode_chat_with(
    encoder: Encoder,
    template: str | None,
    messages: Sequence[Message],
    special: Mapping[str, str],
    added_bos: str | None,
) -> tuple[list[int], str]:
    """See Tokenizer.encode_chat. added_bos: the text of the BOS that `encoder` adds by itself."""
    if not template:
        raise EdgeDtmError("this model has no chat template: give prompts instead of messages")
    rendered = render_chat(template, messages, special)
    text = rendered
    if added_bos and rendered.startswith(added_bos):
        text = rendered[len(added_bos) :]
    wanted = encoder.encode(rendered, add_special=False)
    ids = encoder.encode(text)
    # Templates without BOS for tokenizers that add it are common (TinyLlama's), and whatever runs
    # the GGUF adds it to them too; so the ids with BOS are what counts there.
    without_bos = ids[1:] if added_bos and text == rendered else ids
    if wanted != without_bos:
        raise EdgeDtmError(
            f"the chat template's text does not encode to its tokens: it begins "
            f"{rendered[:40]!r}, and the tokenizer adds special tokens to that; give prompts "
            f"instead of messages, or mend the template or add_bos_token / add_eos_token"
        )
    return ids, text
