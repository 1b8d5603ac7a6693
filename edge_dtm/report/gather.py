"""All that the page shows, read from a bundle and the files beside it. The only I/O here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from edge_dtm.core import strict_json
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.metrics import Divergence, compare, divergent_mask, first_divergent_tokens
from edge_dtm.core.strict_json import Count, StrictModel, validated
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats.bundle import Bundle, Manifest
from edge_dtm.formats.plan import Plan
from edge_dtm.formats.record import Record, host_answers
from edge_dtm.formats.reference import Reference
from edge_dtm.formats.verdict_file import ShareInterval, device_name, read_verdict
from edge_dtm.report import examples
from edge_dtm.report.charts import MeasuredFile, Series
from edge_dtm.report.frontier import Choice, read_plan_file


class Measurement(StrictModel, extra="ignore"):
    """What the page needs of `measure --json`."""

    name: str
    size_bytes: Annotated[int, Field(ge=1)]
    sdt: ShareInterval
    first_divergent_tokens: list[Count]
    lengths: list[Count]


@dataclass(frozen=True)
class Answers:
    """What a run answered. fed: whether it was fed the original's tokens, without which divergent,
    the other tokens of each sequence, says nothing."""

    label: str
    fed: bool
    first: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    divergent: npt.NDArray[np.int64]

    @classmethod
    def of(cls, label: str, reference: Reference, record: Record) -> Answers:
        lengths = reference.generated_lengths.astype(np.int64)
        mask = divergent_mask(reference.generated_ids, record.ids, lengths)
        first = first_divergent_tokens(mask, lengths)
        return cls(label, record.mode == "teacher_forced", first, lengths, mask.sum(axis=1))

    def series(self) -> Series:
        return Series(self.label, self.first.tolist(), self.lengths.tolist())


@dataclass(frozen=True)
class Device:
    """A verdict, under its file's name, and in a few words the machine it is of."""

    name: str
    machine: str
    verdict: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.name} ({self.machine})"

    def series(self) -> Series:
        label = self.label if self.verdict["mode"] != "generate" else f"{self.label}, generated"
        return Series(label, self.verdict["first_divergent_tokens"], self.verdict["lengths"])


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    noise_floor: of the manifest; host: the host's own run against the original; shown: whose
    histogram and texts are shown, the host or a device's record; curves: without the host's, the
    noise floor last where its lists were kept; files: sizes and SDT of other files.
    """

    name: str
    manifest: Manifest
    key_id: str | None
    noise_floor: Mapping[str, Any]
    devices: Sequence[Device]
    host: Divergence
    host_prefill_tokens_per_s: float
    host_answers: Answers
    shown: Answers
    curves: Sequence[Series]
    files: Sequence[MeasuredFile]
    plan: Plan | None
    choice: Choice
    examples: Sequence[examples.Example]


def gather(
    bundle: Bundle,
    verdict_files: Sequence[Path] = (),
    measure_files: Sequence[Path] = (),
    record_file: Path | None = None,
) -> Report:
    """bundle: checked. EdgeDtmError when a file is damaged or belongs to another bundle."""
    reference, host = host_answers(bundle)
    shown = answers = Answers.of("this file, on the host", reference, host)
    record, part = host, reference
    if record_file is not None:
        record = Record.load(record_file)
        part = _part_of(record, reference, record_file)
        shown = Answers.of(f"this file, {record_file.stem}", part, record)
    devices = [_device(bundle, path, reference) for path in verdict_files]
    measured = [_measurement(path, reference) for path in measure_files]
    floor = bundle.manifest.noise_floor(bundle.source)
    listed = bundles.PLAN in bundle.manifest.files
    plan, choice = read_plan_file(bundle.path(bundles.PLAN)) if listed else (None, Choice())
    margin = floor.get("near_tie_margin", 0.0)
    ids, lengths = reference.generated_ids, reference.generated_lengths
    return Report(
        name=bundle.source.resolve().name,
        manifest=bundle.manifest,
        key_id=bundle.key_id,
        noise_floor=floor,
        devices=devices,
        host=compare(ids, host.ids, lengths, reference.margins, margin),
        host_prefill_tokens_per_s=host.prefill_tokens_per_s,
        host_answers=answers,
        shown=shown,
        curves=[
            *(d.series() for d in devices),
            *(Series(m.name, m.first_divergent_tokens, m.lengths) for m in measured),
            *_floor_series(floor, reference),
        ],
        files=[MeasuredFile(m.name, m.size_bytes, m.sdt) for m in measured],
        plan=plan,
        choice=choice,
        examples=examples.chosen(
            bundle.path(bundles.MODEL), part, record, shown.first, shown.divergent
        ),
    )


def _part_of(record: Record, reference: Reference, path: Path) -> Reference:
    """The reference's sequences that verify replayed for a record, which are the first ones.

    A record of another bundle shows by its lengths, or by its log-probabilities of the reference's
    tokens, which are also those of its top logits where such a token is among them.
    """
    rows = list(range(len(record)))
    part = reference.rows(np.array(rows[: len(reference)], dtype=np.int64))
    fits = record.belongs_to(part) and record.meta.get("rows", rows) == rows
    if fits and record.mode == "teacher_forced":
        counted = np.arange(record.ids.shape[1])[None, :] < record.lengths[:, None]
        ranked = (record.top_ids == part.generated_ids[:, :, None]) & counted[:, :, None]
        own = record.top_logits - record.log_normalizers[:, :, None]
        noted = np.broadcast_to(record.reference_log_probabilities[:, :, None], own.shape)
        fits = np.allclose(own[ranked], noted[ranked], atol=1e-3)
    if not fits:
        raise EdgeDtmError(
            f"{path} does not belong to this bundle: give the record that verify wrote for it"
        )
    return part


def _device(bundle: Bundle, path: Path, reference: Reference) -> Device:
    """EdgeDtmError unless the verdict is of this bundle."""
    verdict = read_verdict(path)
    digest = hashlib.sha256((bundle.folder / bundles.MANIFEST).read_bytes()).hexdigest()
    if verdict["bundle"]["manifest_sha256"] != digest:
        raise EdgeDtmError(
            f"{path} is a verdict of another bundle ({verdict['bundle']['name'][:60]}), not of "
            f"{bundle.source}: verify this one"
        )
    if max(verdict["lengths"]) > reference.generated_ids.shape[1]:
        raise EdgeDtmError(f"{path}: its lengths are not those of {bundle.source}")
    return Device(path.stem, device_name(verdict), verdict)


def _measurement(path: Path, reference: Reference) -> Measurement:
    """EdgeDtmError unless it is of this reference's sequences."""
    remedy = "give a file that edge-dtm measure --json wrote"
    measured = validated(Measurement, strict_json.read(path), str(path), remedy)
    lengths = reference.generated_lengths.tolist()
    if measured.lengths != lengths or len(measured.first_divergent_tokens) != len(lengths):
        raise EdgeDtmError(
            f"{path} was measured on other sequences: run edge-dtm measure with this bundle as "
            "--reference"
        )
    return measured


def _floor_series(floor: Mapping[str, Any], reference: Reference) -> list[Series]:
    """Empty unless its lists, free-form JSON, fit."""
    first, lengths = floor.get("first_divergent_tokens", []), reference.generated_lengths.tolist()
    whole = isinstance(first, list) and [type(v) for v in first] == [int] * len(lengths)
    fits = whole and floor.get("lengths") == lengths
    return [Series("noise floor", first, lengths, is_floor=True)] if fits else []
