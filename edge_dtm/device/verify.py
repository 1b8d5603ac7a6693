"""A bundle in, a verdict out: does this device reproduce the original's tokens well enough?

Nothing of a bundle is read before its hashes, and its signature where one is asked for, are
checked; nothing is decoded here before a child has shown that this build of llama.cpp can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_dtm.core import machine
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import StageProgress, no_progress, scratch_folder
from edge_dtm.core.metrics import compare
from edge_dtm.device.first_decode import first_decode_in_child
from edge_dtm.device.inputs import Inputs, check_host_ids, check_tokens, load_inputs
from edge_dtm.device.judge import evidence_of, judge, limits_of_part
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats.archive import open_bundle
from edge_dtm.formats.record import Mode, Record, RunSettings
from edge_dtm.formats.thresholds import Thresholds
from edge_dtm.formats.verdict import KernelCheck, KernelsCompared, Verdict
from edge_dtm.llamacpp import probe_model
from edge_dtm.llamacpp.gguf_header import check_gguf, require_memory
from edge_dtm.llamacpp.llama import runtime_info
from edge_dtm.llamacpp.runner import LlamaRunner, Timing
from edge_dtm.llamacpp.schedule import context_needed, replay_tokens

SPEED_PROMPT_TOKENS, SPEED_DECODE_TOKENS = 128, 32

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
        if self.mode == "generate" and self.kernels == "compare":
            raise EdgeDtmError("kernels compare needs mode teacher_forced: both runs see one text")


@dataclass(frozen=True)
class Run:
    """What this machine computed and how fast. What was not run is None or ().

    kl_nats: host || device at each position (S, N), None in mode "generate".
    """

    record: Record
    kl_nats: npt.NDArray[np.float64] | None
    timing: Timing
    kl_probe_nats: float | None
    kernels: Sequence[KernelCheck]
    compared: KernelsCompared | None


@dataclass(frozen=True)
class Limits:
    """asked: the thresholds for all sequences; applied: those for the ones replayed. host_meets:
    whether the host's own run of these meets the applied ones against the original."""

    asked: Thresholds
    applied: Thresholds
    host_meets: bool


def verify(
    bundle_path: Path, options: Options, progress: StageProgress = no_progress
) -> tuple[Verdict, Record]:
    """Check a bundle, folder or packed, replay its reference on this machine and judge.

    The record is what the device answered. EdgeDtmError for a bundle that is not as it was made,
    that llama.cpp reads differently, or that does not fit into memory, or where this build of
    llama.cpp cannot run.
    """
    with open_bundle(Path(bundle_path), trusted=options.trusted) as bundle:
        bundle.check(progress("check", bundle.size_bytes))
        check_gguf(bundle.path(bundles.MODEL))
        whole = load_inputs(bundle)
        noise_floor = bundle.manifest.noise_floor(bundle.source)
        # All but the threads as on the host: these settings can change an argmax.
        threads = options.threads or machine.default_threads()
        settings = replace(RunSettings.from_json(whole.host.settings), threads=threads)
        first_decode_in_child()
        part = _part(whole, options.max_sequences)
        run = _run(bundle.path(bundles.MODEL), whole, part, settings, options, progress)
        limits = _limits(bundle.manifest.thresholds, options, whole, part)
        near_tie_margin = float(noise_floor.get("near_tie_margin", 0.0))
        evidence = evidence_of(
            part.reference,
            part.host,
            run.record,
            run.kl_nats,
            near_tie_margin,
            limits.asked.decided_margin,
            run.kl_probe_nats,
            run.kernels,
        )
        passed, reasons, diagnosis = judge(evidence, limits.applied, limits.host_meets)
        manifest = (bundle.folder / bundles.MANIFEST).read_bytes()
        verdict = Verdict(
            passed=passed,
            reasons=reasons,
            diagnosis=diagnosis,
            evidence=evidence,
            sequences=len(part.reference),
            sequences_in_bundle=len(whole.reference),
            thresholds=limits.applied,
            noise_floor=noise_floor,
            bundle={
                "name": Path(bundle_path).name,
                "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
                "model_sha256": bundle.manifest.files[bundles.MODEL].sha256,
                "key_id": bundle.key_id,
            },
            performance=_performance(run.timing),
            settings=settings.to_json(),
            runtime=runtime_info(),
            kernels_compare=run.compared,
            notes=_notes(options, len(part.reference), len(whole.reference), limits),
        )
        meta = {"rows": list(range(len(part.reference)))}
        return verdict, replace(run.record, meta=meta)


