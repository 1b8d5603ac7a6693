"""Scales that leave the function alone and make rounding do less harm.

Between two matrices a channel may be multiplied by s in the one and divided by it in the other:
the gain of a norm against the columns it feeds, rows of `ffn_up` against columns of `ffn_down`,
rows of `attn_v` against columns of `attn_output`. In a block of n channels that share a scale,
rounding the inputs to int8 does harm of about max_j (x_j s_j)^2 sum_j (b_j / s_j)^2 and rounding
the columns of about max_j (w_j / s_j)^2 sum_j (x_j s_j)^2, with x_j the size of an input, b_j of
the margins' gradient there and w_j of the column. With sums in the place of the largest, and b
proportional to w, both are least (Cauchy and Schwarz) where (x_j s_j)^2 ~ (b_j / s_j)^2, so
s_j = sqrt(b_j / x_j). A block's scale does follow its largest member, so that the exponent is
tried out. That is SmoothQuant's (arXiv 2211.10438) and AWQ's (arXiv 2306.00978) idea, with the
gradient deciding what matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.quantize.activations import round_activations
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.float32]
Scales = Mapping[str, FloatArray]  # input site, such as `blk.3.ffn_down` -> (row_length,)

STRENGTHS = (0.0, 0.2, 0.35, 0.5)
JUDGED_TYPES = ("Q4_0", "Q5_0", "Q8_0")
# A channel that is silent on the calibration prompts must not be blown up for ever.
LARGEST, SMALLEST = 64.0, 1 / 64
SITES = ("attn_q", "attn_output", "ffn_gate", "ffn_down")
_SITE_OF = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
# What makes a site's input, and so is multiplied by the site's scales.
_SOURCE_OF = {"attn_norm": "attn_q", "attn_v": "attn_output", "ffn_norm": "ffn_gate",
              "ffn_up": "ffn_down", "output_norm": "output"}  # fmt: skip


def channel_scales(
    input_squares: npt.NDArray[np.float64],
    gradient_squares: npt.NDArray[np.float64],
    strength: float = 0.5,
) -> FloatArray:
    """s = (b / x)^strength with a geometric mean of 1, float32, same shape.

    Both: mean squares, float64. Channels without any input or gradient get 1.
    """
    known = (input_squares > 0) & (gradient_squares > 0)
    out = np.zeros(input_squares.shape)
    if known.any():
        ratio = np.log(gradient_squares[known]) - np.log(input_squares[known])
        out[known] = strength / 2 * (ratio - ratio.mean())
    return np.exp(np.clip(out, np.log(SMALLEST), np.log(LARGEST))).astype(np.float32)


def sites(config: ModelConfig) -> list[str]:
    """Every input that has scales. A tied head has none: its columns are the embedding's."""
    blocks = [f"blk.{layer}.{site}" for layer in range(config.layers) for site in SITES]
    return blocks if config.tied else [*blocks, "output"]


def consumers(site: str) -> list[str]:
    """Components that a site is the input of."""
    prefix, dot, part = site.rpartition(".")
    return [site, *(prefix + dot + n for n, of in _SITE_OF.items() if of == part)]


def site_scales(
    name: str,
    x2: npt.NDArray[np.float64],
    b2: npt.NDArray[np.float64],
    config: ModelConfig,
    strength: float,
) -> FloatArray:
    """A site's scales, float32 (row_length,); query heads of a group share theirs.

    x2, b2: mean squares of the inputs and of the gradients there, float64 (row_length,).
    """
    if not name.endswith("attn_output"):
        return channel_scales(x2, b2, strength)
    # Query heads of a group read the same value channels.
    shape = (config.kv_heads, config.heads // config.kv_heads, config.head_dim)
    s = channel_scales(x2.reshape(shape).sum(1), b2.reshape(shape).sum(1), strength)
    return np.ascontiguousarray(np.broadcast_to(s[:, None], shape).reshape(-1))


def rounding_harm(
    x: torch.Tensor,
    x2: npt.NDArray[np.float64],
    b2: npt.NDArray[np.float64],
    weights: Sequence[FloatArray],
    rows: Sequence[npt.NDArray[np.float64]],
    scales: FloatArray,
    row_step: int,
) -> float:
    """Mean log of what rounding does to the margins, over JUDGED_TYPES; inputs and weights
    together, errors of different columns taken as independent (a cost is measured later).

    x: float32 (tokens, row_length), some inputs; x2, b2: mean squares of inputs and gradients;
    weights: float32 (rows / row_step, row_length) of each matrix fed; rows: how much each of
    these rows matters, float64; scales: float32 (row_length,).
    """
    s = torch.from_numpy(scales)
    scaled = x * s
    moved = (round_activations(scaled, "q8_0") - scaled).double().square().mean(0).numpy()
    inputs = float((moved * b2 / np.square(scales, dtype=np.float64)).sum())
    importance = (x2 * np.square(scales, dtype=np.float64)).astype(np.float32)
    logs = []
    for type_name in JUDGED_TYPES:
        harm = inputs
        for w, r in zip(weights, rows, strict=True):
            columns = w / scales
            data = ggml.quantize(type_name, columns, importance)
            error = ggml.dequantize(type_name, data, w.shape[1]) - columns
            harm += row_step * float(r @ (np.square(error) @ importance.astype(np.float64)))
        logs.append(np.log(max(harm, 1e-300)))
    return float(np.mean(logs))


def input_scale(scales: Scales, name: str) -> FloatArray | None:
    """By what a component's inputs are multiplied (and its columns divided), or None."""
    prefix, dot, part = name.rpartition(".")
    return scales.get(prefix + dot + _SITE_OF.get(part, part))


def output_scale(scales: Scales, name: str, config: ModelConfig) -> FloatArray | None:
    """By what the component's (or norm's) outputs are multiplied, or None."""
    prefix, dot, part = name.rpartition(".")
    s = scales.get(prefix + dot + _SOURCE_OF[part]) if part in _SOURCE_OF else None
    if s is None or part != "attn_v":
        return s
    group = config.heads // config.kv_heads
    return np.ascontiguousarray(s.reshape(-1, group, config.head_dim)[:, 0].reshape(-1))
