"""A bundle in, a verdict out: does this device reproduce the original's tokens well enough?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_dtm import bundle as bundles
from edge_dtm.device import runner
from edge_dtm.device.runner import LlamaRunner, Mode, Record, RunSettings
from edge_dtm.errors import EdgeDtmError
from edge_dtm.metrics import Divergence, compare
from edge_dtm.reference import Reference

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_VERSION = 1
SPEED_PROMPT_TOKENS, SPEED_DECODE_TOKENS = 128, 32

# Stage, amount done, amount in all; the stages are "check" (bytes) and "replay" (tokens).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Verdict:
    """What a device did with a bundle.

    reasons: one sentence for each threshold missed, or for each one met if none is missed.
    against_original, against_host: in mode "generate" their sdt is no SDT (see to_json).
    kl_vs_host: nats, mean over positions, on the host's stored top logits, renormalized; None in
    mode "generate". Speeds in tokens per second. sequences of sequences_in_bundle were replayed;
    the thresholds hold for those. noise_floor: the uncompressed model's own figures, from the
    manifest.
    """

    passed: bool
    reasons: list[str]
    mode: Mode
    against_original: Divergence
    against_host: Divergence
    kl_vs_host: float | None
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_rss_bytes: int
    sequences: int
    sequences_in_bundle: int
    settings: Mapping[str, Any]
    runtime: Mapping[str, Any]
    noise_floor: Mapping[str, Any]
    thresholds: bundles.Thresholds

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; in mode "generate" what is only defined on the reference's text is null."""
        notes = []
        if self.mode == "generate":
            notes.append(
                "SDT is defined on the reference's own text: in mode generate FDT is judged and the "
                "share of identical sequences shown, no SDT or KL threshold is applied"
            )
        if self.sequences < self.sequences_in_bundle:
            notes.append(
                f"the thresholds were applied to the first {self.sequences} of "
                f"{self.sequences_in_bundle} sequences"
            )
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "edge-dtm verdict",
            "passed": self.passed,
            "reasons": list(self.reasons),
            "notes": notes,
            "mode": self.mode,
            "sequences": self.sequences,
            "sequences_in_bundle": self.sequences_in_bundle,
            "against_original": self._divergence_json(self.against_original),
            "against_host": self._divergence_json(self.against_host),
            "kl_vs_host_nats": self.kl_vs_host,
            "prefill_tokens_per_s": _finite_or_none(self.prefill_tokens_per_s),
            "decode_tokens_per_s": _finite_or_none(self.decode_tokens_per_s),
            "peak_rss_bytes": self.peak_rss_bytes,
            "settings": dict(self.settings),
            "runtime": dict(self.runtime),
            "noise_floor": dict(self.noise_floor),
            "thresholds": self.thresholds.to_json(),
        }

    def _divergence_json(self, divergence: Divergence) -> dict[str, Any]:
        data = divergence.to_json()
        if self.mode == "generate":
            data |= {"sdt": None, "divergent_tokens": None, "near_tie_share": None}
        return data


