"""A bundle in, a verdict out: does this device reproduce the original's tokens well enough?

Nothing of a bundle is read before its hashes, and its signature where one is asked for, are
checked; nothing is decoded here before a child has shown that this build of llama.cpp can.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_dtm.core import machine
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.metrics import compare, top_kl
from edge_dtm.core.scratch import Scratch
from edge_dtm.device import cpu
from edge_dtm.device.judge import against_host, divergences, judge, limits_of_part
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats.archive import open_bundle
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import Reference
from edge_dtm.formats.thresholds import Thresholds
from edge_dtm.formats.verdict import (
    Evidence,
    KernelCheck,
    KernelsCompared,
    Mode,
    Verdict,
)
from edge_dtm.llamacpp import probe_model
from edge_dtm.llamacpp.gguf_header import check_gguf
from edge_dtm.llamacpp.llama import runtime_info
from edge_dtm.llamacpp.memory import require_memory
from edge_dtm.llamacpp.runner import LlamaRunner
from edge_dtm.llamacpp.schedule import context_needed, replay_tokens
from edge_dtm.llamacpp.vocabulary import tokenize

SPEED_PROMPT_TOKENS, SPEED_DECODE_TOKENS = 128, 32

# Stage, amount done, amount in all; the stages are "check" (bytes) and "replay" (tokens).
Progress = Callable[[str, int, int], None]
Kernels = Literal["check", "compare", "skip"]


@dataclass(frozen=True)
class Options:
    """How to verify.

    mode: "teacher_forced" feeds the original's tokens; "generate" decodes for real, so that FDT is
    the one a user sees, and SDT and KL, defined on the original's text, are not judged.
    threads: this machine's CPUs when None. max_sequences: replay the first ones only. max_sdt (share)
    and min_fdt (tokens) replace the bundle's thresholds. kernels: "check" single products against
    numpy and run the small F16 model, "compare" replays without repacked weights too, "skip" does
    neither. trusted: keys by id as sign.load_trusted gives them; a signature by one of them is
    required then.
    """

    mode: Mode = "teacher_forced"
    threads: int | None = None
    max_sequences: int | None = None
    max_sdt: float | None = None
    min_fdt: float | None = None
    kernels: Kernels = "check"
    trusted: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("teacher_forced", "generate"):
            raise EdgeDtmError(f"unknown mode {self.mode!r}: take teacher_forced or generate")
        if self.max_sequences is not None and self.max_sequences < 1:
            raise EdgeDtmError(f"max_sequences is {self.max_sequences}, needs to be 1 or more")
        if self.mode == "generate" and self.kernels == "compare":
            raise EdgeDtmError("kernels compare needs mode teacher_forced: both runs see one text")


@dataclass(frozen=True)
class Verified:
    """The verdict, and what the device answered, for a report."""

    verdict: Verdict
    record: Record


def verify(bundle_path: Path, options: Options, progress: Progress | None = None) -> Verified:
    """Check a bundle, folder or packed, replay its reference on this machine and judge.

    EdgeDtmError for a bundle that is not as it was made, that llama.cpp reads differently, that
    does not fit into memory, or that this build of llama.cpp cannot run.
    """
    with open_bundle(Path(bundle_path), trusted=options.trusted) as bundle:
        bundle.check(_counter(progress, "check", bundle.size_bytes))
        model = bundle.path(bundles.MODEL)
        check_gguf(model)
        reference, host, probe = _load(bundle)
        noise_floor = bundle.manifest.noise_floor(bundle.source)
        # All but the threads as on the host: these settings can change an argmax.
        settings = replace(
            RunSettings.from_json(host.settings),
            threads=options.threads or machine.default_threads(),
        )
        context = max(context_needed(reference), SPEED_PROMPT_TOKENS + SPEED_DECODE_TOKENS)
        # One thread has the same kernels, and a busy machine is quicker with it.
        cpu.first_decode_in_child(replace(settings, threads=1))
        require_memory(model, settings, context)
        check_tokens(model, reference)
        kl_probe: float | None = None
        checked: list[KernelCheck] = []
        if options.kernels != "skip":
            # It loads ggml, which the child above has shown to be safe.
            from edge_dtm.llamacpp import kernels

            with Scratch("edge-dtm", Path(tempfile.gettempdir())) as folder:
                kl_probe = probe_model.kl(
                    probe,
                    folder / "probe.gguf",
                    replace(RunSettings.from_json(probe.settings), threads=settings.threads),
                )
            checked = [
                KernelCheck(r.type, r.path, r.columns, r.relative_error, r.component, r.ok)
                for r in kernels.check_kernels(model, settings.threads)
            ]
        in_bundle = len(reference)
        overridden = {
            name: value
            for name, value in (("max_sdt", options.max_sdt), ("min_fdt", options.min_fdt))
            if value is not None
        }
        asked = thresholds = replace(bundle.manifest.thresholds, **overridden)
        compared = None
        with LlamaRunner(model, settings, context) as llama:
            _check_host_ids(host, llama.n_vocab)
            replayed = _replay(llama, reference, host, options, progress)
            llama.time_decoding(16, 2)  # the first round is slower
            timing = llama.time_decoding(SPEED_PROMPT_TOKENS, SPEED_DECODE_TOKENS)
        if options.kernels == "compare":
            with LlamaRunner(
                model, replace(settings, repack=not settings.repack), context
            ) as llama:
                compared = _compare(llama, reference.rows(replayed.rows), replayed.record, progress)
        rows = replayed.rows
        part, host_part = reference.rows(rows), host.rows(rows)
        evidence = _evidence(part, host_part, replayed, kl_probe, checked, noise_floor, thresholds)
        lengths = reference.generated_lengths
        host_all = compare(reference.generated_ids, host.ids, lengths)
        host_there = compare(part.generated_ids, host_part.ids, part.generated_lengths)
        moved = limits_of_part(thresholds, host_all, host_there, in_bundle, len(rows))
        thresholds = replace(moved, **overridden)
        host_meets = (
            host_there.sdt.value <= thresholds.max_sdt
            and host_there.fdt.value >= thresholds.min_fdt
        )
        passed, reasons, diagnosis = judge(evidence, thresholds, host_meets)
        verdict = Verdict(
            passed=passed,
            reasons=reasons,
            diagnosis=diagnosis,
            evidence=evidence,
            sequences=len(rows),
            sequences_in_bundle=in_bundle,
            thresholds=thresholds,
            noise_floor=noise_floor,
            bundle={
                "name": Path(bundle_path).name,
                "manifest_sha256": hashlib.sha256(
                    (bundle.folder / bundles.MANIFEST).read_bytes()
                ).hexdigest(),
                "model_sha256": bundle.manifest.files[bundles.MODEL].sha256,
                "key_id": bundle.key_id,
            },
            performance={
                "prefill_tokens_per_s": timing.prefill_tokens_per_s,
                "decode_tokens_per_s": timing.decode_tokens_per_s,
                "time_to_first_token_s": timing.prefill_s,
                "p50_ms": 1e3 * float(np.percentile(timing.decode_s, 50)),
                "p95_ms": 1e3 * float(np.percentile(timing.decode_s, 95)),
                "peak_rss_bytes": machine.peak_rss_bytes(),
            },
            settings=settings.to_json(),
            runtime=runtime_info(),
            kernels_compared=compared,
            notes=_notes(options, replayed, in_bundle, asked, thresholds),
        )
        meta = {"rows": [int(row) for row in rows]}
        return Verified(verdict, replace(replayed.record, meta=meta))


@dataclass(frozen=True)
class _Replayed:
    """rows: which sequences; record and kl (nats, (rows, N)) in that order."""

    rows: npt.NDArray[np.int64]
    record: Record
    kl: npt.NDArray[np.float64]


def _replay(
    llama: LlamaRunner,
    reference: Reference,
    host: Record,
    options: Options,
    progress: Progress | None,
) -> _Replayed:
    rows = np.arange(min(options.max_sequences or len(reference), len(reference)))
    part = reference.rows(rows)
    count = _counter(progress, "replay", replay_tokens(part))
    if options.mode == "generate":
        record = llama.greedy(part, count)
        return _Replayed(rows, record, np.zeros(record.ids.shape))
    record, kl = _teacher_forced(llama, part, host.rows(rows), count)
    return _Replayed(rows, record, kl)


def _teacher_forced(
    llama: LlamaRunner,
    reference: Reference,
    other: Record,
    count: Callable[[int], None] | None,
) -> tuple[Record, npt.NDArray[np.float64]]:
    """The record, and the KL, other || this run, at each position."""
    there = np.zeros_like(other.top_logits)

    def observe(row: int, position: int, logits: npt.NDArray[np.float32]) -> None:
        there[row, position] = logits[other.top_ids[row, position]]

    record = llama.teacher_forced(reference, count, observe)
    return record, top_kl(other.top_logits, there)


def _compare(
    llama: LlamaRunner, reference: Reference, record: Record, progress: Progress | None
) -> KernelsCompared:
    count = _counter(progress, "replay without repacking", replay_tokens(reference))
    other, kl = _teacher_forced(llama, reference, record, count)
    lengths = reference.generated_lengths
    counted = np.arange(kl.shape[1])[None, :] < lengths[:, None]
    differing = compare(record.ids, other.ids, lengths).divergent_tokens
    return KernelsCompared(int(lengths.sum()), differing, float(kl[counted].mean()))


def _evidence(
    part: Reference,
    host: Record,
    replayed: _Replayed,
    kl_probe: float | None,
    checked: list[KernelCheck],
    noise_floor: Mapping[str, Any],
    thresholds: Thresholds,
) -> Evidence:
    mode = replayed.record.mode
    lengths = part.generated_lengths
    original, against, first = divergences(
        part.generated_ids,
        host.ids,
        replayed.record.ids,
        lengths,
        part.margins,
        float(noise_floor.get("near_tie_margin", 0.0)),
        mode,
    )
    return Evidence(
        mode=mode,
        against_original=original,
        against_host=against,
        host=None
        if mode == "generate"
        else against_host(
            host.ids,
            host.top_logits,
            replayed.record.ids,
            replayed.kl,
            lengths,
            thresholds.decided_margin,
        ),
        kl_probe_nats=kl_probe,
        kernels=checked,
        first_divergent_tokens=first,
        lengths=[int(n) for n in lengths],
    )


def _notes(
    options: Options,
    replayed: _Replayed,
    in_bundle: int,
    asked: Thresholds,
    applied: Thresholds,
) -> list[str]:
    """asked: the thresholds for all sequences; applied: those for the ones replayed."""
    notes = []
    if options.mode == "generate":
        notes.append(
            "SDT is defined on the reference's own text: in mode generate FDT is judged and the "
            "share of identical sequences shown, no SDT or KL threshold is applied"
        )
    if options.kernels == "skip":
        notes.append("the kernels were not checked by themselves")
    taken = len(replayed.rows)
    if taken < in_bundle:
        notes.append(
            f"the first {taken} of {in_bundle} sequences were replayed; "
            + _which_moved(options.mode, asked, applied)
        )
    return notes


def _which_moved(mode: Mode, asked: Thresholds, applied: Thresholds) -> str:
    judged = {"min_fdt": "FDT"} | ({"max_sdt": "SDT"} if mode == "teacher_forced" else {})
    stayed = [
        word for name, word in judged.items() if getattr(asked, name) == getattr(applied, name)
    ]
    to = "moved to what the host's own run shows for those"
    if not stayed:
        return f"the thresholds were {to}"
    if len(stayed) == len(judged):
        return "the thresholds were applied to those as they are"
    (moved,) = set(judged.values()) - set(stayed)
    return (
        f"the {stayed[0]} threshold was applied to those as it is, the {moved} threshold was {to}"
    )


def check_tokens(model: Path, reference: Reference) -> None:
    """EdgeDtmError unless llama.cpp makes the reference's prompt ids from its texts."""
    made = tokenize(model, [str(text) for text in reference.texts])
    wrong = [row for row, ids in enumerate(made) if ids != reference.prompt(row)]
    if wrong:
        row = wrong[0]
        expected = reference.prompt(row)
        pairs = zip(made[row], expected, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        at = min(len(made[row]), len(expected)) if at is None else at
        raise EdgeDtmError(
            f"wrong tokenizer: llama.cpp makes other token ids from {len(wrong)} of "
            f"{len(reference)} prompts than the original's tokenizer (first: prompt {row + 1}, "
            f"token {at + 1}: {made[row][at : at + 3]} instead of {expected[at : at + 3]}): make "
            "the bundle again, or take the llama-cpp-python that the host had"
        )


def _load(bundle: bundles.Bundle) -> tuple[Reference, Record, Record]:
    reference = Reference.load(bundle.path(bundles.REFERENCE))
    host = Record.load(bundle.path(bundles.HOST_RECORD))
    probe = Record.load(bundle.path(bundles.PROBE_RECORD))
    if not len(reference):
        raise EdgeDtmError(f"{bundle.source}: its reference has no sequences; make it again")
    if host.mode != "teacher_forced" or not (
        host.ids.shape == reference.generated_ids.shape
        and np.array_equal(host.lengths, reference.generated_lengths)
    ):
        raise EdgeDtmError(
            f"{bundle.source}: its host record does not belong to its reference; make it again"
        )
    expected = probe_model.sequences()
    if (
        probe.ids.shape != expected.generated_ids.shape
        or not ((probe.top_ids >= 0) & (probe.top_ids < probe_model.VOCAB)).all()
    ):
        raise EdgeDtmError(f"{bundle.source}: its probe record is not ours; make it again")
    return reference, host, probe


def _check_host_ids(host: Record, n_vocab: int) -> None:
    counted = np.arange(host.ids.shape[1])[None, :] < host.lengths[:, None]
    ids = host.top_ids[counted]
    if ids.size and (ids.min() < 0 or ids.max() >= n_vocab):
        raise EdgeDtmError("the host record has ids outside the vocabulary; make the bundle again")


def _counter(progress: Progress | None, stage: str, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def count(amount: int) -> None:
        nonlocal done
        done += amount
        progress(stage, done, total)

    return count
