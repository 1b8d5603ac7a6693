"""The greedy reference of a run: which prompts, in which part, and the original's answers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.work import Kind
from edge_dtm.formats.reference import (
    CALIBRATION,
    EXTRA,
    HELD_OUT,
    PACKAGED,
    Reference,
    load_npz,
    save_npz,
)
from edge_dtm.host import export
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.settings import Source
from edge_dtm.host.trajectory.generate import generate_reference, signed_margins
from edge_dtm.host.trajectory.prompts import (
    SAMPLED_TOKENS,
    START_TOKENS,
    Prompt,
    packaged_prompts,
    sample_prefixes,
)
from edge_dtm.host.values import Base, Run
from edge_dtm.search.cost_table import Predictor

SAMPLED_PROMPTS = 40
PACKAGED_PROMPTS = 48  # measured besides the user's own
HELD_OUT_SHARE = 2 / 3
COST_SEQUENCES = 32  # enough for the ranking; more only narrows each cost (z^2 is a chi^2)

REFERENCE: Kind[Reference] = Kind(
    "reference", ".npz", Reference.load, lambda reference, path: reference.save(path)
)
MARGINS: Kind[npt.NDArray[np.float32]] = Kind(
    "margins",
    ".npz",
    lambda path: load_npz(path, ["margins"], "margins")[0]["margins"],
    lambda margins, path: save_npz(path, {"margins": margins}, {"kind": "margins"}),
)


def reference_inputs(fingerprint: str, source: Source, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """All that the reference depends on. fingerprint: of the weights."""
    return {
        "model": fingerprint,
        "seed": source.seed,
        "tokens": source.tokens,
        "prompts": [p.ids for p in prompts],
        "sampled": [SAMPLED_PROMPTS, extra_prompts(source), PACKAGED_PROMPTS],
        "held_out": HELD_OUT_SHARE,
        "versions": export.packages(),
    }


def greedy_reference(run: Run) -> Reference:
    """The original's greedy tokens on all prompts, from the work folder or made now.

    EdgeDtmError, and nothing is kept, when the weights turn out to be bad.
    """
    source = run.settings.source
    inputs = reference_inputs(run.weights.fingerprint, source, run.prompts)
    parts = run.work.path_of(REFERENCE, inputs).with_suffix(".parts")

    def make(_: Path) -> Reference:
        try:
            reference = _generate(run, parts)
            with run.stages("Checking the weights", 1):
                sha256 = run.weights.sha256()
        except Exception:  # NaN makes many things fail in many ways
            if failure := run.weights.failure():
                shutil.rmtree(parts, ignore_errors=True)
                raise failure from None
            raise
        provenance = {
            **export.provenance(run.checkpoint, sha256),
            "model_fingerprint": run.weights.fingerprint,
            "seed": source.seed,
            "tokens": source.tokens,
            "device": str(run.device),
        }
        return replace(reference, provenance=provenance)

    reference = run.work.load_or_make(REFERENCE, inputs, make)
    shutil.rmtree(parts, ignore_errors=True)
    return reference


def extra_prompts(source: Source) -> int:
    """Sampled too, but only ever used to fit error feedback and scales."""
    return max(
        1, round(source.calibration_tokens / (START_TOKENS + SAMPLED_TOKENS + source.tokens))
    )


def _generate(run: Run, parts: Path) -> Reference:
    """Without provenance. parts: see `generate_reference`."""
    source, tokenizer = run.settings.source, run.checkpoint.tokenizer
    model = Llama(run.checkpoint, run.device)
    with run.stages("Sampling prompts", 1):
        count = min(SAMPLED_PROMPTS, len(run.prompts))
        sampled = sample_prefixes(model, tokenizer, run.prompts, count, source.seed)
        count = extra_prompts(source)
        extra = sample_prefixes(model, tokenizer, run.prompts, count, source.seed + 1)
    packaged = packaged_prompts(tokenizer)[:PACKAGED_PROMPTS] if source.prompts else []
    measured = [*run.prompts, *sampled]
    prompts, split = split_prompts(measured, extra, packaged, source.seed)
    with run.stages("Greedy reference", len(prompts) * source.tokens) as advance:

        def progress(tokens: int) -> None:
            run.weights.look()
            advance(tokens)

        return generate_reference(
            model,
            prompts,
            tokens=source.tokens,
            eos_ids=tokenizer.eos_ids,
            split=split,
            provenance={},
            parts=parts,
            progress=progress,
        )


def check_reference(run: Run, reference: Reference) -> str:
    """SHA-256 of the weights. EdgeDtmError when the reference, maybe of an earlier run, is of other
    weights with the same fingerprint."""
    sha256 = run.weights.sha256()
    if sha256 != reference.provenance["model_sha256"]:
        raise EdgeDtmError(
            f"the weights of {run.settings.source.model} have changed since its work folder was "
            "begun: run edge-dtm compress again with --no-resume"
        )
    return sha256


def split_prompts(
    measured: Sequence[Prompt], extra: Sequence[Prompt], packaged: Sequence[Prompt], seed: int
) -> tuple[list[Prompt], npt.NDArray[np.uint8]]:
    """All prompts without repetition, and for each its part: uint8 (prompts,). seed: draws the
    HELD_OUT_SHARE of the measured ones."""
    prompts = list(dict.fromkeys([*measured, *extra, *packaged]))
    count = len(set(measured))
    split = np.full(len(prompts), PACKAGED, dtype=np.uint8)
    split[: len({*measured, *extra})] = EXTRA
    split[:count] = CALIBRATION
    drawn = np.random.default_rng([seed, 1]).permutation(count)
    split[drawn[: round(count * HELD_OUT_SHARE)]] = HELD_OUT
    return prompts, split


@dataclass(frozen=True)
class TextSize:
    """How much text a run works on. sequences, tokens: of the whole reference, at most; generated:
    of these tokens the new ones; longest: tokens of a sequence. measured, fitted: tokens in the two
    parts of the calibration; held_out: tokens replayed."""

    sequences: int
    tokens: int
    generated: int
    longest: int
    measured: int
    fitted: int
    held_out: int

    @property
    def calibration(self) -> int:
        return self.measured + self.fitted


def text_size(lengths: Sequence[int], source: Source) -> TextSize:
    """How much text a run works on, at most. lengths: tokens of each prompt."""
    count, generated = len(lengths), source.tokens
    mean = sum(lengths) / max(count, 1) + generated
    sampled = START_TOKENS + SAMPLED_TOKENS + generated
    drawn, extra = min(SAMPLED_PROMPTS, count), extra_prompts(source)
    each = (count * mean + drawn * sampled) / max(count + drawn, 1)
    held_out = round((count + drawn) * HELD_OUT_SHARE)
    left = count + drawn - held_out
    measured = _measured_rows(left)
    packaged = PACKAGED_PROMPTS if source.prompts else 0
    sequences = count + drawn + extra + packaged
    return TextSize(
        sequences=sequences,
        tokens=round((count + packaged) * mean + (drawn + extra) * sampled),
        generated=sequences * generated,
        longest=max(lengths, default=0) + generated,
        measured=round(measured * each),
        fitted=round((left - measured) * each + extra * sampled),
        held_out=round((held_out + packaged) * each),
    )


def _measured_rows(rows: int) -> int:
    """Of the calibration's rows, those that costs are measured on. Of few a third has to do for the
    fit."""
    return COST_SEQUENCES if rows > 1.5 * COST_SEQUENCES else -(-rows * 2 // 3)


def calibration_rows(reference: Reference) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows that costs are measured on, and rows that error feedback and scales are fitted to.

    They do not overlap, unless there is but one row in all.
    """
    rows = np.flatnonzero(reference.split == CALIBRATION)
    extra = np.flatnonzero(reference.split == EXTRA)
    cut = _measured_rows(len(rows))
    if not len(extra):
        cut = max(1, min(cut, len(rows) - 1))
    fitted = np.concatenate([rows[cut:], extra])
    return rows[:cut], fitted if len(fitted) else rows


def make_predictor(run: Run, base: Base, reference: Reference) -> Predictor:
    """What costs of the base mean in tokens."""
    calibration = reference.part(CALIBRATION)

    def make(_: Path) -> npt.NDArray[np.float32]:
        with run.stages("Margins of the pruned model", 1):
            return signed_margins(Llama(base.checkpoint, run.device), calibration)

    original = base.checkpoint is run.checkpoint
    margins = calibration.margins if original else run.work.load_or_make(MARGINS, [base.key], make)
    return Predictor(margins, calibration.generated_lengths)
