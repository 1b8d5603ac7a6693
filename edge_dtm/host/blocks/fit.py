"""What a block's matrices are rounded and pruned with, as the equalized model has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.plan import Component
from edge_dtm.host.blocks.statistics import SITE_OF, Statistics
from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.quantize.equalize import (
    STRENGTHS,
    Scales,
    consumers,
    input_scale,
    output_scale,
    rounding_harm,
    site_scales,
)
from edge_dtm.host.quantize.hessian import DampedHessian, damping_for

FloatArray = npt.NDArray[np.float32]
ROW_STEP = 4  # every fourth row is enough to tell strengths apart


def part_of(name: str) -> str:
    """`blk.3.ffn_down` -> `ffn_down`."""
    return name.rpartition(".")[2]


@dataclass(frozen=True)
class Fit:
    """One matrix's Hessians: importance for ggml's quantizer, float32 (row_length,), mean squares of
    the inputs, (row_length,), and the damped Hessians of both sides; outputs may be of some rows."""

    importance: FloatArray
    squares: torch.Tensor
    inputs: DampedHessian
    outputs: DampedHessian


def fit_of(
    statistics: Statistics,
    component: Component,
    scales: Scales,
    config: ModelConfig,
    vector: FloatArray | None = None,
    rows: torch.Tensor | None = None,
) -> Fit:
    """vector: importance in place of our own, float32 (row_length,). rows: int64, those that are
    rounded; None: all."""
    name, part = component.name, part_of(component.name)
    device = statistics[f"hessian.{part}"].device
    hessian = statistics[f"hessian.{part}"]
    squares = statistics[f"squares.{SITE_OF[part]}"]
    scale = input_scale(scales, name)
    if scale is not None:
        s = torch.from_numpy(scale).to(device)
        hessian, squares = s[:, None] * hessian * s, squares * s.double().square()
    importance = importance_of(statistics, component, scales)
    damping = damping_for(float(statistics[f"known.{part}"]), component.row_length)
    inputs = DampedHessian(hessian, damping)
    if vector is not None:
        importance = vector
        inputs.importance = vector / max(float(vector.mean()), 1e-30) + np.float32(damping)
    outputs = output_hessian(statistics, component, scales, config, rows)
    return Fit(importance, squares.float(), inputs, outputs)


def output_hessian(
    statistics: Statistics,
    component: Component,
    scales: Scales,
    config: ModelConfig,
    rows: torch.Tensor | None = None,
) -> DampedHessian:
    """Of the margins' gradients at a matrix's outputs. rows: int64, those wanted; None: all that
    were gathered."""
    part, out = part_of(component.name), output_scale(scales, component.name, config)
    moments, at = statistics[f"moments.{part}"], statistics[f"moment_rows.{part}"]
    if rows is not None and len(rows) < len(at):
        some = torch.isin(at, rows.to(at.device))
        moments, at = moments[some][:, some], at[some]
    if out is not None:
        o = torch.from_numpy(out).to(moments.device)[at]
        moments = moments / o[:, None] / o
    damping = damping_for(float(statistics[f"output_known.{part}"]), component.rows)
    return DampedHessian(moments, damping)


def importance_of(statistics: Statistics, component: Component, scales: Scales) -> FloatArray:
    """What plain rounding weighs errors with, float32 (row_length,)."""
    diagonal = statistics[f"hessian.{part_of(component.name)}"].diagonal().cpu().numpy()
    scale = input_scale(scales, component.name)
    return np.ascontiguousarray(diagonal if scale is None else diagonal * scale * scale)


def find_scales(
    statistics: Statistics, site: str, config: ModelConfig, weights: Mapping[str, FloatArray]
) -> FloatArray:
    """The scales of one site of a block, float32 (row_length,), of the strength that lowers the harm
    of rounding most; ones where none does.

    site: `blk.3.attn_q`. weights: component -> float32 (rows, row_length).
    """
    part = part_of(site)
    x = statistics[f"sample.{part}"].cpu()
    x2 = statistics[f"squares.{part}"].cpu().numpy()
    b2 = statistics[f"gradient_squares.{part}"].cpu().numpy()
    some = [weights[c][::ROW_STEP] for c in consumers(site)]
    rows = [
        statistics[f"output_squares.{part_of(c)}"].cpu().numpy()[::ROW_STEP]
        for c in consumers(site)
    ]
    return best_scales(x, x2, b2, some, rows, site, config)


def best_scales(
    x: torch.Tensor,
    x2: npt.NDArray[np.float64],
    b2: npt.NDArray[np.float64],
    weights: list[FloatArray],
    rows: list[npt.NDArray[np.float64]],
    site: str,
    config: ModelConfig,
) -> FloatArray:
    """Arguments as in `rounding_harm`."""
    best: tuple[float, FloatArray] | None = None
    for strength in STRENGTHS:
        s = site_scales(site, x2, b2, config, strength)
        harm = rounding_harm(x, x2, b2, weights, rows, s, ROW_STEP)
        if best is None or harm < best[0]:
            best = (harm, s)
    assert best is not None
    return best[1]
