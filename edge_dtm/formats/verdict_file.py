"""verdict.json: the model that its readers check it against and that its JSON Schema comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.json_schema import GenerateJsonSchema

from edge_dtm.core import strict_json
from edge_dtm.core.strict_json import (
    Amount,
    Count,
    Sha256,
    Share,
    StrictModel,
    check_version,
    validated,
)
from edge_dtm.formats.record import Mode
from edge_dtm.formats.thresholds import Thresholds
from edge_dtm.formats.verdict import (
    KIND,
    SCHEMA_VERSION,
    Diagnosis,
    KernelCheck,
    KernelsCompared,
)

_Positive = Annotated[int, Field(ge=1)]


class VerifiedBundle(StrictModel):
    """What was verified."""

    name: str = Field(description="Its file or folder name.")
    manifest_sha256: Sha256 = Field(
        description="SHA-256 of manifest.json in hex, which stands for the whole bundle."
    )
    model_sha256: Sha256 = Field(description="SHA-256 of model.gguf in hex.")
    key_id: str | None = Field(
        description="Id of the key that signed the manifest; null when it is not signed."
    )


class ShareInterval(StrictModel):
    """A share with its 95 % bootstrap interval over sequences."""

    value: Share = Field(description="Measured.")
    low: Share = Field(description="Lower bound.")
    high: Share = Field(description="Upper bound.")


class TokensInterval(StrictModel):
    """Tokens with their 95 % bootstrap interval over sequences."""

    value: Amount = Field(description="Measured.")
    low: Amount = Field(description="Lower bound.")
    high: Amount = Field(description="Upper bound.")


class DivergenceFigures(StrictModel):
    """The tokens of one run against those of another."""

    sdt: ShareInterval | None = Field(description="SDT; null in mode generate.")
    fdt: TokensInterval = Field(description="Mean FDT.")
    identical_share: Share = Field(description="Share of sequences without any other token.")
    sequences: Count = Field(description="Sequences compared.")
    tokens: Count = Field(description="Positions compared.")
    divergent_tokens: Count | None = Field(
        description="Positions with another token; null in mode generate."
    )
    near_tie_share: Share | None = Field(
        description="Share of all positions with another token where the original's own margin is "
        "at most near_tie_margin; null in mode generate."
    )
    near_tie_margin: Amount = Field(description="Logits; 0 where near-ties are not counted.")


class Performance(StrictModel):
    """Speed and memory; null where it was not measured."""

    prefill_tokens_per_s: Amount | None = Field(description="Tokens a second of a prompt.")
    decode_tokens_per_s: Amount | None = Field(description="Tokens a second, one after the other.")
    time_to_first_token_s: Amount | None = Field(
        None, description="Seconds from a prompt to its first token."
    )
    p50_ms: Amount | None = Field(None, description="Median time of a decoded token, milliseconds.")
    p95_ms: Amount | None = Field(
        None, description="95th percentile of the time of a decoded token, milliseconds."
    )
    peak_rss_bytes: Amount | None = Field(
        description="Largest resident memory of the process, bytes."
    )


class Runtime(StrictModel):
    """Versions and machine."""

    llama_cpp_python: str = Field(description="Version of llama-cpp-python.")
    system_info: str = Field(
        description="llama_print_system_info(): what llama.cpp was compiled with."
    )
    cpus: _Positive = Field(description="CPUs of the machine.")
    machine: str = Field(description="Instruction set, such as aarch64.")
    platform: str = Field(description="Operating system.")
    python: str = Field(description="Version of Python.")


class VerdictFile(StrictModel):
    """What edge-dtm verify --json writes: whether one device reproduces the original's tokens from
    one bundle, and what was measured. SDT: share of divergent tokens. FDT: first divergent token, a
    mean over sequences."""

    schema_version: Literal[3] = Field(description="Of this file's form.")
    kind: Literal["edge-dtm verdict"] = Field(description="What this file is.")
    passed: bool = Field(description="Whether every threshold was met.")
    reasons: list[str] = Field(
        description="One sentence for each threshold missed, or for each one met where none is "
        "missed."
    )
    diagnosis: Diagnosis
    notes: list[str] = Field(
        description="What limits this verdict, such as sequences left out; sentences without "
        "their full stop."
    )
    mode: Mode = Field(
        description="teacher_forced: the original's tokens are fed. generate: the device's own "
        "tokens are."
    )
    bundle: VerifiedBundle
    sequences: _Positive = Field(description="Sequences replayed.")
    sequences_in_bundle: _Positive = Field(description="Sequences there are.")
    against_original: DivergenceFigures = Field(
        description="The device's tokens against the original's."
    )
    against_host: DivergenceFigures = Field(
        description="The device's tokens against the host's run of the same file."
    )
    kl_vs_host_nats: Amount | None = Field(
        description="Mean KL divergence of the host's run and this one, nats, on the host's top "
        "logits, each position's capped at 1; null in mode generate."
    )
    decided_sdt_vs_host: Share | None = Field(
        description="Share of other tokens among the positions that the host decided by "
        "thresholds.decided_margin or more; null in mode generate."
    )
    largest_margin_vs_host: Amount | None = Field(
        description="Largest margin of the host, logits, at which the device chose another token, "
        "0 when it never did; null in mode generate."
    )
    kl_probe_nats: Amount | None = Field(
        description="The same KL for a small F16 model, whose kernels leave no room; null when "
        "not run."
    )
    kernels: list[KernelCheck] = Field(
        description="Each kernel that the file needs, against numpy; empty when not checked."
    )
    kernels_compare: KernelsCompared | None = Field(
        description="The same positions with and without repacked weights; null when not asked for."
    )
    performance: Performance
    settings: dict[str, Any] = Field(
        description="How llama.cpp was run: threads, batch_tokens and so on."
    )
    runtime: Runtime
    noise_floor: dict[str, Any] = Field(
        description="The uncompressed F16 model against the original on the host, as the manifest "
        "has it."
    )
    thresholds: Thresholds = Field(
        description="Those applied, which hold for the sequences replayed."
    )
    first_divergent_tokens: list[Count] = Field(
        description="For each sequence replayed, index of the first token that is not the "
        "original's; its length when there is none."
    )
    lengths: list[_Positive] = Field(description="Generated tokens of each sequence replayed.")

    @model_validator(mode="after")
    def _lists_fit(self) -> Self:
        for name in ("first_divergent_tokens", "lengths"):
            entries = len(getattr(self, name))
            if entries != self.sequences:
                raise ValueError(f"{name} has {entries} entries for {self.sequences} sequences")
        pairs = zip(self.first_divergent_tokens, self.lengths, strict=True)
        if any(first > length for first, length in pairs):
            raise ValueError("a first divergent token lies beyond its sequence")
        return self


class _NoTitles(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_text() -> str:
    """What data/verdict.schema.json holds: the model as JSON Schema, draft 2020-12."""
    head = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": f"urn:edge-dtm:verdict:{SCHEMA_VERSION}",
    }
    tree = head | VerdictFile.model_json_schema(schema_generator=_NoTitles)
    return json.dumps(tree, indent=1) + "\n"


def read_verdict(path: Path) -> dict[str, Any]:
    """A verdict as Verdict.to_json wrote it. EdgeDtmError, in one line, for anything else."""
    tree = strict_json.read(path)
    check_version(tree, SCHEMA_VERSION, str(path), KIND)
    validated(VerdictFile, tree, str(path), "verify again")
    plain: dict[str, Any] = tree
    return plain


def device_name(data: Mapping[str, Any]) -> str:
    """A few words for the machine of a verdict."""
    runtime = data["runtime"]
    cpus = int(runtime["cpus"])
    return f"{runtime['machine']}, {cpus} {'CPU' if cpus == 1 else 'CPUs'}"
