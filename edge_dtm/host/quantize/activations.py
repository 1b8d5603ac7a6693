"""A matrix's input as ggml's CPU kernels will see it: rounded to the weight type's partner.

Source: vec_dot_type of each type in ggml-cpu, and quantize_row_q8_0 / quantize_row_q8_K.
"""

from __future__ import annotations

import torch

KINDS = ("half", "q8_0", "q8_K")


def activation_kind(type_name: str) -> str:
    """Which rounding of the inputs goes with a weight type. Q8_1, the partner of Q4_1 and Q5_1,
    rounds as Q8_0 does (its block sums are exact up to half precision)."""
    if type_name == "F16":
        return "half"
    if type_name.endswith("_K"):
        return "q8_K"
    return "q8_0"


def round_activations(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x: float32 (tokens, row_length), row_length a multiple of 32 (q8_0) or 256 (q8_K)."""
    if kind == "half":
        return x.half().float()
    block = 256 if kind == "q8_K" else 32
    parts = x.reshape(x.shape[0], -1, block)
    if kind == "q8_0":
        scale = parts.abs().amax(-1, keepdim=True) / 127
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        rounded = (parts * inverse).round() * scale.half().float()
    else:
        # Q8_K maps the element of largest size, with its sign, to -127 and keeps a float scale.
        index = parts.abs().argmax(-1, keepdim=True)
        inverse = -127 / parts.gather(-1, index)
        inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
        scale = torch.where(inverse != 0, 1 / inverse, 0.0)
        rounded = (parts * inverse).round().clamp(max=127) * scale
    return rounded.reshape(x.shape)
