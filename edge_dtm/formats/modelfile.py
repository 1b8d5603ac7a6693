"""A folder that `ollama create` makes a model of: the GGUF and a Modelfile.

Rules of the Modelfile: Ollama's docs/modelfile.mdx and parser/parser.go. Ollama does not run the
GGUF's own chat template (Jinja). Without TEMPLATE it takes the template it knows whose Jinja
differs in fewer than 100 characters, and where there is none it sends the bare prompt
(template/template.go, Named). So TEMPLATE is written whenever Go's template language can say the
same, which is tried on conversations, not read out of the Jinja.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.scratch import Scratch
from edge_dtm.formats.archive import open_bundle
from edge_dtm.formats.bundle import MODEL
from edge_dtm.formats.profile import packaged_profile

MODELFILE = "Modelfile"
DEFAULT_CONTEXT_TOKENS = 4096  # where no profile says for how many the memory was planned

Message = Mapping[str, str]

# Words that no template has, to find where it puts what is said.
_SYSTEM, _USER, _ASSISTANT, _AGAIN = "sYSTEMq1z", "uSERq2z", "aSSISTANTq3z", "aGAINq4z"


@dataclass(frozen=True)
class ChatModel:
    """What a Modelfile needs of a GGUF.

    template: Jinja, or None; bos: text of the token the tokenizer puts first by itself, "" when it
    puts none; special: bos_token and so on, as templates name them; stops: texts that end an
    answer; context_tokens: of the model, at most.
    """

    architecture: str
    template: str | None
    bos: str
    special: Mapping[str, str]
    stops: Sequence[str]
    context_tokens: int


@dataclass(frozen=True)
class Turns:
    """A chat template that only puts texts between the messages.

    `first`, or with a system message `system_first` + system + `system_end`; then the messages,
    with `to_assistant` before and `to_user` behind each answer; then `last`. system_first is None
    when the template has no place for a system message.
    """

    first: str
    system_first: str | None
    system_end: str
    to_assistant: str
    to_user: str
    last: str

    def render(self, messages: Sequence[Message]) -> str:
        """What go_template gives in Ollama: messages alternate, a system message comes first."""
        text = self.first
        if messages[0]["role"] == "system":
            text = f"{self.system_first}{messages[0]['content']}{self.system_end}"
            messages = messages[1:]
        for message in messages:
            if message["role"] == "assistant":
                text += f"{self.to_assistant}{message['content']}{self.to_user}"
            else:
                text += message["content"]
        return text + self.last

    def go_template(self) -> str | None:
        """The same in Go's text/template; None when a text would be read as something else."""
        texts = [self.first, self.system_first or "", self.system_end, self.to_assistant,
                 self.to_user, self.last]  # fmt: skip
        if not all(map(_can_stand_in_template, texts)):
            return None
        head = self.first
        if self.system_first is not None:
            otherwise = f"{{{{ else }}}}{self.first}" if self.first else ""
            head = (
                f"{{{{ if .System }}}}{self.system_first}{{{{ .System }}}}{self.system_end}"
                f"{otherwise}{{{{ end }}}}"
            )
        return (
            f'{head}{{{{ range .Messages }}}}{{{{ if eq .Role "assistant" }}}}{self.to_assistant}'
            f'{{{{ .Content }}}}{self.to_user}{{{{ else if eq .Role "user" }}}}{{{{ .Content }}}}'
            f"{{{{ end }}}}{{{{ end }}}}{self.last}"
        )


def write_folder(bundle_folder: Path, out_dir: Path) -> None:
    """Put the GGUF of a checked bundle and a Modelfile into out_dir, whole or not at all.

    The GGUF is linked where the file system can, else copied. An out_dir that this function made
    is replaced; EdgeDtmError for any other.
    """
    bundle = open_bundle(bundle_folder)
    model = bundle.path(MODEL)
    text = modelfile(read_chat_model(model), _planned_context(bundle.manifest.provenance))
    if os.path.lexists(out_dir) and not _is_ours(out_dir):
        raise EdgeDtmError(f"{out_dir} exists and holds other files: give another name with -o")
    try:
        with Scratch(out_dir.name, out_dir.parent) as scratch:
            folder = scratch / "new"
            folder.mkdir()
            _link_or_copy(model, folder / MODEL)
            (folder / MODELFILE).write_text(text, encoding="utf-8")
            if out_dir.exists():
                out_dir.rename(scratch / "old")
            folder.rename(out_dir)
    except OSError as error:
        raise EdgeDtmError(f"cannot write {out_dir}: {error.strerror or error}") from None


def modelfile(model: ChatModel, planned_context_tokens: int) -> str:
    """The text of a Modelfile that lies beside model.gguf."""
    context = min(model.context_tokens, planned_context_tokens)
    lines = [
        "# Made by edge-dtm pack --for ollama. To use it: ollama create NAME -f Modelfile",
        f"FROM ./{MODEL}",
        "",
        "# Greedy, as it was measured: other settings give other tokens than the report tells of.",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {context}",
    ]
    stops = [stop for stop in model.stops if _can_stand_in_quotes(stop)]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    turns = chat_turns(model)
    template = turns.go_template() if turns else None
    lines.append("")
    if turns and template:
        lines.append("# The GGUF's own chat template in Go's language; the text is the same for")
        lines.append("# messages that take turns, a system message first.")
        if _trims(model, turns):
            lines.append("# The original also strips white space around each message.")
        if turns.system_first is None:
            lines.append("# It has no place for a system message: SYSTEM is not used.")
        lines.append(f'TEMPLATE """{template}"""')
    elif model.template:
        lines.append(
            "# No TEMPLATE: the GGUF's chat template cannot be written in Go's language by"
        )
        lines.append(
            "# edge-dtm. Ollama takes a similar one that it knows; where it knows none, it"
        )
        lines.append("# sends the bare prompt. See what it took with: ollama show --template NAME")
    else:
        lines.append("# No TEMPLATE: this model has no chat template, prompts go in as they are.")
    return "\n".join(lines) + "\n"


