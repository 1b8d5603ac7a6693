"""The Modelfile: read by Ollama's rules, its template gives what the GGUF's own one gives."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import CliRunner
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_dtm.cli import main
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import modelfile as modelfile_module
from edge_dtm.formats.modelfile import ChatModel, chat_turns, modelfile
from edge_dtm.formats.profile import profiles_dir

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}" + CHATML[len("{% for message in messages %}"):]
)  # fmt: skip
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}"
    "\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Only user and assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "zephyr": ZEPHYR,
    "no system": NO_SYSTEM,
}
NOT_TURNS = {
    "a counter": "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}",
    "only the last": "{{ messages[-1]['content'] }}",
    "backwards": "{% for m in messages[::-1] %}{{ m['content'] }};{% endfor %}",
    "twice": "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
    "later turns differ": "{% for m in messages %}{{ '*' if loop.index0 > 3 }}{{ m['content'] }};{% endfor %}",
    "long texts cut": "{% for m in messages %}{{ m['content'][:12] }};{% endfor %}",
    "unfinished": "{% for m in messages %}",
    "fails": "{{ messages[99]['content'] }}",
    "no program": "{% for m in messages %}{{ (1).__class__.__mro__ }}{{ m['content'] }}{% endfor %}",
}  # fmt: skip


def model(template: str | None, **changes: Any) -> ChatModel:
    values: dict[str, Any] = {
        "architecture": "llama",
        "template": template,
        "bos": "<s>",
        "special": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "", "pad_token": ""},
        "stops": ["</s>"],
        "context_tokens": 2048,
    }
    return ChatModel(**(values | changes))


def parse(text: str) -> dict[str, list[str]]:
    """A Modelfile by the rules of Ollama's parser: comments, one value a line or in quotes."""
    found: dict[str, list[str]] = {}
    rest = text
    while rest := rest.lstrip():
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name = re.match(r"(FROM|TEMPLATE|PARAMETER [a-z_]+) ", rest)
        assert name is not None, rest
        rest = rest[name.end() :]
        quotes = '"""' if rest.startswith('"""') else '"' if rest.startswith('"') else ""
        if quotes:
            value, _, rest = rest[len(quotes) :].partition(quotes)
        else:
            value, _, rest = rest.partition("\n")
        found.setdefault(name.group(1), []).append(value)
    return found


def go(template: str, system: str, messages: Sequence[dict[str, str]]) -> str:
    """The few words of Go's text/template that are used, as its documentation has them."""
    tokens = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)

    def block(i: int, dot: dict[str, Any], live: bool) -> tuple[int, str]:
        """Run up to an else or end; (index of that token, text)."""
        out = ""
        while i < len(tokens):
            token = tokens[i]
            if not token.startswith("{{"):
                out += token if live else ""
                i += 1
                continue
            words = token[2:-2].split()
            if words[0] in ("else", "end"):
                return i, out
            if words[0] == "range":
                end, _ = block(i + 1, dot, False)
                for item in dot[words[1][1:]] if live else []:
                    out += block(i + 1, item, True)[1]
                assert tokens[end] == "{{ end }}"
                i = end + 1
            elif words[0] == "if":
                done = not live
                condition = words[1:]
                while True:
                    yes = not done and truth(condition, dot)
                    end, text = block(i + 1, dot, yes)
                    out += text
                    done = done or yes
                    i = end
                    words = tokens[i][2:-2].split()
                    if words[0] == "end":
                        break
                    condition = words[2:] if words[1:2] == ["if"] else []
                i += 1
            else:
                out += str(dot[words[0][1:]]) if live else ""
                i += 1
        return i, out

    def truth(condition: Sequence[str], dot: dict[str, Any]) -> bool:
        if not condition:
            return True  # else
        if condition[0] == "eq":
            return bool(dot[condition[1][1:]] == condition[2].strip('"'))
        return bool(dot[condition[0][1:]])

    end, text = block(
        0,
        {
            "System": system,
            # Ollama leaves the system message in the list too.
            "Messages": [
                {"Role": m["role"], "Content": m["content"]}
                for m in ([{"role": "system", "content": system}] if system else []) + [*messages]
            ],
        },
        True,
    )
    assert end == len(tokens)
    return text


def jinja(template: str, messages: Sequence[dict[str, str]]) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_says_what_the_original_says(name: str) -> None:
    parsed = parse(modelfile(model(TEMPLATES[name]), 4096))
    (template,) = parsed["TEMPLATE"]
    talk = [
        {"role": "user", "content": "What is {{ x }}?\n\nSay it."},
        {"role": "assistant", "content": "A \"word\"."},
        {"role": "user", "content": "And <|im_end|> 😀"},
        {"role": "assistant", "content": "Another."},
        {"role": "user", "content": "Bye"},
    ]  # fmt: skip
    for length in (1, 3, 5):
        for system in ("", "Be kind.\nBe brief."):
            if system and name == "no system":
                continue
            messages = [{"role": "system", "content": system}] * bool(system) + talk[:length]
            expected = jinja(TEMPLATES[name], messages)
            assert go(template, system, talk[:length]) == expected.removeprefix("<s>")


