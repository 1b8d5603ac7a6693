"""From what a device answered to a verdict and a diagnosis. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edge_dtm.core.metrics import Divergence, compare, divergent_mask, first_divergent_tokens
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import Reference
from edge_dtm.formats.thresholds import Thresholds
from edge_dtm.formats.verdict import AgainstHost, Diagnosis, Evidence, KernelCheck

KL_CAP_NATS = 1.0  # so that one position cannot decide over thousands


def evidence_of(
    reference: Reference,
    host: Record,
    record: Record,
    kl_nats: npt.NDArray[np.float64] | None,
    near_tie_margin: float,
    decided_margin: float,
    kl_probe_nats: float | None = None,
    kernels: Sequence[KernelCheck] = (),
) -> Evidence:
    """What a device's record of the reference's sequences amounts to; margins in logits.

    kl_nats: host || device at each position (S, N). None in mode "generate": there the host, which
    was fed the original's text, says what it would have generated up to its own first divergence.
    """
    ids, lengths = reference.generated_ids, reference.generated_lengths
    first = first_divergent_tokens(divergent_mask(ids, record.ids, lengths), lengths)
    host_lengths = lengths
    if record.mode == "generate":
        host_first = first_divergent_tokens(divergent_mask(ids, host.ids, lengths), lengths)
        host_lengths = np.minimum(host_first + 1, lengths)
    return Evidence(
        mode=record.mode,
        against_original=compare(ids, record.ids, lengths, reference.margins, near_tie_margin),
        against_host=compare(host.ids, record.ids, host_lengths),
        host=None if kl_nats is None else _against_host(host, record, kl_nats, decided_margin),
        kl_probe_nats=kl_probe_nats,
        kernels=kernels,
        first_divergent_tokens=first.tolist(),
        lengths=lengths.tolist(),
    )


def _against_host(
    host: Record, record: Record, kl: npt.NDArray[np.float64], decided_margin: float
) -> AgainstHost:
    """Mean KL over positions, each capped at KL_CAP_NATS; the share of other argmaxes where the
    host's own margin is at least decided_margin; the host's largest margin, in logits, at which the
    device chose another token, 0 when it never did."""
    counted = np.arange(host.ids.shape[1])[None, :] < host.lengths[:, None]
    other = divergent_mask(host.ids, record.ids, host.lengths)
    margins = host.top_logits[:, :, 0] - host.top_logits[:, :, 1]
    decided = counted & (margins >= decided_margin)
    return AgainstHost(
        kl_vs_host_nats=float(np.minimum(kl[counted], KL_CAP_NATS).mean()),
        decided_sdt_vs_host=float((other & decided).sum() / max(decided.sum(), 1)),
        largest_margin_vs_host=float(margins[other].max(initial=0.0)),
    )


def limits_of_part(thresholds: Thresholds, host: Divergence, part: Divergence) -> Thresholds:
    """The thresholds against the original for a part of the bundle's sequences.

    host and part: the host's own run of the file against the original, on all and on these. Some
    sequences are easier than others, which the host's run shows; and what remains, the difference
    between device and host, is a mean of fewer, so that its room grows with the root.
    A threshold that the host itself misses is the user's wish and stays where it is.
    """
    if part.sequences == host.sequences:
        return thresholds
    wider = math.sqrt(host.sequences / part.sequences)
    max_sdt, min_fdt = thresholds.max_sdt, thresholds.min_fdt
    if host.sdt.value <= max_sdt:
        max_sdt = min(part.sdt.value + (max_sdt - host.sdt.value) * wider, 1.0)
    if host.fdt.value >= min_fdt:
        min_fdt = max(part.fdt.value - (host.fdt.value - min_fdt) * wider, 0.0)
    return replace(thresholds, max_sdt=max_sdt, min_fdt=min_fdt)


@dataclass(frozen=True)
class ThresholdCheck:
    """of_host: whether it compares the machine with the host, not the model with the original."""

    name: str
    met: bool
    text: str
    of_host: bool = True


def _check(name: str, met: bool, value: str, limit: str, of_host: bool = True) -> ThresholdCheck:
    relation = "wanted" if met else "but wanted is"
    return ThresholdCheck(name, met, f"{value}, {relation} {limit}.", of_host)


def _threshold_checks(e: Evidence, t: Thresholds) -> list[ThresholdCheck]:
    fdt, sdt = e.against_original.fdt.value, e.against_original.sdt.value
    value = f"FDT against the original is {fdt:.2f} tokens"
    limit = f"at least {t.min_fdt:.2f}"
    checks = [_check("fdt", fdt >= t.min_fdt, value, limit, of_host=False)]
    if e.mode == "teacher_forced":
        value, limit = f"SDT against the original is {sdt:.3%}", f"at most {t.max_sdt:.3%}"
        checks.append(_check("sdt", sdt <= t.max_sdt, value, limit, of_host=False))
    if e.host is not None:
        kl, most = e.host.kl_vs_host_nats, t.max_kl_vs_host
        value = f"KL against the host's run of this file is {kl:.2g} nats"
        checks.append(_check("kl", kl <= most, value, f"at most {most:.2g}"))
        share, most = e.host.decided_sdt_vs_host, t.max_decided_sdt_vs_host
        value = f"The share of other tokens where the host was sure ({t.decided_margin:g} logits)"
        checks.append(
            _check("decided", share <= most, f"{value} is {share:.3%}", f"at most {most:.3%}")
        )
    if e.kl_probe_nats is not None:
        kl, most = e.kl_probe_nats, t.max_kl_probe
        value = f"KL of the small F16 model against the host's is {kl:.2g} nats"
        checks.append(_check("probe", kl <= most, value, f"at most {most:.2g}"))
    if e.kernels:
        checks.append(_kernels_check(e.kernels))
    return checks


def _kernels_check(kernels: Sequence[KernelCheck]) -> ThresholdCheck:
    worst = max(kernels, key=lambda k: (not k.ok, k.worst_relative_error))
    if worst.ok:
        text = (
            f"All {len(kernels)} kernels agree with numpy (largest relative error "
            f"{worst.worst_relative_error:.1g})."
        )
    else:
        text = (
            f"{sum(not k.ok for k in kernels)} of {len(kernels)} kernels compute wrong products "
            f"(worst: {worst.type} {worst.path}, {worst.columns} columns, {worst.component}, "
            f"relative error {worst.worst_relative_error:.1g})."
        )
    return ThresholdCheck("kernels", worst.ok, text)


def judge(
    evidence: Evidence, thresholds: Thresholds, host_meets: bool
) -> tuple[bool, list[str], Diagnosis]:
    """(passed, reasons, diagnosis). host_meets: whether the host's own run of this file meets the
    thresholds against the original."""
    checks = _threshold_checks(evidence, thresholds)
    passed = all(c.met for c in checks)
    reasons = [c.text for c in checks if c.met == passed]
    return passed, reasons, _diagnosis(checks, evidence, host_meets)


def _diagnosis(checks: Sequence[ThresholdCheck], e: Evidence, host_meets: bool) -> Diagnosis:
    if all(c.met for c in checks):
        return Diagnosis("healthy", "This machine computes what the host computed.")
    if any(c.of_host and not c.met for c in checks):
        bad = sorted({f"{k.type} ({k.path})" for k in e.kernels if not k.ok})
        if bad:
            where = f"its kernels for {', '.join(bad)} are wrong"
        elif any(c.name == "probe" and not c.met for c in checks):
            where = "even the small F16 model comes out differently, so it is not quantization"
        elif e.kernels:
            where = "single products are right, so look at attention, threads and memory"
        else:
            where = "single products were not checked, so verify without --kernels skip first"
        return Diagnosis(
            "broken_kernels",
            f"Broken kernels: this machine does not compute what the host computed from the same "
            f"file; {where}. Run edge-dtm doctor, then edge-dtm verify --kernels compare, and "
            "rebuild llama-cpp-python.",
        )
    if e.mode == "generate":
        return Diagnosis(
            "bad_plan",
            "The text leaves the original's too early. Run edge-dtm verify without --mode generate, "
            "which tells a bad plan from broken kernels.",
        )
    if not host_meets:
        return Diagnosis(
            "bad_plan",
            "Bad plan: this machine computes what the host computed, and both are as far from the "
            "original. Compress again with a larger --max-bytes, or set other thresholds.",
        )
    return Diagnosis(
        "too_close",
        "This machine computes what the host computed, but for the rounding that healthy kernels "
        "differ by, and that carried it over a threshold that the host just meets. Compress again "
        "with a larger --max-bytes, or set thresholds with more room.",
    )
