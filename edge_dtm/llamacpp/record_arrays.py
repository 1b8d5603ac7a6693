"""A record in the making: from the logits of a position to its top tokens."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.record import Mode, Record, RunSettings
from edge_dtm.formats.reference import PADDING, TOP_K, Reference


class RecordArrays:
    """A record in the making."""

    def __init__(self, reference: Reference) -> None:
        s, n = reference.generated_ids.shape
        self.ids = np.full((s, n), PADDING, dtype=np.int32)
        self.top_ids = np.full((s, n, TOP_K), PADDING, dtype=np.int32)
        self.top_logits = np.zeros((s, n, TOP_K), dtype=np.float32)
        self.log_normalizers = np.zeros((s, n), dtype=np.float32)
        self.log_probabilities = np.full((s, n), np.nan, dtype=np.float32)
        self.lengths = reference.generated_lengths.astype(np.int32)

    def note(
        self, row: int, target: int, logits: npt.NDArray[np.float32], token: int | None
    ) -> int:
        """Store one position; token: the reference's, if its probability is wanted."""
        ids, values, normalizer = summarize(logits)
        self.ids[row, target] = ids[0]
        self.top_ids[row, target] = ids
        self.top_logits[row, target] = values
        self.log_normalizers[row, target] = normalizer
        if token is not None:
            self.log_probabilities[row, target] = float(logits[token]) - normalizer
        return int(ids[0])

    def record(
        self, mode: Mode, prefill_rate: float, decode_rate: float, settings: RunSettings
    ) -> Record:
        return Record(
            mode=mode,
            ids=self.ids,
            top_ids=self.top_ids,
            top_logits=self.top_logits,
            log_normalizers=self.log_normalizers,
            reference_log_probabilities=self.log_probabilities,
            lengths=self.lengths,
            prefill_tokens_per_s=prefill_rate,
            decode_tokens_per_s=decode_rate,
            settings=settings.to_json(),
        )


def summarize(
    logits: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], float]:
    """(top ids, top logits falling, log normalizer in nats) of logits (V,), V at least TOP_K.

    On ties the lower id comes first, so the first id is np.argmax's. EdgeDtmError when a logit is
    nan or infinite.
    """
    top = float(logits.max())
    normalizer = top + math.log(float(np.exp(logits - np.float32(top)).sum(dtype=np.float64)))
    if not math.isfinite(normalizer):
        raise EdgeDtmError("the model computes logits that are not finite: its weights are broken")
    # The eighth largest of the maxima of some stretches is no larger than the eighth logit, so that
    # what reaches it holds all candidates, ties included, without sorting the vocabulary.
    stretches = max(min(logits.size // 32, 1024), TOP_K)
    maxima = np.maximum.reduceat(logits, np.arange(stretches) * logits.size // stretches)
    bound = np.partition(maxima, stretches - TOP_K)[stretches - TOP_K]
    candidates = np.flatnonzero(logits >= bound)
    order = np.lexsort((candidates, -logits[candidates]))[:TOP_K]
    ids = candidates[order]
    return ids, logits[ids], normalizer
