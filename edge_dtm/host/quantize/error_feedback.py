"""Error feedback: what rounding does wrong in one block of columns, the other columns make up for.

A row of W is rounded to q so that (w - q) H (w - q)' is small, H being the second moments of the
component's inputs. Block by block with ggml's own quantizer, first in one sweep in which each
block's error is passed on to the columns not yet rounded (the optimal-brain-surgeon update of
GPTQ, arXiv 2210.17323, at ggml's block granularity), then in sweeps that round each block again
with all others fixed and keep the new numbers of a row only where they are better (block
coordinate descent). With the moments of the margins' gradients at the outputs, rows make up for
each other in the same way. The result is ordinary blocks of the GGML type.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import ggml_types
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

DESCENT_SWEEPS = 1
ROW_GROUPS = 24
ROWS_AT_ONCE = 192  # a few groups even in narrow matrices, wide enough for the products
ROWS_A_TASK = 64  # for a thread: a millisecond of ggml's work at most
MIN_DAMPING, MAX_DAMPING = 0.03, 5.0


def second_moments(inputs: torch.Tensor, token_weights: torch.Tensor | None) -> torch.Tensor:
    """H = sum_t v_t x_t x_t' / sum_t v_t, float32 (row_length, row_length).

    inputs: float32 (tokens, row_length). token_weights: float32 (tokens,), not negative: how much
    an error at that token matters, see Calibration.token_weights. None: all alike.
    """
    if token_weights is None or not float(token_weights.sum()):  # no margin hears of it
        return inputs.T @ inputs / len(inputs)
    root = (token_weights / token_weights.sum()).sqrt()[:, None]
    scaled = inputs * root
    return scaled.T @ scaled


def gradient_moments(gradients: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
    """G = sum_t g_t g_t' / v_t, float32 (rows, rows), v_t being the size of g_t, so that each
    token counts by its size as it does in `second_moments`.

    gradients: float32 (tokens, rows); token_weights: float32 (tokens,), not negative.
    """
    scaled = scaled_gradients(gradients, token_weights)
    return scaled.T @ scaled


def scaled_gradients(gradients: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
    """g_t / sqrt(v_t), float32 (tokens, rows)."""
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


class Feedback:
    """One component's damped second moments and their factors, shared by all types.

    moments: float32 (row_length, row_length), on the device that is to do the work; damping: see
    damping_for, None when they are damped already. The factors are made in float64. EdgeDtmError
    when the moments are not finite.
    """

    def __init__(self, moments: torch.Tensor, damping: float | None) -> None:
        if not bool(torch.isfinite(moments).all()):
            raise EdgeDtmError(
                "a component's inputs are not finite on the calibration prompts: the model "
                "overflows there; check the checkpoint or use other --prompts"
            )
        n = len(moments)
        mean = moments.diagonal().double().mean().clamp(min=torch.finfo(torch.float32).tiny)
        self.moments = moments if damping is None else (moments.double() / mean).float()
        if damping is not None:
            self.moments.diagonal().add_(damping)
        self._upper = _inverse_upper_factor(self.moments.double())
        self.importance = np.ascontiguousarray(self.moments.diagonal().cpu().numpy())
        self.inverse_diagonal = self._upper.square().sum(0).float()
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
    outputs: Feedback | None = None,
    sweeps: int = DESCENT_SWEEPS,
    threads: int | None = None,
    kept: torch.Tensor | None = None,
) -> list[tuple[ByteArray, torch.Tensor]]:
    """For each GGML type its blocks, uint8 (rows, row_bytes), and the float32 values they stand
    for, (rows, row_length).

    weights: float32 (rows, row_length) on feedback's device, or (types, rows, row_length), others
    for each type. outputs: the same of the component's outputs, (rows, rows): then rows make up
    for each other too. kept: bool (types, rows, row_length), False where a mask holds a zero. The
    work is divided the same way whatever `threads`, so the result does not depend on it.
    """
    rows = weights.shape[-2]
    for type_name in types:
        feedback.prepare(ggml_types.block_size(type_name))
    if outputs is None:
        edges = [*range(0, rows, ROWS_AT_ONCE), rows]
        parts = [slice(a, b) for a, b in pairwise(edges)]
        batches = [[j] for j in range(len(types))]
    else:
        outputs.prepare(_group_rows(rows))
        parts = [slice(0, rows)]
        # Types of one block size go through the many small steps side by side.
        sizes = sorted({ggml_types.block_size(t) for t in types})
        batches = [
            [j for j, t in enumerate(types) if ggml_types.block_size(t) == size] for size in sizes
        ]
    tasks = [(part, batch) for batch in batches for part in parts]
    count = threads or os.cpu_count() or 1
    # torch and threads of our own would fight over the cores.
    with (
        one_torch_thread(),
        ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        inside = pool if outputs is not None and count > 1 else None

        def work(task: tuple[slice, list[int]]) -> tuple[list[ByteArray], torch.Tensor]:
            part, batch = task
            some = weights if weights.ndim == 2 else weights[batch]
            some = some[..., part, :].contiguous()
            held = None if kept is None else kept[batch][:, part]
            names = [types[j] for j in batch]
            return _compensate(some, names, feedback, outputs, sweeps, inside, held)

        done = list((pool.map if outputs is None else map)(work, tasks))
    found: list[list[tuple[ByteArray, torch.Tensor]]] = [[] for _ in types]
    for (_, batch), made in zip(tasks, done, strict=True):
        for j, data, values in zip(batch, *made, strict=True):
            found[j].append((data, values))
    return [(np.concatenate([d for d, _ in f]), torch.cat([v for _, v in f])) for f in found]


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Products on one thread: the same bits whatever else is going on, and cores left to others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _group_rows(rows: int) -> int:
    """Rows that are rounded side by side; few groups keep the many small products of a large
    matrix affordable."""
    return 32 * max(1, round(rows / 32 / ROW_GROUPS))


@torch.no_grad()
def _compensate(
    weights: torch.Tensor,
    types: Sequence[str],
    feedback: Feedback,
    outputs: Feedback | None,
    sweeps: int,
    pool: ThreadPoolExecutor | None,
    kept: torch.Tensor | None = None,
) -> tuple[list[ByteArray], torch.Tensor]:
    """`compensate` for types of one block size; the values are (types, rows, row_length).

    With `outputs` tr(G E H E') is made small, E = w - q, G and H the moments of the margins'
    gradients at the outputs and of the inputs. Given the errors of other rows, the best real
    numbers for a group of rows r lie at w_r + G_rr^-1 sum_s G_rs E_s whatever H is (in the first
    pass: with the rows still to come free to follow), and H decides how to round to these. This
    is two-sided rounding as in YAQA (arXiv 2505.22988), by groups of rows.
    """
    weights = weights.expand(len(types), -1, -1)
    rows = weights.shape[1]
    rounder = _Rounder(types, feedback, rows, weights.device, pool, kept)
    if outputs is None:
        here, target = slice(0, rows), weights
        rounder.pass_on(target, here)
        for _ in range(sweeps):
            rounder.descend(target, here)
        return rounder.data, rounder.values
    size, moments = _group_rows(rows), outputs.moments
    groups = outputs.blocks(size)
    shifted = torch.empty_like(rounder.values)
    for i, (passing, _) in enumerate(groups):
        here = slice(i * size, min((i + 1) * size, rows))
        target = weights[:, here] - passing.T @ shifted[:, : here.start]
        rounder.pass_on(target, here)
        shifted[:, here] = target - rounder.values[:, here]
    error = weights - rounder.values
    for _ in range(sweeps):
        for i, (_, inverse) in enumerate(groups):
            here = slice(i * size, min((i + 1) * size, rows))
            others = moments[here] @ error - moments[here, here] @ error[:, here]
            rounder.descend(weights[:, here] + inverse @ others, here)
            error[:, here] = weights[:, here] - rounder.values[:, here]
    return rounder.data, rounder.values


class _Rounder:
    """Blocks and values of one matrix as they come to be, for some rows at a time, in several
    types of one block size. values: (types, rows, row_length)."""

    def __init__(
        self,
        types: Sequence[str],
        feedback: Feedback,
        rows: int,
        device: torch.device,
        pool: ThreadPoolExecutor | None,
        kept: torch.Tensor | None = None,
    ) -> None:
        self.types, self.feedback, self.pool, self.kept = types, feedback, pool, kept
        self.block = ggml_types.block_size(types[0])
        count = feedback.row_length // self.block
        self.block_bytes = [ggml_types.row_bytes(t, self.block) for t in types]
        self.data = [np.empty((rows, count * n), dtype=np.uint8) for n in self.block_bytes]
        self.values = torch.empty((len(types), rows, feedback.row_length), device=device)

    def _round(
        self, target: torch.Tensor, columns: slice, rows: slice
    ) -> tuple[list[ByteArray], torch.Tensor]:
        """target: (types * rows, block). Each type's blocks, and the values in target's shape."""
        if self.kept is not None:
            target = target * self.kept[:, rows, columns].reshape(target.shape)
        wanted = target.cpu().numpy().reshape(len(self.types), -1, self.block)
        found = np.empty_like(wanted)
        importance = self.feedback.importance[columns]

        count = wanted.shape[1]
        step = count if self.pool is None else ROWS_A_TASK
        tasks = [
            (j, slice(a, a + step)) for j in range(len(self.types)) for a in range(0, count, step)
        ]

        def work(task: tuple[int, slice]) -> ByteArray:
            j, here = task
            part = ggml.quantize(self.types[j], wanted[j, here], importance, threads=1)
            found[j, here] = ggml.dequantize(self.types[j], part, self.block, threads=1)
            return part

        made: list[list[ByteArray]] = [[] for _ in self.types]
        for (j, _), part in zip(
            tasks, (self.pool.map if self.pool else map)(work, tasks), strict=True
        ):
            made[j].append(part)
        parts = [np.concatenate(m) if len(m) > 1 else m[0] for m in made]
        return parts, torch.from_numpy(found).to(target.device).view(target.shape)

    def _keep(self, parts: list[ByteArray], rows: slice, block: int, which: BoolArray) -> None:
        """which: (types, rows), those whose new blocks are taken."""
        for j, (part, n) in enumerate(zip(parts, self.block_bytes, strict=True)):
            at = np.flatnonzero(which[j])
            self.data[j][rows.start + at, block * n : (block + 1) * n] = part[at]

    def pass_on(self, target: torch.Tensor, rows: slice) -> None:
        """Round rows to `target`, (types, rows, row_length), each block's error passed on to the
        columns behind it."""
        shape = target.shape
        target = target.reshape(-1, shape[-1])
        error, values = torch.empty_like(target), torch.empty_like(target)
        everywhere = np.ones(shape[:2], dtype=np.bool_)
        for i, (passing, _) in enumerate(self.feedback.blocks(self.block)):
            here = slice(i * self.block, (i + 1) * self.block)
            moved = target[:, here] - error[:, : here.start] @ passing
            parts, found = self._round(moved, here, rows)
            self._keep(parts, rows, i, everywhere)
            values[:, here] = found
            error[:, here] = moved - found
        self.values[:, rows] = values.view(shape)

    def descend(self, target: torch.Tensor, rows: slice) -> None:
        """Round each block of the rows again, all others fixed; keep what is better."""
        moments, shape = self.feedback.moments, target.shape
        target = target.reshape(-1, shape[-1])
        values = self.values[:, rows].clone().view(target.shape)
        error = target - values
        for i, (_, inverse) in enumerate(self.feedback.blocks(self.block)):
            here = slice(i * self.block, (i + 1) * self.block)
            own = moments[here, here]
            others = error @ moments[:, here] - error[:, here] @ own
            moved = target[:, here] + others @ inverse
            parts, found = self._round(moved, here, rows)
            old, new = moved - values[:, here], moved - found
            better = ((new @ own) * new).sum(1) < ((old @ own) * old).sum(1)
            values[:, here] = torch.where(better[:, None], found, values[:, here])
            error[:, here] = target[:, here] - values[:, here]
            self._keep(parts, rows, i, better.view(shape[:2]).cpu().numpy())
        self.values[:, rows] = values.view(shape)


def local_error(
    error: torch.Tensor, moments: torch.Tensor, gradients: torch.Tensor | None = None
) -> float:
    """tr(G E H E'): what an error E of the weights does to the component's outputs, G = g' g being
    the moments of the margins' gradients g there (None: every output alike).

    error: float32 (rows, row_length), treated minus original weights; gradients: float32 (tokens,
    rows), each token's scaled as for `gradient_moments`.
    """
    seen = error if gradients is None else gradients @ error
    return float(((seen @ moments) * seen).sum(dtype=torch.float64))
