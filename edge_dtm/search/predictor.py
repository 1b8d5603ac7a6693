"""SDT and mean FDT from summed costs and the margins of the original. Pure.

The additive error model of Divergent Token Metrics (arXiv 2311.01544)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import erfc, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]


_erfc = np.vectorize(erfc, otypes=[np.float64])


@dataclass(frozen=True)
class Prediction:
    """sigma in logits, sdt a share, fdt in tokens."""

    sigma: float
    sdt: float
    fdt: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


class Predictor:
    """SDT and mean FDT from sigma, given the original's margins.

    margins: logits, shape (sequences, tokens); lengths: tokens that count in each row.
    """

    def __init__(self, margins: FloatArray, lengths: npt.NDArray[np.integer[Any]]) -> None:
        self.margins = np.asarray(margins, dtype=np.float64)
        self.lengths = np.asarray(lengths)
        self._counted = np.arange(self.margins.shape[1])[None, :] < self.lengths[:, None]
        if not self._counted.any():
            raise ValueError("no position to predict on")

    def predict(self, sigma_squared: float) -> Prediction:
        """P(flip at t) = Phi(-m_t / sigma); SDT is its mean, FDT the mean length of survival."""
        sigma = sqrt(max(sigma_squared, 0.0))
        if sigma == 0.0:
            return Prediction(0.0, 0.0, float(self.lengths.mean()))
        flip = np.where(self._counted, _erfc(self.margins / (sigma * sqrt(2))) / 2, 0.0)
        survival = np.cumprod(1 - flip, axis=1)
        fdt = float((survival * self._counted).sum(axis=1).mean())
        return Prediction(sigma, float(flip[self._counted].mean()), fdt)
