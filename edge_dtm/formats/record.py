"""What one model answered to a reference, and the settings it ran with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from edge_dtm.core import strict_json
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.strict_json import STRICT, StrictDataclass, StrictModel, validated
from edge_dtm.formats.bundle import HOST_RECORD, REFERENCE, Bundle
from edge_dtm.formats.reference import (
    PADDING,
    TOP_K,
    ArrayTable,
    Reference,
    check_arrays,
    check_shapes,
    load_npz,
    save_npz,
)

Mode = Literal["teacher_forced", "generate"]


CACHE_STEP = 256  # llama.cpp rounds the context of a sequence up to a multiple
# Settings come with a bundle: what is above these is no use and would only take memory.
MAX_THREADS, MAX_BATCH_TOKENS = 512, 16_384
MAX_SEQUENCES = 64  # LLAMA_MAX_SEQ of the oldest llama.cpp that is supported

_PROBABILITIES = "reference_log_probabilities"
_ARRAYS: ArrayTable = {
    "ids": (np.int32, "SN"),
    "top_ids": (np.int32, "SNK"),
    "top_logits": (np.float32, "SNK"),
    "log_normalizers": (np.float32, "SN"),
    _PROBABILITIES: (np.float32, "SN"),
    "lengths": (np.int32, "S"),
}


@checked_dataclass(frozen=True, config=STRICT)
class RunSettings(StrictDataclass):
    """How llama.cpp is run; everything here may change an argmax in a near-tie.

    threads: CPU threads; batch_tokens: most tokens in one decode call; parallel_sequences: most
    sequences that share one call, 1 for one after the other; kv_type: GGML type of the KV cache;
    micro_batch_tokens: tokens that run through the layers at once, at most batch_tokens count;
    repack: let llama.cpp rearrange the weights for this CPU's kernels. Flash attention is off by
    default: its kernels differ more between machines.

    Memory: a KV cache of the whole context for each parallel sequence (cache_tokens), and logits,
    4 bytes x vocabulary for each token of a micro-batch and for each token of a call whose logits
    are wanted (logits_bytes at most). EdgeDtmError when one is made with a wrong value.
    """

    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)]
    batch_tokens: Annotated[int, Field(ge=1, le=MAX_BATCH_TOKENS)] = 128
    parallel_sequences: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] = 4
    flash_attention: bool = False
    kv_type: str = "F16"
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 64
    repack: bool = True

    @property
    def sequences_per_call(self) -> int:
        """llama.cpp wants no fewer tokens in a micro-batch than sequences in a context."""
        return min(self.parallel_sequences, self.micro_batch_tokens, self.batch_tokens)

    def cache_tokens(self, context_tokens: int) -> int:
        """Tokens that the KV cache has room for, in all sequences together."""
        return -(-context_tokens // CACHE_STEP) * CACHE_STEP * self.sequences_per_call

    def logits_bytes(self, vocabulary: int) -> int:
        """Most bytes that logits take, in the graph of a micro-batch and behind a call."""
        micro = min(self.micro_batch_tokens, self.batch_tokens)
        return 4 * vocabulary * (micro + self.batch_tokens)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunSettings:
        """EdgeDtmError when data is not what to_json wrote."""
        return validated(cls, data, "the settings of a run", "make the bundle again")


@dataclass(frozen=True)
class Record:
    """What one model answered to S sequences of at most N generated tokens.

    ids int32 (S, N): the model's argmax, the lowest id on a tie, PADDING beyond a row's length;
    top_ids int32 (S, N, TOP_K); top_logits float32 (S, N, TOP_K) falling; log_normalizers float32
    (S, N): log of the sum of exp of all logits; reference_log_probabilities float32 (S, N), nats:
    of the reference's token, nan in mode "generate" and beyond a row's length; lengths int32 (S,).
    Speeds in tokens per second, nan when not measured. settings: RunSettings.to_json().
    meta: what `save` was given.
    """

    mode: Mode
    ids: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32]
    top_logits: npt.NDArray[np.float32]
    log_normalizers: npt.NDArray[np.float32]
    reference_log_probabilities: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int32]
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    settings: Mapping[str, Any]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ids.ndim != 2:
            raise ValueError(f"ids have shape {self.ids.shape}, not (sequences, tokens)")
        s, n = self.ids.shape
        check_shapes(self, _ARRAYS, S=s, N=n, K=TOP_K)

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def empty(cls, mode: Mode, reference: Reference, settings: RunSettings) -> Record:
        """Of a reference's sequences, with nothing in it yet: its arrays are there to be filled."""
        shape = reference.generated_ids.shape
        return cls(
            mode=mode,
            ids=np.full(shape, PADDING, dtype=np.int32),
            top_ids=np.full((*shape, TOP_K), PADDING, dtype=np.int32),
            top_logits=np.zeros((*shape, TOP_K), dtype=np.float32),
            log_normalizers=np.zeros(shape, dtype=np.float32),
            reference_log_probabilities=np.full(shape, np.nan, dtype=np.float32),
            lengths=reference.generated_lengths.astype(np.int32),
            prefill_tokens_per_s=math.nan,
            decode_tokens_per_s=math.nan,
            settings=settings.to_json(),
        )

    def rows(self, index: npt.NDArray[Any]) -> Record:
        """The record of some sequences only (an index or boolean array over sequences)."""
        return replace(self, **{name: getattr(self, name)[index] for name in _ARRAYS})

    def belongs_to(self, reference: Reference) -> bool:
        """Whether it has the reference's sequences, by their lengths."""
        return self.ids.shape == reference.generated_ids.shape and np.array_equal(
            self.lengths, reference.generated_lengths
        )

    def save(self, path: Path, meta: Mapping[str, Any] | None = None) -> None:
        """Write an npz file of kind "record"; meta: anything JSON can hold, e.g. provenance."""
        head = {
            "kind": "record",
            "mode": self.mode,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "settings": self.settings,
            "meta": self.meta if meta is None else meta,
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        save_npz(path, arrays, strict_json.plain(head))

    @classmethod
    def load(cls, path: Path) -> Record:
        """EdgeDtmError when the file is no whole record of this schema."""
        arrays, meta = load_npz(path, list(_ARRAYS), "record")
        head = validated(_Head, meta, str(path), "make it again")
        try:
            # Of the reference's tokens some have no probability: those beyond a row's length.
            check_arrays(arrays, _ARRAYS, may_be_nan=_PROBABILITIES)
            lengths = arrays["lengths"]
            if lengths.size and not 0 <= lengths.min() <= lengths.max() <= arrays["ids"].shape[-1]:
                raise ValueError("a length lies outside its row")
            return cls(**{**dict(head), **arrays})
        except (IndexError, ValueError) as error:
            raise EdgeDtmError(
                f"{path} is no readable record file ({error}): make it again"
            ) from None


def host_answers(bundle: Bundle) -> tuple[Reference, Record]:
    """A bundle's reference and the host's record of it. EdgeDtmError when they do not fit."""
    reference = Reference.load(bundle.path(REFERENCE))
    host = Record.load(bundle.path(HOST_RECORD))
    if not len(reference) or host.mode != "teacher_forced" or not host.belongs_to(reference):
        raise EdgeDtmError(
            f"{bundle.source}: its host record does not belong to its reference; make it again"
        )
    return reference, host


# JSON says a nan with null.
_Speed = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(lambda value: math.nan if value is None else value),
]


class _Head(StrictModel, extra="ignore"):
    mode: Mode
    prefill_tokens_per_s: _Speed
    decode_tokens_per_s: _Speed
    settings: dict[str, Any]
    meta: dict[str, Any]