def verify(
    bundle_path: Path,
    *,
    mode: Mode = "teacher_forced",
    threads: int | None = None,
    max_sequences: int | None = None,
    max_sdt: float | None = None,
    min_fdt: float | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Check a bundle, folder or packed, replay its reference on this machine and judge.

    threads: this machine's CPUs when None. max_sequences: replay the first ones only. max_sdt
    (share) and min_fdt (tokens) replace the bundle's own thresholds. Mode "teacher_forced" feeds
    the original's tokens; "generate" decodes for real, so that FDT is the one a user sees, and SDT
    and KL, defined on the original's text, are not judged.
    EdgeDtmError for a bundle that is not as it was made or that llama.cpp reads differently.
    """
    if mode not in ("teacher_forced", "generate"):
        raise EdgeDtmError(f"unknown mode {mode!r}: take teacher_forced or generate")
    if max_sequences is not None and max_sequences < 1:
        raise EdgeDtmError(f"max_sequences is {max_sequences}, needs to be 1 or more")
    with bundles.open_bundle(Path(bundle_path)) as bundle:
        bundle.check(_counter(progress, "check", bundle.size_bytes))
        thresholds = bundle.manifest.thresholds
        if max_sdt is not None:
            thresholds = replace(thresholds, max_sdt=max_sdt)
        if min_fdt is not None:
            thresholds = replace(thresholds, min_fdt=min_fdt)
        model = bundle.path(bundles.MODEL)
        runner.check_gguf(model)
        reference, host = _load(bundle)
        in_bundle = len(reference)
        if max_sequences is not None and max_sequences < in_bundle:
            first = np.arange(max_sequences)
            reference, host = reference.rows(first), host.rows(first)
        check_tokens(model, reference)
        # All but the threads as on the host: these settings can change an argmax.
        settings = replace(
            RunSettings.from_json(host.settings), threads=threads or runner.default_threads()
        )
        context = max(runner.context_needed(reference), SPEED_PROMPT_TOKENS + SPEED_DECODE_TOKENS)
        count = _counter(progress, "replay", runner.replay_tokens(reference))
        logits_there = np.zeros_like(host.top_logits)

        def observe(row: int, position: int, logits: npt.NDArray[np.float32]) -> None:
            logits_there[row, position] = logits[host.top_ids[row, position]]

        with LlamaRunner(model, settings, context) as llama:
            _check_host_ids(host, llama.n_vocab)
            if mode == "teacher_forced":
                record = llama.teacher_forced(reference, count, observe)
            else:
                record = llama.greedy(reference, count)
            prefill, decode = llama.measure_speed(SPEED_PROMPT_TOKENS, SPEED_DECODE_TOKENS)
        noise_floor = _noise_floor(bundle)
        return _judge(
            mode=mode,
            reference=reference,
            host=host,
            record=record,
            kl=top_kl(host, logits_there) if mode == "teacher_forced" else None,
            speeds=(prefill, decode),
            in_bundle=in_bundle,
            noise_floor=noise_floor,
            thresholds=thresholds,
        )


def check_tokens(model: Path, reference: Reference) -> None:
    """EdgeDtmError unless llama.cpp makes the reference's prompt ids from its texts."""
    made = runner.tokenize(model, [str(text) for text in reference.texts], add_special=True)
    wrong = [row for row, ids in enumerate(made) if ids != reference.prompt(row)]
    if wrong:
        row = wrong[0]
        expected = reference.prompt(row)
        pairs = zip(made[row], expected, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        at = min(len(made[row]), len(expected)) if at is None else at
        raise EdgeDtmError(
            f"llama.cpp makes other token ids from {len(wrong)} of {len(reference)} prompts than "
            f"the original's tokenizer (first: prompt {row + 1}, token {at + 1}: "
            f"{made[row][at : at + 3]} instead of {expected[at : at + 3]}): the GGUF's tokenizer "
            "is wrong, make the bundle again"
        )


def top_kl(host: Record, logits: npt.NDArray[np.float32]) -> float:
    """Mean KL divergence, host || device, in nats over the counted positions.

    logits float32 (S, N, K): the device's at host.top_ids. Both sides are renormalized over these
    K tokens, so what lies outside them does not count.
    """
    counted = np.arange(host.ids.shape[1])[None, :] < host.lengths[:, None]
    ours = _log_softmax(logits[counted])
    theirs = _log_softmax(host.top_logits[counted])
    if not len(ours):
        return 0.0
    # Rounding can make the sum slightly negative where both agree.
    return max(float((np.exp(theirs) * (theirs - ours)).sum(axis=-1).mean()), 0.0)


def print_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Print a table and, as the last line, PASS or FAIL with the reason."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    generate = verdict.mode == "generate"
    limits = verdict.thresholds
    table = Table(
        title=f"{verdict.sequences} of {verdict.sequences_in_bundle} sequences; FDT in tokens"
    )
    for name in ("", "measured", "95 % interval", "threshold", "noise floor"):
        table.add_column(name, justify="left" if not name else "right")

    def row(label: str, value: str, interval: str = "", limit: str = "", floor: str = "") -> None:
        table.add_row(label, value, interval, limit, floor)

    def divergence(
        name: str, d: Divergence, sdt_limit: str, fdt_limit: str, floor: Mapping[str, Any]
    ) -> None:
        if not generate:
            interval = f"{d.sdt.low:.1%} to {d.sdt.high:.1%}"
            row(f"SDT {name}", f"{d.sdt.value:.2%}", interval, sdt_limit, _share(floor.get("sdt")))
        fdt_floor = _plain(floor.get("fdt"))
        interval = f"{d.fdt.low:.1f} to {d.fdt.high:.1f}"
        row(f"FDT {name}", f"{d.fdt.value:.1f}", interval, fdt_limit, fdt_floor)
        identical = _share(floor.get("identical_share"))
        row(f"identical {name}", f"{d.identical_share:.1%}", floor=identical)

    original = verdict.against_original
    divergence(
        "vs original",
        original,
        f"≤ {limits.max_sdt:.2%}",
        f"≥ {limits.min_fdt:.1f}",
        verdict.noise_floor,
    )
    if not generate:
        row(
            f"near-ties (≤ {original.near_tie_margin:.2g})",
            f"{original.near_tie_share:.2%}",
        )
    divergence("vs host", verdict.against_host, f"≤ {limits.max_sdt_vs_host:.2%}", "", {})
    if verdict.kl_vs_host is not None:
        row(
            "KL vs host, nats",
            f"{verdict.kl_vs_host:.2g}",
            "",
            f"≤ {limits.max_kl_vs_host:.2g}",
        )
    row("prefill, tokens/s", f"{verdict.prefill_tokens_per_s:.1f}")
    row("decode, tokens/s", f"{verdict.decode_tokens_per_s:.1f}")
    row("peak memory, MB", f"{verdict.peak_rss_bytes / 1e6:.0f}")
    console.print(table)
    for note in verdict.to_json()["notes"]:
        console.print(escape(f"Note: {note}."))
    word = "[bold green]PASS[/]" if verdict.passed else "[bold red]FAIL[/]"
    console.print(f"{word} {escape(' '.join(verdict.reasons))}")


def _load(bundle: bundles.Bundle) -> tuple[Reference, Record]:
    reference = Reference.load(bundle.path(bundles.REFERENCE))
    host = Record.load(bundle.path(bundles.HOST_RECORD))
    if not len(reference):
        raise EdgeDtmError(f"{bundle.source}: its reference has no sequences; make it again")
    if host.mode != "teacher_forced" or not (
        host.ids.shape == reference.generated_ids.shape
        and np.array_equal(host.lengths, reference.generated_lengths)
    ):
        raise EdgeDtmError(
            f"{bundle.source}: its host record does not belong to its reference; make it again"
        )
    return reference, host


def _check_host_ids(host: Record, n_vocab: int) -> None:
    counted = np.arange(host.ids.shape[1])[None, :] < host.lengths[:, None]
    ids = host.top_ids[counted]
    if ids.size and (ids.min() < 0 or ids.max() >= n_vocab):
        raise EdgeDtmError("the host record has ids outside the vocabulary; make the bundle again")


def _noise_floor(bundle: bundles.Bundle) -> dict[str, Any]:
    floor = bundle.manifest.measured.get("noise_floor", {})
    margin = floor.get("near_tie_margin", 0) if isinstance(floor, dict) else None
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or margin < 0:
        raise EdgeDtmError(f"{bundle.source}: the noise floor in its manifest cannot be read")
    return dict(floor)


def _judge(
    *,
    mode: Mode,
    reference: Reference,
    host: Record,
    record: Record,
    kl: float | None,
    speeds: tuple[float, float],
    in_bundle: int,
    noise_floor: Mapping[str, Any],
    thresholds: bundles.Thresholds,
) -> Verdict:
    lengths = reference.generated_lengths
    original = compare(
        reference.generated_ids,
        record.ids,
        lengths,
        reference.margins,
        float(noise_floor.get("near_tie_margin", 0.0)),
    )
    host_lengths = lengths
    if mode == "generate":
        # The host was fed the original's text: behind its first divergence its argmaxes are no
        # longer what it would have generated.
        off = host.ids != reference.generated_ids
        first = np.where(off.any(axis=1), off.argmax(axis=1) + 1, lengths)
        host_lengths = np.minimum(first, lengths)
    against_host = compare(host.ids, record.ids, host_lengths)

    # Whether it is met, and the sentence.
    checks: list[tuple[bool, str]] = []

    def judge(met: bool, what: str, value: str, relation: str, limit: str) -> None:
        checks.append(
            (
                met,
                f"{what} is {value}{', wanted' if met else ', but wanted is'} {relation} {limit}.",
            )
        )

    fdt, sdt = original.fdt.value, original.sdt.value
    judge(
        fdt >= thresholds.min_fdt,
        "FDT against the original",
        f"{fdt:.2f} tokens",
        "at least",
        f"{thresholds.min_fdt:g}",
    )
    if mode == "teacher_forced" and kl is not None:
        judge(
            sdt <= thresholds.max_sdt,
            "SDT against the original",
            f"{sdt:.3%}",
            "at most",
            f"{thresholds.max_sdt:.3%}",
        )
        judge(
            against_host.sdt.value <= thresholds.max_sdt_vs_host,
            "SDT against the host's run of this file",
            f"{against_host.sdt.value:.3%}",
            "at most",
            f"{thresholds.max_sdt_vs_host:.3%}",
        )
        judge(
            kl <= thresholds.max_kl_vs_host,
            "KL against the host's run of this file",
            f"{kl:.3g} nats",
            "at most",
            f"{thresholds.max_kl_vs_host:.3g}",
        )
    passed = all(met for met, _ in checks)
    return Verdict(
        passed=passed,
        reasons=[text for met, text in checks if met == passed],
        mode=mode,
        against_original=original,
        against_host=against_host,
        kl_vs_host=kl,
        prefill_tokens_per_s=speeds[0],
        decode_tokens_per_s=speeds[1],
        peak_rss_bytes=runner.peak_rss_bytes(),
        sequences=len(reference),
        sequences_in_bundle=in_bundle,
        settings=record.settings,
        runtime=runner.runtime_info(),
        noise_floor=noise_floor,
        thresholds=thresholds,
    )


def _counter(progress: Progress | None, stage: str, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def count(amount: int) -> None:
        nonlocal done
        done += amount
        progress(stage, done, total)

    return count


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _value(item: object) -> float | None:
    """A number, or the value of an Interval's JSON."""
    if isinstance(item, dict):
        item = item.get("value")
    if isinstance(item, bool) or not isinstance(item, (int, float)):
        return None
    return float(item)


def _share(item: object) -> str:
    value = _value(item)
    return "" if value is None else f"{value:.2%}"


def _plain(item: object) -> str:
    value = _value(item)
    return "" if value is None else f"{value:.1f}"
