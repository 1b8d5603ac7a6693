"""All that the page shows, read from a bundle and the files beside it. The only I/O here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.core import strict_json
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.metrics import Divergence, compare, divergent_mask, first_divergent_tokens
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats.bundle import Bundle, Manifest
from edge_dtm.formats.plan import Plan
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import HELD_OUT, Reference
from edge_dtm.formats.verdict_file import device_name, read_verdict
from edge_dtm.report import examples
from edge_dtm.report.charts import MeasuredFile, Series
from edge_dtm.report.numbers import estimate, number

PLAN = "plan.json"


@dataclass(frozen=True)
class Answers:
    """What one run answered to sequences of the reference.

    label: whose; fed: whether it was fed the original's tokens; divergent: other tokens of each
    sequence, which says something only when fed.
    """

    label: str
    fed: bool
    first: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    divergent: npt.NDArray[np.int64]

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


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    host: the host's own run against the original; shown: whose histogram and texts are shown, the
    host or a device's record; curves: without the host's, the noise floor last; files: sizes and
    SDT of other files; frontier: (bytes, predicted SDT); costs: component -> treatment's text ->
    logits squared.
    """

    name: str
    manifest: Manifest
    key_id: str | None
    devices: Sequence[Device]
    host: Divergence
    host_prefill_tokens_per_s: float
    host_answers: Answers
    shown: Answers
    curves: Sequence[Series]
    files: Sequence[MeasuredFile]
    without_curve: Sequence[str]
    plan: Plan | None
    predicted_sdt: float | None
    frontier: Sequence[tuple[float, float]]
    costs: Mapping[str, Mapping[str, float]]
    examples: Sequence[examples.Example]


def gather(
    bundle: Bundle,
    verdict_files: Sequence[Path] = (),
    measure_files: Sequence[Path] = (),
    record_file: Path | None = None,
) -> Report:
    """bundle: checked. EdgeDtmError when a file is damaged or belongs to another bundle."""
    reference = Reference.load(bundle.path(bundles.REFERENCE)).part(HELD_OUT)
    host = Record.load(bundle.path(bundles.HOST_RECORD))
    if not len(reference) or not _same_shape(host, reference):
        raise EdgeDtmError(
            f"{bundle.source}: its host record does not belong to its reference; make it again"
        )
    host_answers = _answers("this file, on the host", reference, host)
    shown, record, part = host_answers, host, reference
    if record_file is not None:
        record = Record.load(record_file)
        part = reference.rows(_rows_of(record, reference, record_file))
        shown = _answers(f"this file, {record_file.stem}", part, record)
    devices = _devices(bundle, verdict_files, reference.generated_ids.shape[1])
    curves, files, without = _others(devices, measure_files, reference)
    floor = bundle.manifest.measured.get("noise_floor")
    floor_curve = _lists(floor)
    if floor_curve is not None and floor_curve[1] == reference.generated_lengths.tolist():
        curves.append(Series("noise floor", *floor_curve, is_floor=True))
    else:
        without.append("the noise floor")
    plan, plan_json = _plan(bundle)
    return Report(
        name=bundle.source.resolve().name,
        manifest=bundle.manifest,
        key_id=bundle.key_id,
        devices=devices,
        host=compare(
            reference.generated_ids,
            host.ids,
            reference.generated_lengths,
            reference.margins,
            max(number(floor, "near_tie_margin") or 0.0, 0.0),
        ),
        host_prefill_tokens_per_s=host.prefill_tokens_per_s,
        host_answers=host_answers,
        shown=shown,
        curves=curves,
        files=files,
        without_curve=without,
        plan=plan,
        predicted_sdt=number(plan_json, "predicted", "sdt"),
        frontier=_frontier(plan_json),
        costs=_costs(plan_json),
        examples=examples.chosen(
            bundle.path(bundles.MODEL), part, record, shown.first, shown.divergent
        ),
    )


def _answers(label: str, reference: Reference, record: Record) -> Answers:
    lengths = reference.generated_lengths
    mask = divergent_mask(reference.generated_ids, record.ids, lengths)
    return Answers(
        label,
        record.mode == "teacher_forced",
        first_divergent_tokens(mask, lengths),
        lengths.astype(np.int64),
        mask.sum(axis=1).astype(np.int64),
    )


