"""tokenizer.json of a Hugging Face folder, through the tokenizers library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.tokenizer import Vocabulary, decode_runs


class TokenizerJson:
    """tokenizer.json as it stands, through the `tokenizers` library."""

    def __init__(self, folder: Path) -> None:
        # Not AutoTokenizer, see hf_tokenizer.py. This class honours add_bos_token.
        from transformers import PreTrainedTokenizerFast

        try:
            model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
            hf = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except FileNotFoundError:
            raise EdgeDtmError(
                f"{folder} has no tokenizer: neither tokenizer.json nor a SentencePiece "
                f"tokenizer.model is there"
            ) from None
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise EdgeDtmError(f"{folder}: tokenizer.json cannot be used: {error}") from None
        if model.get("type") != "BPE":
            raise EdgeDtmError(
                f"{folder}: tokenizer.json is of type {model.get('type')}, but only BPE is "
                f"supported"
            )
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        plain, full = self.encode("a", add_special=False), self.encode("a", add_special=True)
        add_bos, add_eos = full[:1] == [hf.bos_token_id], full[-1:] == [hf.eos_token_id]
        if [hf.bos_token_id] * add_bos + plain + [hf.eos_token_id] * add_eos != full:
            raise EdgeDtmError(
                f"{folder}: the tokenizer turns 'a' into {full}; only one BOS before and one EOS "
                f"after a text can be expressed in a GGUF"
            )
        self._added = {
            i: added.content for i, added in self._backend.get_added_tokens_decoder().items()
        }
        tokens, types = self._tokens(model)
        scores = merges = add_space_prefix = None
        if model.get("byte_fallback"):  # as in SentencePiece
            # llama.cpp merges the pair whose result scores highest, so the rank of a merge is its
            # score; gguf.vocab.LlamaHfVocab writes one for all, which merges in the wrong order.
            ranks: dict[str, int] = {}
            for rank, pair in enumerate(model["merges"]):
                merged = pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)
                ranks.setdefault(merged, rank)
            scores = [-float(ranks.get(token, 1e6)) for token in tokens]
            pieces = self._backend.encode("a", add_special_tokens=False).tokens
            add_space_prefix = "".join(pieces).startswith("▁")
        else:
            merges = gguf.SpecialVocab(folder, load_merges=True).merges
        self.vocabulary = Vocabulary(
            "gpt2" if scores is None else "llama",
            tokens,
            types,
            hf.bos_token_id,
            hf.eos_token_id,
            hf.unk_token_id,
            hf.pad_token_id,
            add_bos,
            add_eos,
            scores,
            merges,
            add_space_prefix,
        )

    def _tokens(self, model: Mapping[str, Any]) -> tuple[list[str], list[int]]:
        """Texts and types by id."""
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        size = max(vocab.values()) + 1
        tokens, types = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
        for token, i in vocab.items():
            is_byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token)
            tokens[i], types[i] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
        for i, added in self._backend.get_added_tokens_decoder().items():
            tokens[i] = added.content
            types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        if model.get("byte_fallback") and model.get("unk_token") in vocab:
            types[vocab[model["unk_token"]]] = TokenType.UNKNOWN
        return tokens, types

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return decode_runs(ids, self._added, self._backend.decode)
