"""Which weights of a row become zero, and what the others become to make up for it.

A mask is a grid: zero where it prunes, all real numbers elsewhere. The best point of it is found
by least squares, in the metric in which GPTQ rounds (gptq.py): the quantizer's
blocks then round it with the zeros held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.machine import default_threads
from edge_dtm.formats.plan import Treatment, zeros_per_row
from edge_dtm.host.quantize.gptq import gptq_quantize
from edge_dtm.host.quantize.hessian import DampedHessian
from edge_dtm.host.threads import torch_threads
from edge_dtm.llamacpp import ggml

SCORES = ("activation", "saliency", "magnitude")  # the first measured best
REFIT_STEPS = 12  # forty lower the measured cost by 2 % more (docs/experiments.md)


def prune_scores(
    weights: torch.Tensor, kind: str, hessian: DampedHessian, importance: torch.Tensor
) -> torch.Tensor:
    """float32 (rows, row_length): in each row the weights of the lowest scores are pruned.

    weights: float32 (rows, row_length). importance: float32 (row_length,), the mean squares of the
    inputs. kind: `magnitude` |w_j|; `activation` |w_j| |x_j|, x_j the root mean square of the input
    (Wanda, arXiv 2306.11695); `saliency` |w_j| / sqrt([H^-1]_jj), the error once all other weights
    have made up for it (the optimal brain surgeon of SparseGPT, arXiv 2301.00774).
    """
    if kind == "activation":
        return weights.abs() * importance.sqrt()
    if kind == "saliency":
        return weights.abs() * hessian.inverse_diagonal.rsqrt()
    return weights.abs()


def kept_weights(scores: torch.Tensor, zero_share: float) -> torch.Tensor:
    """bool (rows, row_length): False where pruned, the same number in every row. Ties go to the
    lower column, so that the result is the same everywhere."""
    count = zeros_per_row(scores.shape[1], zero_share)
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)


def refit(
    weights: torch.Tensor,
    kept: torch.Tensor,
    hessian: DampedHessian,
    outputs: DampedHessian | None = None,
    steps: int = REFIT_STEPS,
) -> torch.Tensor:
    """The Q that is zero where `kept` is False and makes tr(G (W - Q) H (W - Q)') least, float32
    (rows, row_length), by that many steps of conjugate gradients.

    H and G are the damped Hessians of the inputs and of the outputs (None: rows on their own).
    """
    h, g = hessian.damped, None if outputs is None else outputs.damped

    def metric(m: torch.Tensor) -> torch.Tensor:
        product = (m if g is None else g @ m) @ h
        return product * kept

    diagonal = h.diagonal()[None].clamp(min=torch.finfo(torch.float32).tiny)
    if g is not None:
        diagonal = diagonal * g.diagonal()[:, None].clamp(min=1e-30)
    values = weights * kept
    residual = metric(weights - values)
    scaled = residual / diagonal
    direction, size = scaled, (residual * scaled).sum(dtype=torch.float64)
    for _ in range(steps):
        curved = metric(direction)
        curvature = (direction * curved).sum(dtype=torch.float64)
        if not float(curvature) > 0:  # nothing left to gain
            break
        step = (size / curvature).float()
        values = values + step * direction
        residual = residual - step * curved
        scaled = residual / diagonal
        before, size = size, (residual * scaled).sum(dtype=torch.float64)
        direction = scaled + (size / before).float() * direction
    return values * kept


@torch.no_grad()
def fit_masks(
    weights: torch.Tensor,
    treatments: Sequence[Treatment],
    hessian: DampedHessian,
    outputs: DampedHessian | None,
    importance: torch.Tensor,
    score: str = SCORES[0],
    threads: int | None = 1,
    group: int | None = None,
) -> list[tuple[npt.NDArray[np.uint8], torch.Tensor]]:
    """For each treatment with zeros, in F16 or Q8_0, its blocks, uint8 (rows, row_bytes), and the
    float32 values they stand for, (rows, row_length).

    weights: float32 (rows, row_length). importance: float32 (row_length,), mean squares of the
    inputs. group: see `gptq_quantize`. Each level is fitted on its own, so that a level that is made again alone, when it is
    exported, comes out the same.
    """
    encoded: dict[Treatment, tuple[npt.NDArray[np.uint8], torch.Tensor]] = {}
    with torch_threads(threads or default_threads()):
        scores = prune_scores(weights, score, hessian, importance)
        kept = {s: kept_weights(scores, s) for s in {t.zero_share for t in treatments}}
        values = {s: refit(weights, k, hessian, outputs) for s, k in sorted(kept.items())}
    for t in treatments:
        if t.type == "F16":
            data = ggml.quantize("F16", values[t.zero_share].cpu().numpy(), threads=threads)
            encoded[t] = data, values[t.zero_share].half().float()
    others = [t for t in treatments if t.type != "F16"]
    if others:
        rounded = gptq_quantize(
            torch.stack([values[t.zero_share] for t in others]),
            [t.type for t in others],
            hessian,
            outputs,
            threads=threads,
            kept=torch.stack([kept[t.zero_share] for t in others]),
            group=group,
        )
        encoded |= dict(zip(others, rounded, strict=True))
    return [encoded[t] for t in treatments]