def test_what_is_said_about_the_template() -> None:
    assert "strips white space" in modelfile(model(LLAMA_3), 4096)
    assert "strips white space" not in modelfile(model(CHATML), 4096)
    assert "no place for a system message" in modelfile(model(NO_SYSTEM), 4096)
    assert "has no chat template" in modelfile(model(None), 4096)
    # A tokenizer that adds no BOS leaves the template's own in.
    assert parse(modelfile(model(LLAMA_3, bos=""), 9))["TEMPLATE"][0].startswith(
        "{{ if .System }}<s><|start_header_id|>system"
    )


@pytest.mark.parametrize("name", NOT_TURNS)
def test_no_template_where_none_would_be_right(name: str) -> None:
    assert chat_turns(model(NOT_TURNS[name])) is None
    text = modelfile(model(NOT_TURNS[name]), 4096)
    assert "TEMPLATE" not in parse(text)
    assert "sends the bare prompt" in text


@pytest.mark.parametrize("literal", ["{{", "{", '"""', "\x07", "\u200b", "a\r"])
def test_texts_that_ollama_would_read_as_something_else(literal: str) -> None:
    source = "{% for m in messages %}{{ m['content'] }}{{ sep }}{% endfor %}"
    odd = model(source, special={"sep": literal})
    assert chat_turns(odd) is not None
    assert "TEMPLATE" not in parse(modelfile(odd, 4096))


def test_parameters() -> None:
    parsed = parse(modelfile(model(CHATML, stops=["</s>", "<|eot|>", 'a"b', "a\nb"]), 1000))
    assert parsed["FROM"] == ["./model.gguf"]
    assert parsed["PARAMETER temperature"] == ["0"]
    assert parsed["PARAMETER repeat_penalty"] == ["1"]
    assert parsed["PARAMETER num_ctx"] == ["1000"]
    assert parsed["PARAMETER stop"] == ["</s>", "<|eot|>"]
    assert parse(modelfile(model(CHATML), 4096))["PARAMETER num_ctx"] == ["2048"]


def with_metadata(source: Path, target: Path, add: Callable[[gguf.GGUFWriter], None]) -> None:
    """A GGUF with the vocabulary of source, and no tensors."""
    fields = gguf.GGUFReader(source).fields
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(int(fields["llama.context_length"].contents()))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(fields["tokenizer.ggml.tokens"].contents())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def test_what_is_read_of_a_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    found = modelfile_module.read_chat_model(tiny_gguf)
    assert (found.architecture, found.template, found.context_tokens) == ("llama", None, 512)
    assert (found.bos, found.stops) == ("<s>", ["</s>"])
    assert found.special["eos_token"] == "</s>"

    def chat(writer: gguf.GGUFWriter) -> None:
        writer.add_chat_template(CHATML)
        writer.add_add_bos_token(False)
        writer.add_eot_token_id(0)
        writer.add_eom_token_id(2)

    with_metadata(tiny_gguf, tmp_path / "chat.gguf", chat)
    found = modelfile_module.read_chat_model(tmp_path / "chat.gguf")
    assert (found.template, found.bos, found.stops) == (CHATML, "", ["</s>", "<unk>"])
    with_metadata(tiny_gguf, tmp_path / "plain.gguf", lambda writer: None)
    assert modelfile_module.read_chat_model(tmp_path / "plain.gguf").bos == "<s>", (
        "llama.cpp's default"
    )
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(EdgeDtmError, match="cannot be read as GGUF"):
        modelfile_module.read_chat_model(tmp_path / "junk")


def test_the_folder(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tiny-bundle-ollama"

    def run() -> Any:
        return CliRunner().invoke(main, ["pack", str(tiny_bundle), "--for", "ollama"])

    for expected_links in (True, False):  # again, and where no link can be made
        result = run()
        assert result.exit_code == 0, result.output
        assert "ollama create NAME" in result.stdout
        assert {p.name for p in out.iterdir()} == {"Modelfile", "model.gguf"}
        assert (out / "model.gguf").samefile(tiny_bundle / "model.gguf") is expected_links
        assert (out / "model.gguf").read_bytes() == (tiny_bundle / "model.gguf").read_bytes()
        assert parse((out / "Modelfile").read_text())["PARAMETER num_ctx"] == ["512"]

        def no_link(source: Path, target: Path) -> None:
            raise OSError("another file system")

        monkeypatch.setattr(os, "link", no_link)
    assert {p.name for p in tmp_path.iterdir()} == {
        "tiny-bundle", "tiny-bundle.edge", "tiny-bundle-ollama"
    }  # fmt: skip
    (out / "notes").write_text("mine")
    result = run()
    assert result.exit_code == 1
    assert "holds other files" in result.stderr
    assert (out / "notes").read_text() == "mine"
    shutil.rmtree(out)


def test_the_context_that_was_planned_for() -> None:
    assert modelfile_module._planned_context({"profile": "raspberrypi4"}) == 2048
    assert modelfile_module._planned_context({"profile": "my-board"}) == 4096
    assert modelfile_module._planned_context({}) == 4096


def test_the_profile_that_a_bundle_names_is_never_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = profiles_dir() / "raspberrypi4.toml"
    shutil.copy(packaged, tmp_path / "mine.toml")
    monkeypatch.chdir(tmp_path)
    for name in ("mine.toml", "./mine.toml", str(tmp_path / "mine.toml"), str(packaged),
                 "../device_profiles/raspberrypi4.toml", ["raspberrypi4"], 4):  # fmt: skip
        assert modelfile_module._planned_context({"profile": name}) == 4096
