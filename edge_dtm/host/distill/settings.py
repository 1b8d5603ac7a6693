"""How a student is trained, and on what arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from edge_dtm.core.errors import EdgeDtmError

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class DistillSettings:
    """learning_rate: at its highest, a share of every weight's size, see unit_sizes. batch_tokens
    count padding. round_every: steps between two roundings; check_every: None for
    a tenth of the steps; patience: checks without a better SDT before it stops early; back_off: what
    the rate is multiplied with after every back_off_after checks without a better SDT, when the
    training goes on from the best; checkpointing: recompute activations to save memory, None: where they would take more than
    CHECKPOINTING_BYTES."""

    steps: int
    learning_rate: float = 3e-3
    batch_tokens: int = 2048
    warmup_share: float = 0.05
    round_every: int = 4
    check_every: int | None = None
    patience: int = 6  # of ten checks: the highest rate makes the first ones worse
    # What repairs a badly damaged model within a few steps is too much for a slightly damaged one.
    back_off_after: int = 2
    back_off: float = 0.2
    seed: int = 0
    precision: str = "auto"
    checkpointing: bool | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.round_every < 1 or self.batch_tokens < 1 or self.patience < 1:
            raise EdgeDtmError(
                "distillation needs at least one step, batch token, check and rounding"
            )
        if self.back_off_after < 1 or not 0 < self.back_off <= 1:
            raise EdgeDtmError(
                "distillation backs off after one check or more, to a share of the rate"
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise EdgeDtmError(f"a learning rate of {self.learning_rate} trains nothing: use 3e-3")
        if self.precision not in PRECISIONS:
            raise EdgeDtmError(
                f"precision {self.precision!r} is unknown: use {', '.join(PRECISIONS)}"
            )

    @property
    def steps_to_check(self) -> int:
        return self.check_every or max(1, self.steps // 10)

    def uses_bfloat16(self, device: torch.device) -> bool:
        fast = self.precision == "auto" and fast_bfloat16(device)
        return fast or self.precision == "bfloat16"

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0): linear warm-up, then half a cosine towards 0."""
        warmup = max(1, round(self.steps * self.warmup_share))
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (steps were 1.5 times as fast on a
    Zen 4 core: 452 instead of 303 tokens a second, hidden 576, 6 layers, vocabulary 8,192)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Private, but there is no other way to ask; absent elsewhere than on x86.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in names)
