"""GPTQ at ggml's block granularity: what rounding does wrong in one block of columns, the other
columns make up for.

A row of W is rounded to q so that (w - q) H (w - q)' is small, H being the Hessian (second moments)
of the component's inputs. ggml's own quantizer rounds block by block, first in one sweep in which
each block's error is passed on to the columns not yet rounded (the optimal-brain-surgeon update of
GPTQ, arXiv 2210.17323), then in sweeps that round each block again with all others fixed and keep
the new numbers of a row only where they are better (block coordinate descent). With the Hessian of
the outputs (second moments of the margins' gradients there), rows make up for each other in the
same way. The result is ordinary blocks of the GGML type.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.machine import default_threads
from edge_dtm.formats import ggml_types
from edge_dtm.host.quantize.hessian import DampedHessian
from edge_dtm.host.threads import torch_threads
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

DESCENT_SWEEPS = 1
ROW_GROUPS = 24
ROWS_AT_ONCE = 192  # a few groups even in narrow matrices, wide enough for the products
ROWS_A_TASK = 64  # for a thread: a millisecond of ggml's work at most
SIDE_BY_SIDE_WEIGHTS = 2**26  # of all types together; bounds the memory


def gptq_quantize(
    weights: torch.Tensor,
    types: Sequence[str],
    hessian: DampedHessian,
    outputs: DampedHessian | None = None,
    sweeps: int = DESCENT_SWEEPS,
    threads: int | None = None,
    kept: torch.Tensor | None = None,
    group: int | None = None,
) -> list[tuple[ByteArray, torch.Tensor]]:
    """For each GGML type its blocks, uint8 (rows, row_bytes), and the float32 values they stand
    for, (rows, row_length).

    weights: float32 (rows, row_length) on hessian's device, or (types, rows, row_length), others
    for each type. outputs: the same of the component's outputs, (rows, rows): then rows make up
    for each other too. kept: bool (types, rows, row_length), False where a mask holds a zero.
    group: how many rows are rounded side by side, None: as fits their number. The work is divided
    the same way whatever `threads`, so the result does not depend on it.
    """
    group = group or group_rows(weights.shape[-2])
    rows, each = weights.shape[-2], weights.expand(len(types), -1, -1)
    sizes = [ggml_types.block_size(t) for t in types]
    for size in sizes:
        hessian.blocks(size)  # made before threads ask for them
    if outputs is None:
        edges = [*range(0, rows, ROWS_AT_ONCE), rows]
        parts = [slice(a, b) for a, b in pairwise(edges)]
        batches = [[j] for j in range(len(types))]
    else:
        parts = [slice(0, rows)]
        # Types of one block size go through the many small steps side by side, where they fit.
        at_once = max(1, SIDE_BY_SIDE_WEIGHTS // (rows * weights.shape[-1]))
        batches = [
            same[i : i + at_once]
            for size in sorted(set(sizes))
            for same in [[j for j, n in enumerate(sizes) if n == size]]
            for i in range(0, len(same), at_once)
        ]
    tasks = [(part, batch) for batch in batches for part in parts]
    count = threads or default_threads()
    # torch and threads of our own would fight over the cores where both are at work at a time.
    with (
        torch_threads(1 if outputs is None else count),
        ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        inside = pool if outputs is not None and count > 1 else None

        def work(task: tuple[slice, list[int]]) -> tuple[list[ByteArray], torch.Tensor]:
            part, batch = task
            some = each[:, part][batch]
            mask = None if kept is None else kept[:, part][batch]
            names = [types[j] for j in batch]
            return _quantize_rows(some, names, (hessian, outputs), sweeps, inside, mask, group)

        done = list((pool.map if outputs is None else map)(work, tasks))
    encoded: list[list[tuple[ByteArray, torch.Tensor]]] = [[] for _ in types]
    for (_, batch), results in zip(tasks, done, strict=True):
        for j, data, values in zip(batch, *results, strict=True):
            encoded[j].append((data, values))
    return [(np.concatenate([d for d, _ in f]), torch.cat([v for _, v in f])) for f in encoded]


def group_rows(rows: int) -> int:
    """How many of a matrix's rows are rounded side by side; few groups keep the many small products
    of a large matrix affordable."""
    return 32 * max(1, round(rows / 32 / ROW_GROUPS))


@torch.no_grad()
def _quantize_rows(
    weights: torch.Tensor,
    types: Sequence[str],
    hessians: tuple[DampedHessian, DampedHessian | None],
    sweeps: int,
    pool: ThreadPoolExecutor | None,
    kept: torch.Tensor | None,
    size: int,
) -> tuple[list[ByteArray], torch.Tensor]:
    """`gptq_quantize` for types of one block size; weights and values are (types, rows, row_length).

    With `outputs` tr(G E H E') is made small, E = w - q, G and H the moments of the margins'
    gradients at the outputs and of the inputs. Given the errors of other rows, the best real
    numbers for a group of rows r lie at w_r + G_rr^-1 sum_s G_rs E_s whatever H is (in the first
    pass: with the rows still to come free to follow), and H decides how to round to these. This
    is two-sided rounding as in YAQA (arXiv 2505.22988), by groups of rows.
    """
    (hessian, outputs), rows = hessians, weights.shape[1]
    rounder = _Rounder(types, hessian, rows, weights.device, pool, kept)
    if outputs is None:
        here, target = slice(0, rows), weights
        rounder.gptq_sweep(target, here)
        for _ in range(sweeps):
            rounder.descent_sweep(target, here)
        return rounder.data, rounder.values
    moments = outputs.damped
    groups = outputs.blocks(size)
    shifted = torch.empty_like(rounder.values)
    for i, (passing, _) in enumerate(groups):
        here = slice(i * size, min((i + 1) * size, rows))
        target = weights[:, here] - passing.T @ shifted[:, : here.start]
        rounder.gptq_sweep(target, here)
        shifted[:, here] = target - rounder.values[:, here]
    error = weights - rounder.values
    for _ in range(sweeps):
        for i, (_, inverse) in enumerate(groups):
            here = slice(i * size, min((i + 1) * size, rows))
            others = moments[here] @ error - moments[here, here] @ error[:, here]
            rounder.descent_sweep(weights[:, here] + inverse @ others, here)
            error[:, here] = weights[:, here] - rounder.values[:, here]
    return rounder.data, rounder.values


class _Rounder:
    """Blocks and values of one matrix as they come to be, for some rows at a time, in several
    types of one block size. values: (types, rows, row_length)."""

    def __init__(
        self,
        types: Sequence[str],
        hessian: DampedHessian,
        rows: int,
        device: torch.device,
        pool: ThreadPoolExecutor | None,
        kept: torch.Tensor | None,
    ) -> None:
        self.types, self.hessian, self.pool, self.kept = types, hessian, pool, kept
        self.block = ggml_types.block_size(types[0])
        count = hessian.row_length // self.block
        self.block_bytes = [ggml_types.row_bytes(t, self.block) for t in types]
        self.data = [np.empty((rows, count * n), dtype=np.uint8) for n in self.block_bytes]
        self.values = torch.empty((len(types), rows, hessian.row_length), device=device)

    def _round(
        self, target: torch.Tensor, columns: slice, rows: slice
    ) -> tuple[list[ByteArray], torch.Tensor]:
        """target: (types * rows, block). Each type's blocks, and the values in target's shape."""
        if self.kept is not None:
            target = target * self.kept[:, rows, columns].reshape(target.shape)
        wanted = target.cpu().numpy().reshape(len(self.types), -1, self.block)
        rounded = np.empty_like(wanted)
        importance = self.hessian.importance[columns]

        count = wanted.shape[1]
        blocks = [np.empty((count, n), dtype=np.uint8) for n in self.block_bytes]
        step = count if self.pool is None else ROWS_A_TASK

        def work(task: tuple[int, int]) -> None:
            j, here = task[0], slice(task[1], task[1] + step)
            blocks[j][here] = ggml.quantize(self.types[j], wanted[j, here], importance, threads=1)
            rounded[j, here] = ggml.dequantize(
                self.types[j], blocks[j][here], self.block, threads=1
            )

        tasks = product(range(len(self.types)), range(0, count, step))
        list((self.pool.map if self.pool else map)(work, tasks))
        return blocks, torch.from_numpy(rounded).to(target.device).view(target.shape)

    def _keep(self, parts: list[ByteArray], rows: slice, block: int, which: BoolArray) -> None:
        """which: (types, rows), those whose new blocks are taken."""
        for j, (part, n) in enumerate(zip(parts, self.block_bytes, strict=True)):
            at = np.flatnonzero(which[j])
            self.data[j][rows.start + at, block * n : (block + 1) * n] = part[at]

    def gptq_sweep(self, target: torch.Tensor, rows: slice) -> None:
        """Round rows to `target`, (types, rows, row_length), each block's error passed on to the
        columns behind it."""
        shape = target.shape
        target = target.reshape(-1, shape[-1])
        error, values = torch.empty_like(target), torch.empty_like(target)
        everywhere = np.ones(shape[:2], dtype=np.bool_)
        for i, (passing, _) in enumerate(self.hessian.blocks(self.block)):
            here = slice(i * self.block, (i + 1) * self.block)
            moved = target[:, here] - error[:, : here.start] @ passing
            parts, rounded = self._round(moved, here, rows)
            self._keep(parts, rows, i, everywhere)
            values[:, here] = rounded
            error[:, here] = moved - rounded
        self.values[:, rows] = values.view(shape)

    def descent_sweep(self, target: torch.Tensor, rows: slice) -> None:
        """Round each block of the rows again, all others fixed; keep what is better."""
        moments, shape = self.hessian.damped, target.shape
        target = target.reshape(-1, shape[-1])
        values = self.values[:, rows].clone().view(target.shape)
        error = target - values
        for i, (_, inverse) in enumerate(self.hessian.blocks(self.block)):
            here = slice(i * self.block, (i + 1) * self.block)
            own = moments[here, here]
            others = error @ moments[:, here] - error[:, here] @ own
            moved = target[:, here] + others @ inverse
            parts, rounded = self._round(moved, here, rows)
            old, new = moved - values[:, here], moved - rounded
            better = ((new @ own) * new).sum(1) < ((old @ own) * old).sum(1)
            values[:, here] = torch.where(better[:, None], rounded, values[:, here])
            error[:, here] = target[:, here] - values[:, here]
            self._keep(parts, rows, i, better.view(shape[:2]).cpu().numpy())
        self.values[:, rows] = values.view(shape)
