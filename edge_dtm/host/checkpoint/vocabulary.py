"""A vocabulary as a GGUF holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from gguf import TokenType

from edge_dtm.core.errors import EdgeDtmError

UNUSED_SCORE = -1000.0


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
