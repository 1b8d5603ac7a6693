"""The input of a matrix as ggml's CPU kernels see it: rounded to the partner of the weight type.

Source: quantize_row_q8_0 and quantize_row_q8_K of ggml.
"""

from __future__ import annotations

import torch

from edge_dtm.formats.ggml_types import facts

KINDS = ("half", "q8_0", "q8_K")


def activation_kind(type_name: str) -> str:
    """How the CPU kernel of a weight type rounds its inputs: one of KINDS.

    EdgeDtmError when the type is unknown, ValueError when it is no candidate of a plan.
    """
    kind = facts(type_name).activations
    if kind not in KINDS:
        raise ValueError(f"{type_name} is no candidate of a plan")
    return kind


def round_activations(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x as the kernel sees it, float32 of the same shape.

    x: float32 (tokens, row_length), row_length a multiple of 32 (q8_0) or 256 (q8_K).
    kind: one of KINDS.
    """
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
