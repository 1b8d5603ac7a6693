"""What a device's run of a bundle amounts to: three comparisons, a verdict, a diagnosis. Pure.

Device against the original says whether the tokens are good enough; device against the host's run
of the same file says whether this machine computes what the host computed; the noise floor says
what no compression at all would have cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic.dataclasses import dataclass as checked_dataclass

from edge_dtm.core import strict_json
from edge_dtm.core.metrics import Divergence
from edge_dtm.core.strict_json import STRICT, Count
from edge_dtm.formats.record import Mode
from edge_dtm.formats.thresholds import Thresholds

SCHEMA_VERSION = 3
KIND = "edge-dtm verdict"

Code = Literal["healthy", "broken_kernels", "bad_plan", "too_close"]


# Infinite where it is not finite, which JSON says with null.
_AmountOrNull = Annotated[
    float,
    Field(ge=0, allow_inf_nan=True),
    BeforeValidator(lambda value: math.inf if value is None or value != value else value),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}]}),
]


@checked_dataclass(frozen=True, config=STRICT)
class Diagnosis:
    """Why it failed, or that it did not."""

    code: Code = Field(
        description="healthy: passed. broken_kernels: the device does not compute what the host "
        "computed. bad_plan: the host's own run misses the thresholds too. too_close: the host "
        "just meets them, the device just does not."
    )
    words: str = Field(description="The same for people, and what to do.")


@dataclass(frozen=True)
class AgainstHost:
    """Device against the host's run of the same file, under the names that the file has."""

    kl_vs_host_nats: float
    decided_sdt_vs_host: float
    largest_margin_vs_host: float


@checked_dataclass(frozen=True, config=STRICT)
class KernelCheck:
    """One kernel against numpy."""

    type: str = Field(min_length=1, description="GGML type of the weights.")
    path: Literal["plain", "repacked"] = Field(
        description="Layout of the weights: as in the file, or rearranged for this CPU."
    )
    columns: int = Field(ge=1, description="Tokens multiplied at once: 1 when decoding.")
    worst_relative_error: _AmountOrNull = Field(
        description="Largest error of an output, as a share of its sum of |weight| |activation|; "
        "null when it is not finite."
    )
    component: str = Field(description="The matrix it was tried on.")
    ok: bool = Field(description="Whether the error is within this kernel's limit.")


@checked_dataclass(frozen=True, config=STRICT)
class KernelsCompared:
    """The same positions with and without repacked weights."""

    positions: Count = Field(description="Positions compared.")
    differing_tokens: Count = Field(description="Positions with another token.")
    kl_nats: _AmountOrNull = Field(
        description="Mean KL divergence, nats; null when it is not finite."
    )


@dataclass(frozen=True)
class Evidence:
    """All that was measured on the device.

    against_original, against_host: in mode "generate" their sdt is no SDT. host: None in mode
    "generate". kl_probe_nats: the small F16 model against the host's; None when not run.
    first_divergent_tokens and lengths, tokens: of each sequence replayed, against the original.
    """

    mode: Mode
    against_original: Divergence
    against_host: Divergence
    host: AgainstHost | None
    kl_probe_nats: float | None
    kernels: Sequence[KernelCheck]
    first_divergent_tokens: Sequence[int]
    lengths: Sequence[int]


@dataclass(frozen=True)
class Verdict:
    """The verdict with all that led to it; `verdict_table.print_verdict` shows it.

    reasons: one sentence for each threshold missed, or for each one met if none is missed.
    thresholds: those applied, which hold for the sequences replayed.
    """

    passed: bool
    reasons: Sequence[str]
    diagnosis: Diagnosis
    evidence: Evidence
    sequences: int
    sequences_in_bundle: int
    thresholds: Thresholds
    noise_floor: Mapping[str, Any]
    bundle: Mapping[str, Any]
    performance: Mapping[str, float | None]
    settings: Mapping[str, Any]
    runtime: Mapping[str, Any]
    kernels_compare: KernelsCompared | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON as data/verdict.schema.json describes it."""
        tree = asdict(self) | {"schema_version": SCHEMA_VERSION, "kind": KIND}
        evidence = tree.pop("evidence")
        host = evidence.pop("host") or dict.fromkeys(f.name for f in fields(AgainstHost))
        if self.evidence.mode == "generate":
            for name in ("against_original", "against_host"):
                evidence[name] |= {"sdt": None, "divergent_tokens": None, "near_tie_share": None}
        plain: dict[str, Any] = strict_json.plain(tree | evidence | host)
        return plain
