"""When a verdict is certain although not every sequence has been replayed. Pure numpy.

The sequences are replayed in random order, each once. After every one of them a check of a mean
against a limit is either certain by arithmetic (no outcome of the rest can change it), certain by
statistics (wrong in at most a share alpha of all orders, however often one looks), or open.

The statistics are a bet (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", arXiv 2010.09686, section 5, without replacement): a gambler stakes on the limit being
met, at odds that would be fair if it were just missed. If it is missed, their capital multiplies
by 20 at some time in at most one order of 20 (Ville's inequality). A second one stakes on it being
missed. They play on the difference between the device and what the host foresaw for the very same
sequence, because a healthy device's differences are small.

How early "met" can come has a bound that no method beats, since nothing but `high` is assumed of
what was not seen: if k sequences, rounded up, at their upper bounds use up the slack between the
prediction and the limit, about the share 1 - alpha^(1/k) of all must be seen to have met one of
them. So a tight limit with few long sequences is decided at the end, and a broken device after a
few sequences. The caller moves the bound by giving a value that is capped (a smaller `high`), and
a second check of the share of sequences beyond the cap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Relation = Literal["at most", "at least"]
State = Literal["open", "met", "missed"]
Means = Literal["arithmetic", "statistics"]

ALPHA = 0.05
# Shares of the largest stake that can be paid; never all, or one loss would end the game.
_STAKES = np.array([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 0.95, 0.99])
_SMALLEST = 1e-12


def order(sequences: int, seed: int) -> npt.NDArray[np.int64]:
    """The random order of replay: a permutation of 0 to sequences - 1, the same for a seed."""
    return np.random.default_rng(seed).permutation(sequences)


class MeanCheck:
    """Is sum(y) / sum(weights), over all N sequences, at most (or at least) a limit?

    predicted, low, high (N,): the host's value of each sequence's y, and what y can possibly be
    (high may be inf, low -inf). weights (N,): ones for a mean, tokens for a share of tokens.
    alpha: the largest probability of a wrong "met" by statistics; alpha_missed: of a wrong
    "missed", alpha when None. The probabilities hold if the sequences come in uniformly random
    order, drawn independently of the device's values; the predictions need not be right.
    ValueError when shapes or bounds do not fit.
    """

    def __init__(
        self,
        limit: float,
        predicted: npt.ArrayLike,
        low: npt.ArrayLike,
        high: npt.ArrayLike,
        relation: Relation = "at most",
        alpha: float = ALPHA,
        alpha_missed: float | None = None,
        weights: npt.ArrayLike | None = None,
    ) -> None:
        h, lo, hi = (np.array(a, dtype=np.float64) for a in (predicted, low, high))
        w = np.ones_like(h) if weights is None else np.array(weights, dtype=np.float64)
        if h.ndim != 1 or not h.size or not h.shape == lo.shape == hi.shape == w.shape:
            raise ValueError(f"shapes {h.shape}, {lo.shape}, {hi.shape}, {w.shape} do not fit")
        if not (np.isfinite(h).all() and (lo <= h).all() and (h <= hi).all()):
            raise ValueError("every prediction must be finite and within its bounds")
        if not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
            raise ValueError("weights must be finite, not negative and not all zero")
        if relation not in ("at most", "at least"):
            raise ValueError(f"unknown relation {relation!r}")
        alphas = (alpha, alpha if alpha_missed is None else alpha_missed)
        if not all(0 < a < 1 for a in alphas) or not math.isfinite(limit):
            raise ValueError(f"limit {limit} or alphas {alphas} out of range")
        # "At least" is "at most" of the negative; negation is exact.
        self._sign = 1.0 if relation == "at most" else -1.0
        if self._sign < 0:
            h, lo, hi = -h, -hi, -lo
        self._limit = self._sign * float(limit)
        self._weight = math.fsum(w)
        self._low, self._high, self._predicted = lo, hi, h
        self._values = np.full(h.shape, np.nan)
        self._open = np.ones(h.shape, dtype=np.bool_)
        self._differences: list[float] = []
        # What the differences may add up to before the limit is exceeded.
        self._slack = self._limit * self._weight - math.fsum(h)
        self._log_capital: dict[State, float] = {"met": 0.0, "missed": 0.0}
        self._log_needed: dict[State, float] = {
            "met": -math.log(alphas[0]),
            "missed": -math.log(alphas[1]),
        }
        self._state: State = self._arithmetic()
        self._by: Means = "arithmetic"

    @property
    def state(self) -> State:
        """Exact as soon as arithmetic decides, even against an earlier decision by statistics."""
        return self._state

    @property
    def by(self) -> Means | None:
        """What decided, None while open."""
        return None if self._state == "open" else self._by

    @property
    def sequences(self) -> int:
        return len(self._open)

    @property
    def seen(self) -> int:
        return len(self._differences)

    def update(self, index: int, value: float) -> State:
        """Take in the value of one sequence, each of them once; the state after it."""
        if not 0 <= index < len(self._open) or not self._open[index]:
            raise ValueError(f"sequence {index} was seen before or does not exist")
        y = self._sign * float(value)
        if not self._low[index] <= y <= self._high[index]:
            raise ValueError(f"sequence {index}: {value} is outside its bounds")
        difference = y - float(self._predicted[index])
        self._bet(difference)
        self._values[index] = y
        self._open[index] = False
        self._differences.append(difference)
        exact = self._arithmetic()
        if exact != "open":
            self._state, self._by = exact, "arithmetic"
        elif self._state == "open":
            for state, needed in self._log_needed.items():
                if self._log_capital[state] >= needed:
                    self._state, self._by = state, "statistics"
        return self._state

    def _arithmetic(self) -> State:
        # fsum rounds once and a division once, both monotone: no completion is judged otherwise.
        if math.fsum(np.where(self._open, self._high, self._values)) / self._weight <= self._limit:
            return "met"
        if math.fsum(np.where(self._open, self._low, self._values)) / self._weight > self._limit:
            return "missed"
        return "open"

    def _bet(self, difference: float) -> None:
        """Settle both gamblers' stakes on the next difference, fixed from earlier ones only.

        If the limit were exactly reached, the rest would have the mean `fair`: staking on smaller
        (met) or larger (missed) differences then gains nothing on average, and loses on average
        if the truth is on the other side. The stake is the one with the largest log growth on what
        was seen, at most what the most adverse of the rest leaves payable.
        """
        rest = self._open
        fair = self._slack / int(rest.sum())
        past = np.array(self._differences)
        lowest = float((self._low - self._predicted)[rest].min())
        highest = float((self._high - self._predicted)[rest].max())
        # Before anything was seen, each gambler believes in what they stake on: `met` that the
        # device does as foreseen, `missed` that one sequence may double the capital.
        self._settle("met", fair - difference, fair - np.append(past, 0.0), highest - fair)
        self._settle(
            "missed", difference - fair, np.append(past - fair, fair - lowest), fair - lowest
        )
        self._slack -= difference

    def _settle(self, state: State, gain: float, gains: FloatArray, largest_loss: float) -> None:
        if not 0 < largest_loss < math.inf:
            return
        factors = 1 + _STAKES[:, None] * (gains / largest_loss)[None, :]
        growth = np.log(np.maximum(factors, _SMALLEST)).sum(axis=1)
        stake = _STAKES[int(growth.argmax())]
        self._log_capital[state] += math.log1p(stake * gain / largest_loss)


class Sequential:
    """Several checks, and one verdict as soon as it is certain.

    PASS when every check is met: wrong only if a missed one was taken for met, so that each may
    use the whole alpha. FAIL when any is missed: each may use alpha / number of checks. The
    arguments of a check, by name: those of MeanCheck but the alphas.
    """

    def __init__(self, checks: Mapping[str, Mapping[str, Any]], alpha: float = ALPHA) -> None:
        if not checks:
            raise ValueError("no checks")
        self.checks = {
            name: MeanCheck(**arguments, alpha=alpha, alpha_missed=alpha / len(checks))
            for name, arguments in checks.items()
        }
        if len({check.sequences for check in self.checks.values()}) > 1:
            raise ValueError("the checks are of different numbers of sequences")

    def update(self, index: int, values: Mapping[str, float]) -> bool | None:
        """Take in one sequence's value for each check; the verdict after it."""
        if values.keys() != self.checks.keys():
            raise ValueError(f"values for {sorted(values)}, wanted for {sorted(self.checks)}")
        for name, check in self.checks.items():
            check.update(index, values[name])
        return self.passed

    @property
    def passed(self) -> bool | None:
        """None while open."""
        states = {check.state for check in self.checks.values()}
        if "missed" in states:
            return False
        return True if states == {"met"} else None

    @property
    def by(self) -> Means | None:
        """Statistics if the verdict rests on it anywhere, None while open."""
        if self.passed is None:
            return None
        decided = [c.by for c in self.checks.values() if self.passed or c.state == "missed"]
        # One check missed for sure is enough to fail, all must be met for sure to pass.
        sure = all if self.passed else any
        return "arithmetic" if sure(by == "arithmetic" for by in decided) else "statistics"
