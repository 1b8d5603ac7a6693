"""The checks of a verdict, decided sequence by sequence: what `verify --quick` stops by."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.core.metrics import divergent_mask, first_divergent_tokens
from edge_dtm.core.sequential import ALPHA, Sequential, order
from edge_dtm.device.judge import KL_CAP_NATS
from edge_dtm.formats.thresholds import Thresholds

SEED = 0
CERTAINTY = 1 - ALPHA

IntArray = npt.NDArray[np.integer[Any]]


class QuickVerdict:
    """Takes sequences in the order of `order` and knows when the verdict of all is certain.

    reference_ids, host_ids (S, N): the original's tokens and the host's argmaxes; host_margins
    (S, N), logits: the host's top logit less its second; lengths (S,).
    """

    def __init__(
        self,
        reference_ids: IntArray,
        host_ids: IntArray,
        host_margins: npt.NDArray[np.floating[Any]],
        lengths: IntArray,
        thresholds: Thresholds,
    ) -> None:
        self._reference, self._host, self._lengths = reference_ids, host_ids, lengths
        counted = np.arange(host_ids.shape[1])[None, :] < lengths[:, None]
        self._decided = counted & (host_margins >= thresholds.decided_margin)
        mask = divergent_mask(reference_ids, host_ids, lengths)
        nothing = np.zeros(len(lengths))
        checks: dict[str, dict[str, Any]] = {
            "fdt": {
                "limit": thresholds.min_fdt,
                "predicted": first_divergent_tokens(mask, lengths),
                "low": nothing,
                "high": lengths,
                "relation": "at least",
            },
            "sdt": {
                "limit": thresholds.max_sdt,
                "predicted": mask.sum(axis=1),
                "low": nothing,
                "high": lengths,
                "weights": lengths,
            },
            "kl": {
                "limit": thresholds.max_kl_vs_host,
                "predicted": nothing,
                "low": nothing,
                "high": KL_CAP_NATS * lengths,
                "weights": lengths,
            },
        }
        decided = self._decided.sum(axis=1)
        if decided.any():
            checks["decided"] = {
                "limit": thresholds.max_decided_sdt_vs_host,
                "predicted": nothing,
                "low": nothing,
                "high": decided,
                "weights": decided,
            }
        self._sequential = Sequential(checks)
        self.order = order(len(lengths), SEED)

    def add(self, rows: IntArray, ids: IntArray, kl: npt.NDArray[np.floating[Any]]) -> None:
        """What the device said to the sequences `rows`: argmaxes and KL (nats), (rows, N)."""
        lengths = self._lengths[rows]
        counted = np.arange(ids.shape[1])[None, :] < lengths[:, None]
        mask = divergent_mask(self._reference[rows], ids, lengths)
        other = divergent_mask(self._host[rows], ids, lengths) & self._decided[rows]
        values = {
            "fdt": first_divergent_tokens(mask, lengths),
            "sdt": mask.sum(axis=1),
            "kl": (np.minimum(kl, KL_CAP_NATS) * counted).sum(axis=1),
            "decided": other.sum(axis=1),
        }
        for i, row in enumerate(rows):
            known = {name: float(values[name][i]) for name in self._sequential.checks}
            self._sequential.update(int(row), known)

    @property
    def passed(self) -> bool | None:
        """None while open."""
        return self._sequential.passed

    @property
    def by(self) -> str:
        """arithmetic or statistics."""
        return self._sequential.by or ""

    @property
    def met(self) -> dict[str, bool]:
        """For each check whether it is met; one still open is not what a FAIL rests on."""
        return {name: c.state != "missed" for name, c in self._sequential.checks.items()}