def _rows_of(record: Record, reference: Reference, path: Path) -> npt.NDArray[np.int64]:
    """The reference's sequences that a record answers, in its order.

    verify notes them in the record's meta; without that they are the first ones. A record of
    another bundle shows by its lengths, or by its log-probabilities of the reference's tokens,
    which are also those of its top logits where such a token is among them.
    """
    n = len(record)
    listed = record.meta.get("rows", list(range(n)))
    strange = EdgeDtmError(
        f"{path} does not belong to this bundle: give the record that verify wrote for it"
    )
    if (
        not isinstance(listed, list)
        or len(listed) != n
        or not all(type(r) is int and 0 <= r < len(reference) for r in listed)
        or len(set(listed)) != n
    ):
        raise strange
    rows = np.array(listed, dtype=np.int64)
    part = reference.rows(rows)
    if not _same_shape(record, part):
        raise strange
    if record.mode == "teacher_forced":
        there = record.top_ids == part.generated_ids[:, :, None]
        counted = np.arange(there.shape[1])[None, :] < record.lengths[:, None]
        there &= counted[:, :, None]
        own = record.top_logits - record.log_normalizers[:, :, None]
        noted = np.broadcast_to(record.reference_log_probabilities[:, :, None], own.shape)
        if not np.allclose(own[there], noted[there], atol=1e-3):
            raise strange
    return rows


def _same_shape(record: Record, reference: Reference) -> bool:
    return record.ids.shape == reference.generated_ids.shape and np.array_equal(
        record.lengths, reference.generated_lengths
    )


def _devices(bundle: Bundle, files: Sequence[Path], longest: int) -> list[Device]:
    """longest: tokens a sequence can have. EdgeDtmError unless each verdict is of this bundle."""
    digest = hashlib.sha256((bundle.folder / bundles.MANIFEST).read_bytes()).hexdigest()
    out = []
    for path in files:
        data = read_verdict(path)
        if data["bundle"]["manifest_sha256"] != digest:
            raise EdgeDtmError(
                f"{path} is a verdict of another bundle ({data['bundle']['name'][:60]}), not of "
                f"{bundle.source}: verify this one"
            )
        if max(data["lengths"]) > longest:
            raise EdgeDtmError(f"{path}: its lengths are not those of {bundle.source}")
        out.append(Device(path.stem, device_name(data), data))
    return out


def _others(
    devices: Sequence[Device], files: Sequence[Path], reference: Reference
) -> tuple[list[Series], list[MeasuredFile], list[str]]:
    """Curves and points of devices and other files, and the names of those without a curve."""
    curves = [
        Series(
            d.label if d.verdict["mode"] == "teacher_forced" else f"{d.label}, generated",
            d.verdict["first_divergent_tokens"],
            d.verdict["lengths"],
        )
        for d in devices
    ]
    points, without = [], []
    lengths = reference.generated_lengths.tolist()
    for path in files:
        data = strict_json.read(path)
        sdt, size = estimate(data, "sdt"), number(data, "size_bytes")
        if sdt is None or size is None or size <= 0 or not 0 <= sdt[0] <= 1:
            raise EdgeDtmError(
                f"{path} is no measurement: give a file that edge-dtm measure --json wrote"
            )
        name = data.get("name")
        label = name if isinstance(name, str) else path.stem
        points.append(MeasuredFile(label, size, *sdt))
        lists = _lists(data)
        if lists is None:
            without.append(label)
        else:
            curves.append(Series(label, *lists))
        same = number(data, "sequences") == len(lengths) if lists is None else lists[1] == lengths
        if not same:
            raise EdgeDtmError(
                f"{path} was measured on other sequences: run edge-dtm measure with this bundle as "
                "--reference"
            )
    return curves, points, without


def _lists(data: object) -> tuple[list[int], list[int]] | None:
    """(first_divergent_tokens, lengths) of free-form JSON, None unless they are whole."""
    if not isinstance(data, Mapping):
        return None
    first, lengths = data.get("first_divergent_tokens"), data.get("lengths")
    if not (isinstance(first, list) and isinstance(lengths, list) and lengths):
        return None
    if len(first) != len(lengths) or not all(type(v) is int for v in (*first, *lengths)):
        return None
    fitting = all(0 <= f <= n for f, n in zip(first, lengths, strict=True))
    return (first, lengths) if fitting else None


def _plan(bundle: Bundle) -> tuple[Plan | None, dict[str, Any]]:
    """The plan and its file's JSON; (None, {}) for a bundle without one."""
    if PLAN not in bundle.manifest.files:
        return None, {}
    data = strict_json.read(bundle.path(PLAN))
    if not isinstance(data, dict):
        return None, {}
    return Plan.from_json(data) if "components" in data else None, data


def _frontier(plan: Mapping[str, Any]) -> list[tuple[float, float]]:
    points = plan.get("frontier")
    pairs = [
        (number(p, "size_bytes"), number(p, "sdt"))
        for p in (points if isinstance(points, list) else [])
    ]
    return [(size, sdt) for size, sdt in pairs if size is not None and sdt is not None]


def _costs(plan: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    listed = plan.get("costs")
    out: dict[str, dict[str, float]] = {}
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("costs"), dict):
            continue
        costs = {text: number(cost) for text, cost in entry["costs"].items()}
        out[str(entry.get("name"))] = {k: v for k, v in costs.items() if v is not None and v >= 0}
    return out