def chat_turns(model: ChatModel) -> Turns | None:
    """The chat template as texts between messages; None when it is more than that, or fails."""
    user = {"role": "user", "content": _USER}
    one = _parts(model, [user], [_USER])
    three = _parts(
        model,
        [user, {"role": "assistant", "content": _ASSISTANT}, {"role": "user", "content": _AGAIN}],
        [_USER, _ASSISTANT, _AGAIN],
    )
    if one is None or three is None:
        return None
    first, last = one
    system = _parts(model, [{"role": "system", "content": _SYSTEM}, user], [_SYSTEM, _USER])
    system_first, system_end, _ = system or (None, "", "")
    turns = Turns(first, system_first, system_end, three[1], three[2], last)
    # From here on the template itself decides: it may still treat a later turn in another way.
    for turn_count in (1, 2, 3, 4):
        for with_system in (False, True)[: 2 if system else 1]:
            messages = _conversation(turn_count, with_system)
            if _render(model, messages) != turns.render(messages):
                return None
    return turns


def read_chat_model(path: Path) -> ChatModel:
    """EdgeDtmError when path cannot be read as GGUF or lacks what a Modelfile needs."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError) as error:
        raise EdgeDtmError(f"{path} cannot be read as GGUF: {error}") from None

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    tokens = reader.get_field("tokenizer.ggml.tokens")

    def token(name: str) -> str:
        index = value(f"tokenizer.ggml.{name}_token_id")
        if tokens is None or index is None or not 0 <= index < len(tokens.data):
            return ""
        return str(tokens.contents(int(index)))

    architecture = str(value("general.architecture"))
    context = value(f"{architecture}.context_length")
    if not context:
        raise EdgeDtmError(f"{path} does not say its context length: convert the model again")
    special = {
        f"{name}_token": token(key)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    # llama.cpp's default for a SentencePiece vocabulary that does not say it is to add BOS.
    adds_bos = value("tokenizer.ggml.add_bos_token")
    if adds_bos is None:
        adds_bos = value("tokenizer.ggml.model") == "llama"
    return ChatModel(
        architecture=architecture,
        template=value("tokenizer.chat_template") or None,
        bos=special["bos_token"] if adds_bos else "",
        special=special,
        stops=[text for text in dict.fromkeys(map(token, ("eos", "eot", "eom"))) if text],
        context_tokens=int(context),
    )


def _planned_context(provenance: Mapping[str, Any]) -> int:
    profile = packaged_profile(provenance.get("profile"))
    return DEFAULT_CONTEXT_TOKENS if profile is None else profile.n_ctx


def _is_ours(folder: Path) -> bool:
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and {item.name for item in folder.iterdir()} <= {MODEL, MODELFILE}
    )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _parts(model: ChatModel, messages: Sequence[Message], words: Sequence[str]) -> list[str] | None:
    """The rendered text cut at the words; None unless each is there once, in this order."""
    rest = _render(model, messages)
    if rest is None or any(rest.count(word) != 1 for word in words):
        return None
    parts = []
    for word in words:
        before, found, rest = rest.partition(word)
        if not found:
            return None
        parts.append(before)
    return [*parts, rest]


def _conversation(turn_count: int, with_system: bool, space: str = "") -> list[Message]:
    """turn_count questions with the answers between them; space: put around each text."""
    out: list[Message] = []
    if with_system:
        out.append({"role": "system", "content": f"{space}Be brief.\nBe kind.{space}"})
    for i in range(turn_count):
        if i:
            out.append({"role": "assistant", "content": f"{space}Answer {i}, “yes”.{space}"})
        out.append({"role": "user", "content": f"{space}Question {i}\n\n- a {{b}}?{space}"})
    return out


def _trims(model: ChatModel, turns: Turns) -> bool:
    messages = _conversation(2, turns.system_first is not None, "\n  ")
    return _render(model, messages) != turns.render(messages)


def _render(model: ChatModel, messages: Sequence[Message]) -> str | None:
    """The Jinja template's text without the BOS that the tokenizer adds; None when it fails."""
    if not model.template:
        return None
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    # As transformers sets it up, but without the time of day: a Modelfile is read on other days.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        text = environment.from_string(model.template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True,
            **model.special,
        )  # fmt: skip
    except Exception:  # a template is a program: it may fail with anything
        return None
    return text.removeprefix(model.bos)


def _can_stand_in_template(text: str) -> bool:
    # Ollama's parser drops what is not printable, and ends a value at three quotes.
    printable = all(c.isprintable() or c in "\n\t" for c in text)
    return printable and "{{" not in text and not text.endswith("{") and '"""' not in text


def _can_stand_in_quotes(text: str) -> bool:
    return text.isprintable() and '"' not in text