def _run(
    model: Path,
    whole: Inputs,
    part: Inputs,
    settings: RunSettings,
    options: Options,
    progress: StageProgress,
) -> Run:
    context = max(context_needed(whole.reference), SPEED_PROMPT_TOKENS + SPEED_DECODE_TOKENS)
    require_memory(model, settings, context)
    check_tokens(model, whole.reference)
    kl_probe_nats, compared = None, None
    kernels: list[KernelCheck] = []
    if options.kernels != "skip":
        kl_probe_nats, kernels = _check_kernels(model, whole.probe, settings.threads)
    with LlamaRunner(model, settings, context) as llama:
        check_host_ids(whole.host, llama.n_vocab)
        advance, kl_nats = progress("replay", replay_tokens(part.reference)), None
        if options.mode == "generate":
            record = llama.greedy(part.reference, advance)
        else:
            record, kl_nats = llama.beside(part.reference, part.host, advance)
        llama.time_decoding(16, 2)  # the first round is slower
        timing = llama.time_decoding(SPEED_PROMPT_TOKENS, SPEED_DECODE_TOKENS)
    if options.kernels == "compare":
        other = replace(settings, repack=not settings.repack)
        with LlamaRunner(model, other, context) as llama:
            advance = progress("replay without repacking", replay_tokens(part.reference))
            compared = _compared(record, *llama.beside(part.reference, record, advance))
    return Run(record, kl_nats, timing, kl_probe_nats, kernels, compared)


def _compared(record: Record, other: Record, kl: npt.NDArray[np.float64]) -> KernelsCompared:
    """Both layouts of the weights; kl: of the records, (S, N)."""
    counted = np.arange(kl.shape[1])[None, :] < record.lengths[:, None]
    differing = compare(record.ids, other.ids, record.lengths).divergent_tokens
    return KernelsCompared(int(counted.sum()), differing, float(kl[counted].mean()))


def _check_kernels(model: Path, probe: Record, threads: int) -> tuple[float, list[KernelCheck]]:
    """KL of the small F16 model, and single products, without the bundle's text."""
    # It loads ggml, which the first decode in a child has shown to be safe.
    from edge_dtm.llamacpp.kernels import check_kernels

    settings = replace(RunSettings.from_json(probe.settings), threads=threads)
    with scratch_folder() as folder:
        return probe_model.kl(probe, folder / "probe.gguf", settings), check_kernels(model, threads)


def _part(whole: Inputs, max_sequences: int | None) -> Inputs:
    rows = np.arange(min(max_sequences or len(whole.reference), len(whole.reference)))
    return replace(whole, reference=whole.reference.rows(rows), host=whole.host.rows(rows))


def _limits(bundled: Thresholds, options: Options, whole: Inputs, part: Inputs) -> Limits:
    wishes = {"max_sdt": options.max_sdt, "min_fdt": options.min_fdt}
    overridden = {name: value for name, value in wishes.items() if value is not None}
    asked = replace(bundled, **overridden)
    host, host_part = (
        compare(i.reference.generated_ids, i.host.ids, i.reference.generated_lengths)
        for i in (whole, part)
    )
    moved = limits_of_part(asked, host, host_part)
    applied = replace(moved, **overridden)
    meets = host_part.sdt.value <= applied.max_sdt and host_part.fdt.value >= applied.min_fdt
    return Limits(asked, applied, meets)


def _performance(timing: Timing) -> dict[str, float | None]:
    return {
        "prefill_tokens_per_s": timing.prefill_tokens_per_s,
        "decode_tokens_per_s": timing.decode_tokens_per_s,
        "time_to_first_token_s": timing.prefill_s,
        "p50_ms": 1e3 * float(np.percentile(timing.decode_s, 50)),
        "p95_ms": 1e3 * float(np.percentile(timing.decode_s, 95)),
        "peak_rss_bytes": machine.peak_rss_bytes(),
    }


def _notes(options: Options, taken: int, total: int, limits: Limits) -> list[str]:
    notes = []
    if options.mode == "generate":
        notes.append(
            "SDT is defined on the reference's own text: in mode generate FDT is judged and the "
            "share of identical sequences shown, no SDT or KL threshold is applied"
        )
    if options.kernels == "skip":
        notes.append("the kernels were not checked by themselves")
    if taken < total:
        names = {"min_fdt": "FDT"} | ({"max_sdt": "SDT"} if options.mode != "generate" else {})
        moved = [
            word
            for name, word in names.items()
            if getattr(limits.asked, name) != getattr(limits.applied, name)
        ]
        notes.append(
            f"the first {taken} of {total} sequences were replayed; thresholds moved to what the "
            f"host's own run shows for those: {' and '.join(moved) or 'none'}"
        )
    return notes
