"""What a component is rounded and pruned with, and which of its roundings error feedback improves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.host.blocks.activations import Activations
from edge_dtm.host.blocks.calibration import Calibration
from edge_dtm.host.blocks.capture import EMBEDDED
from edge_dtm.host.blocks.encoded import takes_feedback
from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.quantize.equalize import Scales, input_scale, output_scale
from edge_dtm.host.quantize.gptq import gptq_quantize
from edge_dtm.host.quantize.hessian import (
    DampedHessian,
    damping_for,
    effective_tokens,
    input_hessian,
    local_error,
    output_hessian,
    scaled_gradients,
)
from edge_dtm.host.quantize.masks import SCORES, fit_masks
from edge_dtm.host.quantize.treat import treated_values

FloatArray = npt.NDArray[np.float32]

JUDGED_STEP = 4  # of the measured tokens a quarter is enough to choose between two roundings
CLEAR = 0.8  # a local error that much smaller on a quarter of the rows needs no look at the rest
ROW_STEP = 4  # of the rows a quarter, for that look


@dataclass(frozen=True)
class Hessians:
    """What one component is rounded and pruned with: importance for ggml's quantizer and mean
    squares of the inputs, float32 (row_length,), and the damped Hessians of both sides."""

    importance: FloatArray
    squares: torch.Tensor
    inputs: DampedHessian
    outputs: DampedHessian


@torch.no_grad()
def component_hessians(
    calibration: Calibration,
    scales: Scales,
    config: ModelConfig | None,
    component: Component,
    device: torch.device,
    vector: FloatArray | None = None,
) -> Hessians:
    """A block matrix's Hessians on the sequences that are fitted to, as the equalized model has
    them where scales and config are given. vector: importance in place of our own."""
    name = component.name

    def on_device(array: FloatArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    scale = input_scale(scales, name)
    x, v = on_device(calibration.inputs(name)), on_device(calibration.token_weights(name))
    squares = calibration.input_squares(name)
    if scale is not None:
        x *= on_device(scale)
        squares = squares * np.square(scale, dtype=np.float64)
    hessian = input_hessian(x, v)
    importance = np.ascontiguousarray(hessian.diagonal().cpu().numpy())
    damping = damping_for(effective_tokens(v), component.row_length)
    inputs = DampedHessian(hessian, damping)
    if vector is not None:
        importance = vector
        inputs.importance = vector / max(float(vector.mean()), 1e-30) + np.float32(damping)
    outputs = component_output_hessian(calibration, scales, config, component, device)
    return Hessians(importance, on_device(squares.astype(np.float32)), inputs, outputs)


@torch.no_grad()
def component_output_hessian(
    calibration: Calibration,
    scales: Scales,
    config: ModelConfig | None,
    component: Component,
    device: torch.device,
) -> DampedHessian:
    """The damped Hessian of a block matrix's outputs, of the margins' gradients there."""
    name = component.name
    out = output_scale(scales, name, config) if config is not None else None
    g = torch.from_numpy(calibration.gradients(name)).to(device)
    v = torch.from_numpy(calibration.token_weights(name)[: calibration.output_tokens]).to(device)
    if out is not None:
        g /= torch.from_numpy(out).to(device)
    return DampedHessian(output_hessian(g, v), damping_for(effective_tokens(v), component.rows))


@torch.no_grad()
def fit_component(
    calibration: Calibration,
    activations: Activations,
    component: Component,
    treatments: Sequence[Treatment],
    weights: FloatArray,
    device: torch.device,
    vector: FloatArray | None = None,
    score: str = SCORES[0],
) -> tuple[FloatArray, dict[Treatment, tuple[npt.NDArray[np.uint8], torch.Tensor]]]:
    """Importance for plain rounding, float32 (row_length,), and for each treatment whose local
    error on the measured sequences feedback lowers: its bytes and values, in HF's row order.
    vector: importance in place of our own. score: see masks.SCORES."""
    name = component.name

    def on_device(array: FloatArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    m = component_hessians(
        calibration, activations.scales, activations.config, component, device, vector
    )
    importance = m.importance
    g = on_device(activations.gradients(name))
    v = g.square().mean((0, 2)).sqrt()
    judge = input_hessian(on_device(activations.inputs(name)[::JUDGED_STEP]), v[::JUDGED_STEP])
    judge_outputs = scaled_gradients(g[0, ::JUDGED_STEP], v[::JUDGED_STEP])
    which = [t for t in treatments if takes_feedback(t)]
    w = on_device(weights)

    def plain_error(treatment: Treatment, step: int) -> float:
        some = np.ascontiguousarray(weights[::step])
        error = on_device(treated_values(some, treatment, importance)) - w[::step]
        return local_error(error, judge, judge_outputs[:, ::step])

    fitted = {}
    # On the CPU every core has a process of its own.
    threads = 1 if device.type == "cpu" else None
    encoded = gptq_quantize(w, [t.type for t in which], m.inputs, m.outputs, threads=threads)
    sparse = [t for t in treatments if t.zero_share]
    encoded += fit_masks(w, sparse, m.inputs, m.outputs, m.squares, score, threads)
    for treatment, (data, values) in zip([*which, *sparse], encoded, strict=True):
        with_feedback = local_error(values - w, judge, judge_outputs)
        # Plain rounding's errors of different rows are independent: every fourth row tells.
        if with_feedback < CLEAR * ROW_STEP * plain_error(
            treatment, ROW_STEP
        ) or with_feedback < plain_error(treatment, 1):
            fitted[treatment] = (data, values)
    return importance, fitted


def edge_feedback(
    calibration: Calibration, scales: Scales, component: Component, tied: bool
) -> DampedHessian:
    """Error feedback for `token_embd` or `output`."""
    hessian = calibration.edge_hessian(component.name, tied)
    scale = input_scale(scales, component.name)
    if scale is not None:
        s = torch.from_numpy(scale)
        hessian = s[:, None] * hessian * s
    tokens = int(calibration.reference.generated_lengths.sum())
    return DampedHessian(hessian, damping_for(tokens, component.row_length))


def component_importance(
    activations: Activations, component: Component, tied: bool
) -> FloatArray | None:
    """The importance vector a component is quantized with; none for a table of looked-up rows
    that is not a head too, since there the columns are equally important."""
    if component.name == EMBEDDED and not tied:
        return None
    return activations.importance(component.name)
