"""What the stages of `compress` hand on. Frozen: a stage returns a new value, it sets nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.metrics import Divergence
from edge_dtm.core.progress import Stages
from edge_dtm.core.work import Work
from edge_dtm.formats.plan import Component, Plan, Treatment
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.weights import WeightsCheck
from edge_dtm.host.settings import Settings
from edge_dtm.host.trajectory.prompts import Prompt
from edge_dtm.search.cost_table import Prediction

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


class Encoded(Protocol):
    """Where export finds the bytes of a treated matrix. key: names what they were made with."""

    @property
    def key(self) -> str: ...

    def encoded(self, component: Component, treatment: Treatment) -> ByteArray:
        """uint8 (rows, row_bytes), rows as GGUF orders them."""

    def importance(self, name: str) -> FloatArray | None:
        """float32 (row_length,): what plain rounding weighs errors with, None: all alike."""


@dataclass(frozen=True)
class Budget:
    """Most bytes of the file, and one line that says what sets them."""

    max_bytes: int
    text: str


@dataclass(frozen=True)
class Run:
    """What every stage may ask: the settings, checked, and where the work is done.

    checkpoint: the original. weights: the check of its weights. key: of model, prompts, seed and versions, in hex. f16_bytes: size of
    the original as an F16 GGUF. imatrix: given importance vectors by component, float32
    (row_length,).
    """

    settings: Settings
    stages: Stages
    work: Work
    device: torch.device
    run_settings: RunSettings
    checkpoint: Checkpoint
    weights: WeightsCheck
    key: str
    f16_bytes: int
    budget: Budget
    prompts: tuple[Prompt, ...] = ()
    imatrix: Mapping[str, FloatArray] | None = None


@dataclass(frozen=True)
class Base:
    """The checkpoint that is measured, treated and exported: the original, or what gradual pruning
    made of it.

    fixed_bytes: of the file besides the components. zeros: component -> share of zeros that it has
    and that stay.
    """

    checkpoint: Checkpoint
    key: str
    fixed_bytes: int
    zeros: Mapping[str, float] = field(default_factory=dict)

    @property
    def components(self) -> tuple[Component, ...]:
        return self.checkpoint.components()

    @property
    def weights(self) -> int:
        return sum(c.weights for c in self.components)


@dataclass(frozen=True)
class Measurement:
    """What llama.cpp answered with one GGUF on some sequences, against the original."""

    record: Record
    divergence: Divergence
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        return {**self.divergence.to_json(), "perplexity": self.perplexity}


@dataclass(frozen=True)
class NoiseFloor:
    """The uncompressed F16 model in llama.cpp: nothing can be below that. near_tie_margin: logits,
    the 95th percentile of the original's margins where even this one diverges."""

    measurement: Measurement
    near_tie_margin: float


@dataclass(frozen=True)
class Candidate:
    """A plan, what it predicts, the bytes it is exported with, and what it measured."""

    plan: Plan
    prediction: Prediction
    encoded: Encoded
    measurement: Measurement
