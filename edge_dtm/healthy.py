"""What a healthy device may say whose kernels round otherwise than the host's. Pure.

The host's own figures against the original hold the rounding of its kernels once. That of int8
activations is of about the same size on every machine, so that a file of quantized types is as far
from the original on a device as on the host, only at other positions. F16 is not like that: x86
adds in float32 and is next to exact, while ARM with fp16 arithmetic adds in half precision (a
Raspberry Pi 5), and chooses another token at near-ties where the host never does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.metrics import (
    divergent_mask,
    first_divergent_tokens,
    share_of_divergent_tokens,
)

# Twice what an emulated Cortex-A76 with fp16 is off the host in F16 (docs/emulated-devices.md).
KERNELS_KL_NATS = 4e-4
DRAWS = 200
WITHIN = 0.99  # of the draws


@dataclass(frozen=True)
class Healthy:
    """The largest SDT (share) and the smallest mean FDT (tokens) against the original."""

    sdt: float
    fdt: float


EXACT = Healthy(0.0, math.inf)  # of devices that round as the host does: no room beyond its figures


def healthy_range(
    reference_ids: npt.NDArray[np.integer[Any]],
    top_ids: npt.NDArray[np.integer[Any]],
    top_logits: npt.NDArray[np.floating[Any]],
    lengths: npt.NDArray[np.integer[Any]],
    kl_nats: float = KERNELS_KL_NATS,
    draws: int = DRAWS,
    seed: int = 0,
) -> Healthy:
    """What WITHIN of all devices stay in whose mean KL to the host is kl_nats.

    reference_ids: the original's tokens, (S, N); top_ids and top_logits: the host's run of the
    file, (S, N, K), logits falling; lengths: (S,). Each device moves every logit by noise of its
    own, normal with one variance v. To second order that is a mean KL of v / 2 times the mean of
    1 - sum p^2 (the expected variance of the noise under p), p the softmax of a position's K
    logits; v follows from kl_nats.
    """
    counted = np.arange(top_ids.shape[1])[None, :] < np.asarray(lengths)[:, None]
    ids, logits = top_ids[counted], top_logits[counted].astype(np.float64)
    if not len(ids):
        return Healthy(0.0, 0.0)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    spread = float((1 - np.square(shares).sum(axis=-1)).mean())
    deviation = math.sqrt(2 * kl_nats / spread) if spread > 0 else 0.0
    random = np.random.default_rng(seed)
    said = np.array(reference_ids)
    sdt, fdt = [], []
    for _ in range(draws):
        moved = logits + deviation * random.standard_normal(logits.shape)
        said[counted] = np.take_along_axis(ids, moved.argmax(axis=-1)[:, None], axis=-1)[:, 0]
        mask = divergent_mask(reference_ids, said, lengths)
        sdt.append(share_of_divergent_tokens(mask, lengths))
        fdt.append(float(first_divergent_tokens(mask, lengths).mean()))
    return Healthy(float(np.quantile(sdt, WITHIN)), float(np.quantile(fdt, 1 - WITHIN)))
