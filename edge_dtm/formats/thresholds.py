"""What a device must reach: the thresholds of a bundle, and the room for healthy kernels. Pure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from pydantic.dataclasses import dataclass

from edge_dtm.core.metrics import (
    Divergence,
    divergent_mask,
    first_divergent_tokens,
    share_of_divergent_tokens,
)
from edge_dtm.core.strict_json import STRICT, Amount, Share, StrictDataclass


@dataclass(frozen=True, config=STRICT)
class Thresholds(StrictDataclass):
    """What a device must reach. EdgeDtmError when one is made with a wrong number."""

    max_sdt: Share = Field(description="SDT against the original, a share.")
    min_fdt: Amount = Field(description="FDT against the original, tokens.")
    # Against the host's run of the same file, where healthy kernels differ too.
    max_kl_vs_host: Amount = Field(description="kl_vs_host_nats, nats.")
    decided_margin: Amount = Field(
        description="The host's margin from which a position counts as decided, logits."
    )
    max_decided_sdt_vs_host: Share = Field(description="decided_sdt_vs_host, a share.")
    max_kl_probe: Amount = Field(description="kl_probe_nats, nats.")


# The tolerance of healthy kernels, from emulated ARM devices (docs/emulated-devices.md), with room
# above: kernels of quantized types round activations each in their own way, those of F16 next to
# not at all.
MAX_KL_QUANTIZED_NATS, MAX_KL_F16_NATS = 0.05, 1e-3
DECIDED_MARGIN_LOGITS, MAX_DECIDED_SDT = 1.5, 0.005
# The room above the host's own figure, in half-widths of its 95 % interval: a healthy device rounds
# activations otherwise and is as far from the original, at other positions.
ROOM = 1.5


def thresholds_from(
    host: Divergence,
    tolerance: Tolerance,
    quantized: bool,
    max_sdt: float | None = None,
    min_fdt: float | None = None,
) -> Thresholds:
    """The thresholds of a bundle whose GGUF did `host` against the original on the host.

    tolerance: how far a device that is not broken may be off (tolerance_of_kernels). quantized:
    whether the file has other types than F32, F16 and BF16. max_sdt (share) and min_fdt (tokens)
    are the user's own, who may be stricter than the file is.
    """
    sdt, fdt = host.sdt, host.fdt
    most = max(sdt.value + ROOM * (sdt.high - sdt.value), tolerance.sdt)
    least = min(fdt.value - ROOM * (fdt.value - fdt.low), tolerance.fdt)
    return Thresholds(
        max_sdt=min(most, 1.0) if max_sdt is None else max_sdt,
        min_fdt=max(least, 0.0) if min_fdt is None else min_fdt,
        max_kl_vs_host=MAX_KL_QUANTIZED_NATS if quantized else MAX_KL_F16_NATS,
        decided_margin=DECIDED_MARGIN_LOGITS,
        max_decided_sdt_vs_host=MAX_DECIDED_SDT,
        max_kl_probe=MAX_KL_F16_NATS,
    )


# Twice what an emulated Cortex-A76 with fp16 is off the host in F16 (docs/emulated-devices.md).
KERNELS_KL_NATS = 4e-4
DRAWS = 200
WITHIN = 0.99  # of the draws


@dataclass(frozen=True)
class Tolerance:
    """The largest SDT (share) and the smallest mean FDT (tokens) against the original."""

    sdt: float
    fdt: float


def tolerance_of_kernels(
    reference_ids: npt.NDArray[np.integer[Any]],
    top_ids: npt.NDArray[np.integer[Any]],
    top_logits: npt.NDArray[np.floating[Any]],
    lengths: npt.NDArray[np.integer[Any]],
    kl_nats: float = KERNELS_KL_NATS,
) -> Tolerance:
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
        return Tolerance(0.0, 0.0)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    spread = float((1 - np.square(shares).sum(axis=-1)).mean())
    deviation = math.sqrt(2 * kl_nats / spread) if spread > 0 else 0.0
    random = np.random.default_rng(0)
    device_ids = np.array(reference_ids)
    sdt, fdt = [], []
    for _ in range(DRAWS):
        moved = logits + deviation * random.standard_normal(logits.shape)
        device_ids[counted] = np.take_along_axis(ids, moved.argmax(axis=-1)[:, None], axis=-1)[:, 0]
        mask = divergent_mask(reference_ids, device_ids, lengths)
        sdt.append(share_of_divergent_tokens(mask, lengths))
        fdt.append(float(first_divergent_tokens(mask, lengths).mean()))
    return Tolerance(float(np.quantile(sdt, WITHIN)), float(np.quantile(fdt, 1 - WITHIN)))
