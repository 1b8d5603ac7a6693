"""The tokenizer of a Hugging Face folder.

The files of the checkpoint are the ground truth, not the class that transformers picks for them:
AutoTokenizer of transformers 5 rebuilds some tokenizers from the class named in the config.
Measured with 5.23: a Llama-2 folder loses the dummy prefix before text that begins with a space
or follows a special token, and a tokenizer.json whose config names GPT2Tokenizer loses its digit
splitting. So tokenizer.model goes through the sentencepiece library, and tokenizer.json through
the class of transformers that takes the file as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.chat_template import encode_chat_with
from edge_dtm.host.checkpoint.json_file import read_json
from edge_dtm.host.checkpoint.pre_tokenizer import PRE_CANDIDATES, find_pre_tokenizer
from edge_dtm.host.checkpoint.sentencepiece_model import SentencePieceModel, read_proto
from edge_dtm.host.checkpoint.tokenizer import Message
from edge_dtm.host.checkpoint.tokenizer_json import TokenizerJson


class HfTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.model, else tokenizer.json."""

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        backend: SentencePieceModel | TokenizerJson,
        chat_template: str | None,
    ) -> None:
        self.vocab_size = vocab_size
        self._folder = folder
        self._backend = backend
        self._chat_template = chat_template
        self._pre: str | None = None
        backend.table.pad(vocab_size, folder)
        self.eos_ids = self._find_eos()
        if not self.eos_ids:
            raise EdgeDtmError(
                f"{folder} names no end-of-sequence token; add eos_token_id to config.json"
            )

    @classmethod
    def from_folder(cls, folder: Path, vocab_size: int) -> HfTokenizer:
        """vocab_size: rows of the embedding matrix.

        EdgeDtmError when the folder has no tokenizer, one that a GGUF cannot hold, or one with
        more tokens than the model.
        """
        config = read_json(folder / "special_tokens_map.json") | read_json(
            folder / "tokenizer_config.json"
        )
        proto = read_proto(folder / "tokenizer.model")
        backend: SentencePieceModel | TokenizerJson
        if proto is not None:
            backend = SentencePieceModel(folder, config, proto)
        elif (folder / "tokenizer.json").is_file():
            backend = TokenizerJson(folder)
        else:
            raise EdgeDtmError(
                f"{folder} has no tokenizer: neither tokenizer.json nor a SentencePiece "
                f"tokenizer.model is there"
            )
        return cls(folder, vocab_size, backend, _chat_template(folder, config))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_template)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        return self._backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer.decode."""
        special = self._backend.special
        drop = special.add_bos and len(ids) > 0 and ids[0] == special.bos
        return self._backend.decode(ids[1:] if drop else ids)

    def encode_chat(self, messages: list[Message]) -> tuple[list[int], str]:
        """See Tokenizer.encode_chat."""
        special = self._backend.special
        texts = {
            f"{name}_token": "" if i is None else self._backend.table.tokens[i]
            for name, i in (
                ("bos", special.bos),
                ("eos", special.eos),
                ("unk", special.unk),
                ("pad", special.pad),
            )
        }
        added_bos = texts["bos_token"] if special.add_bos else None
        return encode_chat_with(self._backend, self._chat_template, messages, texts, added_bos)

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """See Tokenizer.add_metadata.

        EdgeDtmError when no pre-tokenizer of llama.cpp gives a byte-level BPE's tokens; the
        message shows the first text that differs.
        """
        if self._backend.table.model == "gpt2" and self._pre is None:
            self._pre = find_pre_tokenizer(
                self._folder, self.encode, lambda w: self._write(w, PRE_CANDIDATES[0])
            )
        self._write(writer, self._pre)

    def _write(self, writer: gguf.GGUFWriter, pre: str | None) -> None:
        table, special = self._backend.table, self._backend.special
        writer.add_tokenizer_model(table.model)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(table.tokens)
        writer.add_token_types(table.types)
        if table.scores is not None:
            writer.add_token_scores(table.scores)
        if table.merges is not None:
            writer.add_token_merges(table.merges)
        if table.add_space_prefix is not None:
            writer.add_add_space_prefix(table.add_space_prefix)
        eos = special.eos if special.eos is not None else self.eos_ids[0]
        # Without these llama.cpp takes ids of its own (1 and 2, or 11) for BOS and EOS.
        writer.add_bos_token_id(special.bos if special.bos is not None else self._config_bos(eos))
        writer.add_eos_token_id(eos)
        if special.unk is not None:
            writer.add_unk_token_id(special.unk)
        if special.pad is not None:
            writer.add_pad_token_id(special.pad)
        # llama.cpp ends a generation at EOS, EOT and EOM, and at some tokens it knows by name.
        others = [i for i in self.eos_ids if i != eos]
        for add, index in zip((writer.add_eot_token_id, writer.add_eom_token_id), others):  # noqa: B905
            add(index)
        writer.add_add_bos_token(special.add_bos)
        writer.add_add_eos_token(special.add_eos)
        if self._chat_template:
            writer.add_chat_template(self._chat_template)

    def _find_eos(self) -> tuple[int, ...]:
        ids = [] if self._backend.special.eos is None else [self._backend.special.eos]
        for name in ("generation_config.json", "config.json"):
            value = read_json(self._folder / name).get("eos_token_id")
            ids += [i for i in (value if isinstance(value, list) else [value]) if i is not None]
        return tuple(dict.fromkeys(int(i) for i in ids if 0 <= int(i) < self.vocab_size))

    def _config_bos(self, default: int) -> int:
        value = read_json(self._folder / "config.json").get("bos_token_id")
        return value if isinstance(value, int) and 0 <= value < self.vocab_size else default


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text("utf-8")
    except FileNotFoundError:
        pass
    template = config.get("chat_template")
    if template is None:
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) and template else None
