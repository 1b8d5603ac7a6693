"""tokenizer.model of a Hugging Face folder, through the sentencepiece library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType

from edge_dtm.host.checkpoint.json_file import read_json
from edge_dtm.host.checkpoint.vocabulary import SpecialTokens, Vocabulary, decode_runs


class SentencePieceModel:
    """tokenizer.model through the sentencepiece library, split at special tokens.

    Every piece of text between special tokens gets the dummy prefix, as in Llama-2's first
    tokenizer ("legacy") and in llama.cpp.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], proto: Any) -> None:
        from sentencepiece import SentencePieceProcessor

        self._prefix = bool(
            proto.normalizer_spec.add_dummy_prefix and config.get("add_prefix_space") is not False
        )
        # Added by hand below, where wanted.
        proto.normalizer_spec.add_dummy_prefix = False
        sp = SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._sp = sp
        self._size = sp.get_piece_size()
        tokens = [sp.id_to_piece(i) for i in range(self._size)]
        scores = [float(sp.get_score(i)) for i in range(self._size)]
        types = [int(piece.type) for piece in proto.pieces]  # numbered as in GGUF
        added = _added_tokens(folder, config)
        for index, (content, special) in sorted(added.items()):
            while len(tokens) <= index:
                tokens.append(f"[PAD{len(tokens)}]")
                scores.append(-1000.0)
                types.append(TokenType.UNUSED)
            if tokens[index] == content and types[index] in (TokenType.UNKNOWN, TokenType.CONTROL):
                continue
            if tokens[index] != content or index >= self._size:
                scores[index] = -1000.0
            tokens[index] = content
            types[index] = TokenType.CONTROL if special else TokenType.USER_DEFINED
        self.table = Vocabulary("llama", tokens, types, scores, add_space_prefix=self._prefix)
        self._special_ids = {
            token: i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN) or i in added
        }
        self._special_tokens = {i: token for token, i in self._special_ids.items()}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

        def named(kind: str, default: int) -> int | None:
            content = _content(config.get(f"{kind}_token"))
            token = self._special_ids.get(content) if content else None
            return token if token is not None else (default if default >= 0 else None)

        self.special = SpecialTokens(
            bos=named("bos", sp.bos_id()),
            eos=named("eos", sp.eos_id()),
            unk=named("unk", sp.unk_id()),
            pad=named("pad", sp.pad_id()),
            add_bos=config.get("add_bos_token") is not False,
            add_eos=bool(config.get("add_eos_token")),
        )
        self.special.add_bos &= self.special.bos is not None
        self.special.add_eos &= self.special.eos is not None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        ids: list[int] = []
        if add_special and self.special.add_bos and self.special.bos is not None:
            ids.append(self.special.bos)
        for part in self._split.split(text):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            elif part:
                ids += self._sp.encode(" " + part if self._prefix else part)
        if add_special and self.special.add_eos and self.special.eos is not None:
            ids.append(self.special.eos)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        def decode_run(run: list[int]) -> str:
            text = str(self._sp.decode(run))
            return text[1:] if self._prefix and text.startswith(" ") else text

        # Padding has no piece in the model.
        padding = {i: self.table.tokens[i] for i in ids if i >= self._size}
        return decode_runs(ids, padding | self._special_tokens, decode_run)


def _content(entry: Any) -> str | None:
    """The text of a token that a config gives as a string or as an object."""
    value = entry.get("content") if isinstance(entry, dict) else entry
    return value if isinstance(value, str) else None


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """id -> (text, whether special) of the tokens a SentencePiece folder adds to its model."""
    tokens: dict[int, tuple[str, bool]] = {}
    for content, index in read_json(folder / "added_tokens.json").items():
        tokens[int(index)] = (content, False)
    for added in read_json(folder / "tokenizer.json").get("added_tokens", []):
        tokens[int(added["id"])] = (added["content"], bool(added.get("special")))
    for index, added in config.get("added_tokens_decoder", {}).items():
        tokens[int(index)] = (added["content"], bool(added.get("special")))
    return tokens


def read_proto(path: Path) -> Any:
    """The parsed SentencePiece model, or None: Llama 3 has another format under that name."""
    if not path.is_file():
        return None
    from sentencepiece import sentencepiece_model_pb2

    module: Any = sentencepiece_model_pb2
    proto = module.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's DecodeError, which has no type stubs
        return None
    return proto if proto.pieces else None
