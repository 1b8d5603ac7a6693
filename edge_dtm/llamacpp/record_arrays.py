"""A record in the making: from the logits of a position to its top tokens."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.record import Mode, Record, RunSettings
from edge_dtm.formats.reference import PADDING, TOP_K, Reference


def empty_record(mode: Mode, reference: Reference, settings: RunSettings) -> Record:
    """A record of a reference with nothing in it yet, to be filled by `note`."""
    shape = reference.generated_ids.shape
    return Record(
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


def note(
    record: Record, row: int, target: int, logits: npt.NDArray[np.float32], token: int | None = None
) -> int:
    """Store one position and return its argmax; token: whose probability is wanted."""
    ids, values, normalizer = summarize(logits)
    record.ids[row, target] = ids[0]
    record.top_ids[row, target] = ids
    record.top_logits[row, target] = values
    record.log_normalizers[row, target] = normalizer
    if token is not None:
        record.reference_log_probabilities[row, target] = float(logits[token]) - normalizer
    return int(ids[0])


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
