"""Hessians of a component's inputs and outputs: second moments, damping, and the factors GPTQ needs."""

from __future__ import annotations

import numpy as np
import torch

from edge_dtm.core.errors import EdgeDtmError

MIN_DAMPING, MAX_DAMPING = 0.03, 5.0
FACTOR_ROUNDING = 1000 * torch.finfo(torch.float32).eps  # of a Hessian's norm, see DampedHessian
INVERTED_AT_ONCE = 256


def input_hessian(inputs: torch.Tensor, token_weights: torch.Tensor | None) -> torch.Tensor:
    """H = sum_t v_t x_t x_t' / sum_t v_t, float32 (row_length, row_length).

    inputs: float32 (tokens, row_length). token_weights: float32 (tokens,), not negative: how much
    an error at that token matters, see Statistics. None: all alike.
    """
    if token_weights is None or not float(token_weights.sum()):  # no margin hears of it
        return inputs.T @ inputs / len(inputs)
    root = (token_weights / token_weights.sum()).sqrt()[:, None]
    scaled = inputs * root
    return scaled.T @ scaled


def scaled_gradients(gradients: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
    """g_t / sqrt(v_t), float32 (tokens, rows), v_t being the size of g_t. Their second moments are
    G = sum_t g_t g_t' / v_t, in which each token counts by its size as it does in `input_hessian`.

    gradients: float32 (tokens, rows); token_weights: float32 (tokens,), not negative.
    """
    smallest = float(token_weights.max()) * 1e-6 + torch.finfo(torch.float32).tiny
    return gradients / token_weights.clamp(min=smallest).sqrt()[:, None]


def effective_tokens(token_weights: torch.Tensor) -> float:
    """How many equally weighted tokens know as much (Kish's effective sample size)."""
    squares = float(token_weights.square().sum())
    return float(token_weights.sum().square()) / squares if squares else float(len(token_weights))


def damping_for(tokens: float, row_length: int) -> float:
    """Share of H's mean diagonal that is added to its diagonal.

    H's sampling noise relative to its diagonal is of the order of row_length / tokens; three times
    that did best on sequences that were not fitted to (docs/experiments.md).
    """
    return float(min(MAX_DAMPING, max(MIN_DAMPING, 3 * row_length / max(tokens, 1.0))))


class DampedHessian:
    """One component's damped Hessian and its factors, shared by all types.

    moments: the Hessian, float32 (row_length, row_length), on the device that is to do the work;
    damping: see damping_for, None when it is damped already. The factors are made in float32 where
    rounding stays far below the damping, else in float64.
    EdgeDtmError when the Hessian is not finite.
    """

    def __init__(self, moments: torch.Tensor, damping: float | None) -> None:
        if not bool(torch.isfinite(moments).all()):
            raise EdgeDtmError(
                "a component's inputs are not finite on the calibration prompts: the model "
                "overflows there; check the checkpoint or use other --prompts"
            )
        n = len(moments)
        mean = moments.diagonal().double().mean().clamp(min=torch.finfo(torch.float32).tiny)
        self.damped = moments if damping is None else (moments.double() / mean).float()
        if damping is not None:
            self.damped.diagonal().add_(damping)
        limit = FACTOR_ROUNDING * float(torch.linalg.matrix_norm(self.damped))
        exact = damping is None or damping < limit
        self._upper = _inverse_upper_factor(self.damped, torch.float64 if exact else torch.float32)
        self.importance = np.ascontiguousarray(self.damped.diagonal().cpu().numpy())
        self.inverse_diagonal = self._upper.square().sum(0).float()
        self.row_length = n
        self._blocks: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def blocks(self, block: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each block of columns: float32 (columns before, block), by which the errors of all
        earlier columns move its targets, and the inverse of its own moments, (block, block). Made
        when first asked for, which no two threads may do at once."""
        if block in self._blocks:
            return self._blocks[block]
        upper, n = self._upper, self.row_length
        passing = torch.zeros((n, n), device=upper.device)
        inverses = []
        for a in range(0, n, block):
            b = a + block
            own = self.damped[a:b, a:b].double()
            inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(own)))
            if b < n:
                passing[a:b, b:] = torch.linalg.solve_triangular(
                    upper[a:b, a:b], upper[a:b, b:], upper=True
                )
        self._blocks[block] = [
            (passing[: i * block, i * block : (i + 1) * block].contiguous(), m.float())
            for i, m in enumerate(inverses)
        ]
        return self._blocks[block]


def _inverse_upper_factor(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Upper triangular U with inverse(matrix) = U' U, without forming the inverse."""
    lower: torch.Tensor = torch.linalg.cholesky(matrix.to(dtype).flip(0, 1))
    _invert_lower(lower)
    return lower.flip(0, 1)


def _invert_lower(matrix: torch.Tensor) -> None:
    """In place, by halves: a third of the work of solving for all columns, nearly all of it in
    products of matrices."""
    n = len(matrix)
    if n <= INVERTED_AT_ONCE:
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = n // 2
    first, last, below = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    _invert_lower(first)
    _invert_lower(last)
    below.copy_(-(last @ (below @ first)))


def local_error(
    error: torch.Tensor, moments: torch.Tensor, gradients: torch.Tensor | None = None
) -> float:
    """tr(G E H E'): what an error E of the weights does to the component's outputs, G = g' g being
    the moments of the margins' gradients g there (None: every output alike).

    error: float32 (rows, row_length), treated minus original weights; gradients: float32 (tokens,
    rows), each token's as `scaled_gradients` has them.
    """
    if gradients is not None and len(gradients) > len(error):  # the cheaper order of products
        both = (gradients.T @ gradients @ error) * (error @ moments)
        return float(both.sum(dtype=torch.float64))
    seen = error if gradients is None else gradients @ error
    return float(((seen @ moments) * seen).sum(dtype=torch.float64))
