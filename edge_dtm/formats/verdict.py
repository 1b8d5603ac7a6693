"""What a device's run of a bundle amounts to: three comparisons, a verdict, a diagnosis. Pure.

Device against the original says whether the tokens are good enough; device against the host's run
of the same file says whether this machine computes what the host computed; the noise floor says
what no compression at all would have cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from edge_dtm.core import strict_json
from edge_dtm.core.metrics import Divergence
from edge_dtm.core.validation import STRICT, Count
from edge_dtm.formats.thresholds import Thresholds

SCHEMA_VERSION = 3
KIND = "edge-dtm verdict"

Mode = Literal["teacher_forced", "generate"]
Code = Literal["healthy", "broken_kernels", "bad_plan", "too_close"]


def _read_null(value: object) -> object:
    return math.inf if value is None else value


# Infinite where it is not finite, which JSON says with null.
_AmountOrInfinite = Annotated[
    float,
    Field(ge=0, allow_inf_nan=True),
    BeforeValidator(_read_null),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}]}),
]


@dataclass(frozen=True)
class Diagnosis:
    """Why it failed, or that it did not."""

    __pydantic_config__ = STRICT

    code: Annotated[
        Code,
        Field(
            description="healthy: passed. broken_kernels: the device does not compute what the "
            "host computed. bad_plan: the host's own run misses the thresholds too. too_close: "
            "the host just meets them, the device just does not."
        ),
    ]
    words: Annotated[str, Field(description="The same for people, and what to do.")]


@dataclass(frozen=True)
class AgainstHost:
    """Device against the host's run of the same file.

    kl_nats: mean of top_kl over positions, each capped at KL_CAP_NATS; decided_sdt: share of other
    argmaxes among the decided_positions, which are those where the host's own margin is at least
    the threshold's decided_margin; largest_margin: the host's largest margin, in logits, at which
    the device chose another token, 0 when it never did.
    """

    kl_nats: float
    decided_sdt: float
    decided_positions: int
    largest_margin: float


@dataclass(frozen=True)
class KernelCheck:
    """One kernel against numpy."""

    __pydantic_config__ = STRICT

    type: Annotated[str, Field(min_length=1, description="GGML type of the weights.")]
    path: Annotated[
        Literal["plain", "repacked"],
        Field(description="Layout of the weights: as in the file, or rearranged for this CPU."),
    ]
    columns: Annotated[int, Field(ge=1, description="Tokens multiplied at once: 1 when decoding.")]
    worst_relative_error: Annotated[
        _AmountOrInfinite,
        Field(
            description="Largest error of an output, as a share of its sum of |weight| "
            "|activation|; null when it is not finite."
        ),
    ]
    component: Annotated[str, Field(description="The matrix it was tried on.")]
    ok: Annotated[bool, Field(description="Whether the error is within this kernel's limit.")]


@dataclass(frozen=True)
class KernelsCompared:
    """The same positions with and without repacked weights."""

    __pydantic_config__ = STRICT

    positions: Annotated[Count, Field(description="Positions compared.")]
    differing_tokens: Annotated[Count, Field(description="Positions with another token.")]
    kl_nats: Annotated[
        _AmountOrInfinite,
        Field(description="Mean KL divergence, nats; null when it is not finite."),
    ]


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
    kernels_compared: KernelsCompared | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON as data/verdict.schema.json describes it."""
        e = self.evidence
        tree = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "passed": self.passed,
            "reasons": list(self.reasons),
            "diagnosis": asdict(self.diagnosis),
            "notes": list(self.notes),
            "mode": e.mode,
            "bundle": dict(self.bundle),
            "sequences": self.sequences,
            "sequences_in_bundle": self.sequences_in_bundle,
            "against_original": _divergence_json(e.against_original, e.mode),
            "against_host": _divergence_json(e.against_host, e.mode),
            "kl_vs_host_nats": None if e.host is None else e.host.kl_nats,
            "decided_sdt_vs_host": None if e.host is None else e.host.decided_sdt,
            "largest_margin_vs_host": None if e.host is None else e.host.largest_margin,
            "kl_probe_nats": e.kl_probe_nats,
            "kernels": [asdict(k) for k in e.kernels],
            "kernels_compare": (
                None if self.kernels_compared is None else asdict(self.kernels_compared)
            ),
            "performance": dict(self.performance),
            "settings": dict(self.settings),
            "runtime": dict(self.runtime),
            "noise_floor": dict(self.noise_floor),
            "thresholds": self.thresholds.to_json(),
            "first_divergent_tokens": list(e.first_divergent_tokens),
            "lengths": list(e.lengths),
        }
        plain: dict[str, Any] = strict_json.plain(tree)
        return plain


def _divergence_json(divergence: Divergence, mode: Mode) -> dict[str, Any]:
    data = divergence.to_json()
    if mode == "generate":
        data |= {"sdt": None, "divergent_tokens": None, "near_tie_share": None}
    return data
