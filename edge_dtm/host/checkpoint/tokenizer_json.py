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
from edge_dtm.host.checkpoint.vocabulary import SpecialTokens, Vocabulary, decode_runs


class TokenizerJson:
    """tokenizer.json as it stands, through the `tokenizers` library."""

    def __init__(self, folder: Path) -> None:
        # Not AutoTokenizer: see the module's docstring. This class honours add_bos_token.
        from transformers import PreTrainedTokenizerFast

        try:
            hf = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise EdgeDtmError(f"{folder}: tokenizer.json cannot be used: {error}") from None
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        model = data["model"]
        if model.get("type") != "BPE":
            raise EdgeDtmError(
                f"{folder}: tokenizer.json is of type {model.get('type')}, but only BPE is "
                f"supported"
            )
        plain, full = self.encode("a", add_special=False), self.encode("a")
        starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
        before = full[: starts[0]] if starts else full
        after = full[len(before) + len(plain) :]
        if before not in ([], [hf.bos_token_id]) or after not in ([], [hf.eos_token_id]):
            raise EdgeDtmError(
                f"{folder}: the tokenizer turns 'a' into {full}; only one BOS before and one EOS "
                f"after a text can be expressed in a GGUF"
            )
        self.special = SpecialTokens(
            hf.bos_token_id, hf.eos_token_id, hf.unk_token_id, hf.pad_token_id,
            add_bos=bool(before), add_eos=bool(after),
        )  # fmt: skip
        self._added: dict[int, str] = {}
        self.table = self._make_table(folder, model)

    def _make_table(self, folder: Path, model: Mapping[str, Any]) -> Vocabulary:
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        size = max(vocab.values()) + 1
        tokens = [f"[PAD{i}]" for i in range(size)]
        types = [int(TokenType.UNUSED)] * size
        like_sentencepiece = bool(model.get("byte_fallback"))
        for token, i in vocab.items():
            tokens[i] = token
            types[i] = int(TokenType.NORMAL)
            if like_sentencepiece and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                types[i] = TokenType.BYTE
        for i, added in self._backend.get_added_tokens_decoder().items():
            self._added[i] = tokens[i] = added.content
            types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        if not like_sentencepiece:
            merges = gguf.SpecialVocab(folder, load_merges=True).merges
            return Vocabulary("gpt2", tokens, types, merges=merges)
        if model.get("unk_token") in vocab:
            types[vocab[model["unk_token"]]] = TokenType.UNKNOWN
        # llama.cpp merges the pair whose result scores highest; gguf.vocab.LlamaHfVocab writes
        # one score for all, which merges in the wrong order. The rank of the merge is the score.
        scores = [-1e6] * size
        for rank, pair in enumerate(model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            index = vocab.get(left + right)
            if index is not None:
                scores[index] = max(scores[index], -float(rank))
        first = self._backend.encode("a", add_special_tokens=False).tokens
        prefix = bool(first) and first[0].startswith("▁")
        return Vocabulary("llama", tokens, types, scores, add_space_prefix=prefix)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return decode_runs(ids, self._added, self._backend.decode)
