"""Error feedback: what rounding does wrong in one block of columns, the other columns make up for.

A row of W is rounded to q so that (w - q) H (w - q)' is small, H being the second moments of the
component's inputs. Block by block with ggml's own quantizer, first in one sweep in which each
block's error is passed on to the columns not yet rounded (the optimal-brain-surgeon update of
GPTQ, arXiv 2210.17323, at ggml's block granularity), then in sweeps that round each block again
with all others fixed and keep the new numbers of a row only where they are better (block
coordinate descent). The result is ordinary blocks of the GGML type.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm import ggml
from edge_dtm.errors import EdgeDtmError

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

DESCENT_SWEEPS = 2
ROWS_AT_ONCE = 192  # a few groups even in narrow matrices, wide enough for the products
MIN_DAMPING, MAX_DAMPING = 0.03, 5.0


def second_moments(inputs: torch.Tensor, token_weights: torch.Tensor | None) -> torch.Tensor:
    """H = sum_t v_t x_t x_t' / sum_t v_t, float32 (row_length, row_length).

    inputs: float32 (tokens, row_length). token_weights: float32 (tokens,), not negative: how much
    an error at that token matters; the mean square of the margins' gradient at the component's
    outputs makes H the input side of the margins' Gauss-Newton matrix. None: all alike.
    """
    if token_weights is None:
        return inputs.T @ inputs / len(inputs)
    root = (token_weights / token_weights.sum()).sqrt()[:, None]
    scaled = inputs * root
    return scaled.T @ scaled


def effective_tokens(token_weights: torch.Tensor) -> float:
    """How many equally weighted tokens know as much (Kish's effective sample size)."""
    return float(token_weights.sum().square() / token_weights.square().sum())


def damping_for(tokens: float, row_length: int) -> float:
    """Share of H's mean diagonal that is added to its diagonal.

    H's sampling noise relative to its diagonal is of the order of row_length / tokens; three times
    that did best on sequences that were not fitted to (docs/experiments.md).
    """
    return float(min(MAX_DAMPING, max(MIN_DAMPING, 3 * row_length / max(tokens, 1.0))))


class Feedback:
    """One component's damped second moments and their factors, shared by all types.

    moments: float32 (row_length, row_length), on the device that is to do the work. The factors
    are made in float64. EdgeDtmError when the moments are not finite.
    """

    def __init__(self, moments: torch.Tensor, damping: float) -> None:
        if not bool(torch.isfinite(moments).all()):
            raise EdgeDtmError(
                "a component's inputs are not finite on the calibration prompts: the model "
                "overflows there; check the checkpoint or use other --prompts"
            )
        n = len(moments)
        mean = moments.diagonal().double().mean().clamp(min=torch.finfo(torch.float32).tiny)
        self.moments = (moments.double() / mean).float()
        self.moments.diagonal().add_(damping)
        self._upper = _inverse_upper_factor(self.moments.double())
        self.importance = np.ascontiguousarray(self.moments.diagonal().cpu().numpy())
        self.row_length = n
        self._blocks: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def prepare(self, block: int) -> None:
        """Make what `blocks` gives; apart, since threads only read it."""
        if block in self._blocks:
            return
        upper, n = self._upper, self.row_length
        passing = torch.zeros_like(upper)
        damped = self.moments.double()
        inverses = []
        for a in range(0, n, block):
            b = a + block
            inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(damped[a:b, a:b])))
            if b < n:
                passing[a:b, b:] = torch.linalg.solve_triangular(
                    upper[a:b, a:b], upper[a:b, b:], upper=True
                )
        self._blocks[block] = [
            (passing[: i * block, i * block : (i + 1) * block].float().contiguous(), m.float())
            for i, m in enumerate(inverses)
        ]

    def blocks(self, block: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each block of columns: float32 (columns before, block), by which the errors of all
        earlier columns move its targets, and the inverse of its own moments, (block, block)."""
        return self._blocks[block]


def _inverse_upper_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with inverse(matrix) = U' U, without forming the inverse."""
    n = len(matrix)
    lower = torch.linalg.cholesky(matrix.flip(0, 1))
    identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def compensate(
    weights: torch.Tensor,
    types: Sequence[str],
    feedback: Feedback,
    sweeps: int = DESCENT_SWEEPS,
    threads: int | None = None,
) -> list[tuple[ByteArray, torch.Tensor]]:
    """For each GGML type its blocks, uint8 (rows, row_bytes), and the float32 values they stand
    for, (rows, row_length).

    weights: float32 (rows, row_length) on feedback's device. Rows do not depend on each other and
    are always worked on in the same groups, so the result does not depend on `threads`.
    """
    for type_name in types:
        feedback.prepare(ggml.block_size(type_name))
    edges = [*range(0, len(weights), ROWS_AT_ONCE), len(weights)]
    groups = [weights[a:b].contiguous() for a, b in pairwise(edges)]
    tasks = [(group, t) for t in types for group in groups]
    # One thread a task: ggml and torch would otherwise fight over the cores block by block.
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(
            threads or os.cpu_count() or 1, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            done = list(pool.map(lambda task: _rows(task[0], task[1], feedback, sweeps), tasks))
    finally:
        torch.set_num_threads(before)
    out = []
    for i in range(len(types)):
        parts = done[i * len(groups) : (i + 1) * len(groups)]
        out.append((np.concatenate([p[0] for p in parts]), torch.cat([p[1] for p in parts])))
    return out


@torch.no_grad()
def _rows(
    weights: torch.Tensor, type_name: str, feedback: Feedback, sweeps: int
) -> tuple[ByteArray, torch.Tensor]:
    """compensate for one type and some rows, on the calling thread."""
    n = weights.shape[1]
    block = ggml.block_size(type_name)
    block_bytes = ggml.row_bytes(type_name, block)
    data = np.empty((len(weights), n // block * block_bytes), dtype=np.uint8)
    values, error = torch.empty_like(weights), torch.empty_like(weights)
    moments, blocks = feedback.moments, feedback.blocks(block)

    def rounded(target: torch.Tensor, a: int) -> tuple[ByteArray, torch.Tensor]:
        importance = feedback.importance[a : a + block]
        part = ggml.quantize(type_name, target.cpu().numpy(), importance, threads=1)
        found = torch.from_numpy(ggml.dequantize(type_name, part, block, threads=1))
        return part, found.to(weights.device)

    for i, (passing, _) in enumerate(blocks):
        here = slice(i * block, (i + 1) * block)
        target = weights[:, here] - error[:, : here.start] @ passing
        part, found = rounded(target, here.start)
        data[:, i * block_bytes : (i + 1) * block_bytes] = part
        values[:, here] = found
        error[:, here] = target - found
    error = weights - values
    for _ in range(sweeps):
        for i, (_, inverse) in enumerate(blocks):
            here = slice(i * block, (i + 1) * block)
            own = moments[here, here]
            others = error @ moments[:, here] - error[:, here] @ own
            target = weights[:, here] + others @ inverse
            part, found = rounded(target, here.start)
            old, new = target - values[:, here], target - found
            better = ((new @ own) * new).sum(1) < ((old @ own) * old).sum(1)
            values[:, here] = torch.where(better[:, None], found, values[:, here])
            error[:, here] = weights[:, here] - values[:, here]
            which = better.cpu().numpy()
            data[which, i * block_bytes : (i + 1) * block_bytes] = part[which]
    return data, values


def local_error(error: torch.Tensor, moments: torch.Tensor) -> float:
    """Mean square of the component's output error, summed over rows: sum of diag(E H E').

    error: float32 (rows, row_length), treated minus original weights.
    """
    return float(((error @ moments) * error).sum(dtype=torch.float64))
