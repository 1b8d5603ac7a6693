"""FDT and SDT (Divergent Token Metrics, arXiv 2311.01544), and how sure one can be of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]

BOOTSTRAP_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its 95 % bootstrap interval, in the estimate's own unit."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Divergence:
    """How far one model's argmaxes are from another's over a set of sequences.

    sdt is a share (0 to 1), fdt a position in tokens (mean over sequences), identical the share
    of sequences without any divergence, tokens the number of positions compared.
    near_tie_share is the share of all positions that diverge although the original's own margin
    there is no larger than near_tie_margin (in logits).
    """

    sdt: Interval
    fdt: Interval
    identical_share: float
    sequences: int
    tokens: int
    divergent_tokens: int
    near_tie_share: float
    near_tie_margin: float

    @property
    def largest_fdt(self) -> float:
        """What fdt would be without any divergence: the mean length, in tokens."""
        return self.tokens / self.sequences if self.sequences else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def divergent_mask(reference: IntArray, candidate: IntArray, lengths: IntArray) -> BoolArray:
    """Positions that differ, as a boolean array of shape (sequences, tokens).

    reference, candidate: token ids, shape (sequences, tokens); lengths: tokens that count in each
    row. Positions at or beyond a row's length are False. ValueError when shapes do not fit.
    """
    reference, candidate, lengths = map(np.asarray, (reference, candidate, lengths))
    if reference.shape != candidate.shape or lengths.shape != reference.shape[:1]:
        raise ValueError(f"shapes differ: {reference.shape}, {candidate.shape}, {lengths.shape}")
    counted = np.arange(reference.shape[1])[None, :] < lengths[:, None]
    return np.asarray((reference != candidate) & counted, dtype=np.bool_)


def first_divergent_tokens(mask: BoolArray, lengths: IntArray) -> npt.NDArray[np.int64]:
    """FDT of each sequence: index of its first divergent position, its length if there is none."""
    first = np.where(mask.any(axis=1), mask.argmax(axis=1), np.asarray(lengths))
    return first.astype(np.int64)


def share_of_divergent_tokens(mask: BoolArray, lengths: IntArray) -> float:
    """SDT: divergent positions over all positions, 0.0 when there is no position."""
    total = int(np.asarray(lengths).sum())
    return float(mask.sum() / total) if total else 0.0


def bootstrap(
    statistic: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]],
    sequences: int,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval by resampling whole sequences (positions within one are dependent).

    statistic takes an index array (resamples, sequences) and returns one value a resample.
    """
    if sequences == 0:
        return 0.0, 0.0
    index = np.random.default_rng(seed).integers(0, sequences, (BOOTSTRAP_RESAMPLES, sequences))
    # No interpolation: between two infinities, which a ratio may have, it would give nan.
    low, high = np.percentile(statistic(index), [2.5, 97.5], method="inverted_cdf")
    return float(low), float(high)


def compare(
    reference: IntArray,
    candidate: IntArray,
    lengths: IntArray,
    margins: npt.NDArray[np.floating[Any]] | None = None,
    near_tie_margin: float = 0.0,
) -> Divergence:
    """Everything that is said about one candidate against one reference.

    margins: the original's top-1 minus top-2 logit, shape of reference; without it no divergence
    counts as a near-tie. A bootstrap resample weighs each sequence by its length for the SDT, as
    SDT itself does.
    """
    mask, lengths = divergent_mask(reference, candidate, lengths), np.asarray(lengths)
    tokens, divergent = int(lengths.sum()), mask.sum(axis=1)
    first = first_divergent_tokens(mask, lengths)
    sdt = bootstrap(
        lambda index: divergent[index].sum(axis=1) / np.maximum(lengths[index].sum(axis=1), 1),
        len(lengths),
    )
    fdt = bootstrap(lambda index: first[index].mean(axis=1), len(first))
    ties = 0 if margins is None else int((mask & (np.asarray(margins) <= near_tie_margin)).sum())
    return Divergence(
        sdt=Interval(share_of_divergent_tokens(mask, lengths), *sdt),
        fdt=Interval(float(first.mean()) if len(first) else 0.0, *fdt),
        identical_share=float((first == lengths).mean()) if len(first) else 0.0,
        sequences=len(first),
        tokens=tokens,
        divergent_tokens=int(mask.sum()),
        near_tie_share=ties / tokens if tokens else 0.0,
        near_tie_margin=float(near_tie_margin),
    )


def perplexity(log_probabilities: npt.NDArray[np.floating[Any]], lengths: IntArray) -> float:
    """exp of the mean negative log-probability (nats) over the counted positions."""
    counted = np.arange(log_probabilities.shape[1])[None, :] < np.asarray(lengths)[:, None]
    return float(np.exp(-np.asarray(log_probabilities, dtype=np.float64)[counted].mean()))


def top_kl(
    host: npt.NDArray[np.floating[Any]], device: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.float64]:
    """KL divergence, host || device, in nats, at each position.

    Both (..., K): logits of the same K tokens, the host's top ones. Each side is renormalized over
    them, so what lies outside does not count.
    """

    def log_softmax(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        shifted = np.asarray(logits, dtype=np.float64)
        shifted = shifted - shifted.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))

    ours, theirs = log_softmax(device), log_softmax(host)
    # Rounding can make the sum slightly negative where both agree.
    return np.asarray(np.maximum((np.exp(theirs) * (theirs - ours)).sum(axis=-1), 0.0))
