"""How far a distillation has come, and the best model that was checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edge_dtm.core.errors import EdgeDtmError

Tensors = dict[str, torch.Tensor]
Point = dict[
    str, Any
]  # of the curve: step, loss (None before the first), sdt, fdt, perplexity, tokens
BACK_OFF_AFTER = 2  # checks


@dataclass
class Distilled:
    """blocks: of every trained component the best model's bytes, uint8 (rows, row_bytes), Hugging
    Face's row order; vectors: its norm gains by full GGUF name, float32. At best_step 0 nothing
    beat the start, and there are no blocks: the start's may have been made in another way (error
    feedback) and are at hand. steps: those done. seconds and tokens: of training only, padding not
    counted. curve: one point a check, the first of the start. rate_scale: what the rate is
    multiplied with; checks_since: since the best. Only the trainer changes a value of this class.
    """

    vectors: Tensors = field(repr=False)
    blocks: Tensors = field(default_factory=dict, repr=False)
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    rate_scale: float = 1.0
    checks_since: int = 0
    curve: list[Point] = field(default_factory=list)
    peak_rss_bytes: int = 0

    @property
    def best(self) -> Point:
        """Of the curve: the least SDT, ties decided by perplexity."""
        return min(self.curve, key=lambda p: (p["sdt"], p["perplexity"]))

    @property
    def best_step(self) -> int:
        return int(self.best["step"])

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def backs_off(self) -> bool:
        return self.checks_since > 0 and self.checks_since % BACK_OFF_AFTER == 0

    def stops_early(self, patience: int) -> bool:
        """Nothing better in the last `patience` checks."""
        return len(self.curve) - 1 - self.curve.index(self.best) >= patience


def save_tensors(path: Path, data: Mapping[str, Any]) -> None:
    """torch.save, under a temporary name until complete. EdgeDtmError when the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(data), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise EdgeDtmError(f"{path} could not be written ({error}): free some space") from None


def load_tensors(path: Path) -> dict[str, Any]:
    """What save_tensors was given, on the CPU. EdgeDtmError when the file is damaged."""
    try:
        data: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return data
    except Exception as error:  # pickle's readers raise anything
        (reason, *_) = str(error).splitlines() or [type(error).__name__]
        raise EdgeDtmError(
            f"{path} is damaged ({reason}): run edge-dtm compress again with --no-resume"
        ) from None
