"""tokenizer.model of a Hugging Face folder, through the sentencepiece library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from edge_dtm.host.checkpoint.json_file import read_json
from edge_dtm.host.checkpoint.tokenizer import UNUSED_SCORE, Vocabulary, decode_runs


class SentencePieceModel:
    """tokenizer.model through the sentencepiece library, split at special tokens.

    Every piece of text between special tokens gets the dummy prefix, as in Llama-2's first
    tokenizer ("legacy") and in llama.cpp.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], proto: Any) -> None:
        self._prefix = bool(
            proto.normalizer_spec.add_dummy_prefix and config.get("add_prefix_space") is not False
        )
        # Added by hand below, where wanted.
        proto.normalizer_spec.add_dummy_prefix = False
        self._sp = sp = SentencePieceProcessor(model_proto=proto.SerializeToString())
        tokens = [piece.piece for piece in proto.pieces]
        scores = [float(piece.score) for piece in proto.pieces]
        types = [int(piece.type) for piece in proto.pieces]  # numbered as in GGUF
        added = _added_tokens(folder, config)
        for index, (content, special) in sorted(added.items()):
            while len(tokens) <= index:
                tokens.append(f"[PAD{len(tokens)}]")
                scores.append(UNUSED_SCORE)
                types.append(TokenType.UNUSED)
            if tokens[index] == content and types[index] in (TokenType.UNKNOWN, TokenType.CONTROL):
                continue
            if tokens[index] != content:
                scores[index] = UNUSED_SCORE
            tokens[index] = content
            types[index] = TokenType.CONTROL if special else TokenType.USER_DEFINED
        self._special_ids = {
            token: i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN) or i in added
        }
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

        def named(kind: str, default: int) -> int | None:
            entry = config.get(f"{kind}_token")
            content = entry.get("content") if isinstance(entry, dict) else entry
            return self._special_ids.get(content, default if default >= 0 else None)

        bos, eos = named("bos", sp.bos_id()), named("eos", sp.eos_id())
        self.vocabulary = Vocabulary(
            "llama",
            tokens,
            types,
            bos,
            eos,
            unk=named("unk", sp.unk_id()),
            pad=named("pad", sp.pad_id()),
            add_bos=bos is not None and config.get("add_bos_token") is not False,
            add_eos=eos is not None and bool(config.get("add_eos_token")),
            scores=scores,
            add_space_prefix=self._prefix,
        )

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        v = self.vocabulary
        ids: list[int] = []
        if add_special and v.add_bos and v.bos is not None:
            ids.append(v.bos)
        for part in self._split.split(text):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            elif part:
                ids += self._sp.encode(" " + part if self._prefix else part)
        if add_special and v.add_eos and v.eos is not None:
            ids.append(v.eos)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        def decode_run(run: list[int]) -> str:
            text = str(self._sp.decode(run))
            return text[1:] if self._prefix and text.startswith(" ") else text

        # Padding has no piece in the model.
        spelled = {i: self.vocabulary.tokens[i] for i in ids if i >= self._sp.get_piece_size()}
        spelled |= {i: token for token, i in self._special_ids.items()}
        return decode_runs(ids, spelled, decode_run)


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """id -> (text, whether special) of the tokens a SentencePiece folder adds to its model."""
    tokens = {int(i): (text, False) for text, i in read_json(folder / "added_tokens.json").items()}
    entries = [
        *((e["id"], e) for e in read_json(folder / "tokenizer.json").get("added_tokens", [])),
        *config.get("added_tokens_decoder", {}).items(),
    ]
    return tokens | {int(i): (e["content"], bool(e.get("special"))) for i, e in entries}


def read_proto(path: Path) -> Any:
    """The parsed SentencePiece model, or None: Llama 3 has another format under that name."""
    if not path.is_file():
        return None
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's DecodeError, which has no type stubs
        return None
    return proto if proto.pieces else None
