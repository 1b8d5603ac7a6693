"""The tokenizer of a Hugging Face folder.

The files of the checkpoint are the ground truth, not the class that transformers picks for them:
AutoTokenizer of transformers 5 rebuilds some tokenizers from the class named in the config.
Measured with 5.23: a Llama-2 folder loses the dummy prefix before text that begins with a space
or follows a special token, and a tokenizer.json whose config names GPT2Tokenizer loses its digit
splitting. So tokenizer.model goes through the sentencepiece library, and tokenizer.json through
the class of transformers that takes the file as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gguf

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.json_file import read_json
from edge_dtm.host.checkpoint.pre_tokenizer import PRE_CANDIDATES, find_pre_tokenizer
from edge_dtm.host.checkpoint.sentencepiece_model import SentencePieceModel, read_proto
from edge_dtm.host.checkpoint.tokenizer import SPECIAL, Tokenizer
from edge_dtm.host.checkpoint.tokenizer_json import TokenizerJson


class HfTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face folder: tokenizer.model, else tokenizer.json."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """vocab_size: rows of the embedding matrix.

        EdgeDtmError when the folder has no tokenizer, one that a GGUF cannot hold, or one with
        more tokens than the model.
        """
        self.vocab_size = vocab_size
        self._folder = folder
        config = read_json(folder / "special_tokens_map.json")
        config |= read_json(folder / "tokenizer_config.json")
        proto = read_proto(folder / "tokenizer.model")
        self._backend = (
            SentencePieceModel(folder, config, proto) if proto else TokenizerJson(folder)
        )
        self._vocabulary = vocabulary = self._backend.vocabulary
        vocabulary.pad_to(vocab_size, folder)
        eos = [] if vocabulary.eos is None else [vocabulary.eos]
        for file in ("generation_config.json", "config.json"):
            eos += self._config_ids(file, "eos_token_id")
        self.eos_ids = tuple(dict.fromkeys(eos))
        if not self.eos_ids:
            raise EdgeDtmError(
                f"{folder} names no end-of-sequence token; add eos_token_id to config.json"
            )
        self.chat_template = _chat_template(folder, config)
        ids = {name: getattr(vocabulary, name) for name in SPECIAL}
        self.special = {
            f"{name}_token": "" if i is None else vocabulary.tokens[i] for name, i in ids.items()
        }
        self.added_bos = self.special["bos_token"] if vocabulary.add_bos else None

    def _config_ids(self, file: str, key: str) -> list[int]:
        """Ids that the vocabulary has, of a key that holds one, several or none."""
        value = read_json(self._folder / file).get(key)
        ids = value if isinstance(value, list) else [value]
        return [int(i) for i in ids if i is not None and 0 <= int(i) < self.vocab_size]

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return self._backend.encode(text, add_special=add_special)

    def decode(self, ids: Sequence[int]) -> str:
        drop = self._vocabulary.add_bos and len(ids) > 0 and ids[0] == self._vocabulary.bos
        return self._backend.decode(ids[1:] if drop else ids)

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """See Tokenizer.add_metadata.

        EdgeDtmError when no pre-tokenizer of llama.cpp gives a byte-level BPE's tokens; the
        message shows the first text that differs.
        """
        self._write(writer, self._pre)

    @cached_property
    def _pre(self) -> str | None:
        if self._vocabulary.model != "gpt2":
            return None
        write = partial(self._write, pre=PRE_CANDIDATES[0])
        return find_pre_tokenizer(self._folder, self.encode, write)

    def _write(self, writer: gguf.GGUFWriter, pre: str | None) -> None:
        v = self._vocabulary
        eos = self.eos_ids[0]
        config_bos = self._config_ids("config.json", "bos_token_id")
        # llama.cpp ends a generation at EOS, EOT and EOM, and at some tokens it knows by name.
        eot, eom = (*self.eos_ids[1:3], None, None)[:2]
        entries: tuple[tuple[Callable[[Any], None], Any], ...] = (
            (writer.add_tokenizer_model, v.model),
            (writer.add_tokenizer_pre, pre),
            (writer.add_token_list, v.tokens),
            (writer.add_token_types, v.types),
            (writer.add_token_scores, v.scores),
            (writer.add_token_merges, v.merges),
            (writer.add_add_space_prefix, v.add_space_prefix),
            # Without these two llama.cpp takes ids of its own (1 and 2, or 11).
            (writer.add_bos_token_id, v.bos if v.bos is not None else [*config_bos, eos][0]),
            (writer.add_eos_token_id, eos),
            (writer.add_unk_token_id, v.unk),
            (writer.add_pad_token_id, v.pad),
            (writer.add_eot_token_id, eot),
            (writer.add_eom_token_id, eom),
            (writer.add_add_bos_token, v.add_bos),
            (writer.add_add_eos_token, v.add_eos),
            (writer.add_chat_template, self.chat_template),
        )
        for add, value in entries:
            if value is not None:
                add(value)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8") or None
    template = config.get("chat_template")
    if template is None:
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, each with a name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template or None
