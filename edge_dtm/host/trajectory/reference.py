"""The greedy reference of a run: which prompts, in which part, and the original's answers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.model import load_model
from edge_dtm.host.settings import Source
from edge_dtm.host.trajectory.generate import generate_reference, signed_margins
from edge_dtm.host.trajectory.prompts import Prompt, packaged_prompts, sample_prefixes
from edge_dtm.host.values import Base, Run
from edge_dtm.search.cost_table import Predictor

SAMPLED_PROMPTS = 40
EXTRA_PROMPTS = 48  # sampled too, but only ever used to fit error feedback and scales
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


def reference_inputs(
    checkpoint: Checkpoint, source: Source, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """All that the reference depends on."""
    return {
        "model": checkpoint.check(),
        "seed": source.seed,
        "tokens": source.tokens,
        "prompts": [p.ids for p in prompts],
        "sampled": [SAMPLED_PROMPTS, EXTRA_PROMPTS, PACKAGED_PROMPTS],
        "held_out": HELD_OUT_SHARE,
        "versions": export.provenance(checkpoint)["packages"],
    }


def greedy_reference(run: Run) -> Reference:
    """The original's greedy tokens on all prompts, from the work folder or made now."""
    source, checkpoint = run.settings.source, run.checkpoint
    tokenizer = checkpoint.tokenizer
    inputs = reference_inputs(checkpoint, source, run.prompts)
    parts = run.work.path_of(REFERENCE, inputs).with_suffix(".parts")

    def make(_: Path) -> Reference:
        with run.stages("Loading the model", 1):
            model = load_model(checkpoint, run.device)
        with run.stages("Sampling prompts", 1):
            sampled = sample_prefixes(model, tokenizer, run.prompts, SAMPLED_PROMPTS, source.seed)
            extra = sample_prefixes(model, tokenizer, run.prompts, EXTRA_PROMPTS, source.seed + 1)
        packaged = packaged_prompts(tokenizer)[:PACKAGED_PROMPTS] if source.prompts else []
        measured = [*run.prompts, *sampled]
        prompts, split = split_prompts(measured, extra, packaged, source.seed)
        provenance = {
            **export.provenance(checkpoint),
            "seed": source.seed,
            "tokens": source.tokens,
            "device": str(run.device),
        }
        with run.stages("Greedy reference", len(prompts) * source.tokens) as advance:
            return generate_reference(
                model,
                prompts,
                tokens=source.tokens,
                eos_ids=tokenizer.eos_ids,
                split=split,
                provenance=provenance,
                parts=parts,
                progress=advance,
            )

    reference = run.work.load_or_make(REFERENCE, inputs, make)
    shutil.rmtree(parts, ignore_errors=True)
    return reference


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


def calibration_rows(reference: Reference) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows that costs are measured on, and rows that error feedback and scales are fitted to.

    They do not overlap, unless there is but one row in all.
    """
    rows = np.flatnonzero(reference.split == CALIBRATION)
    extra = np.flatnonzero(reference.split == EXTRA)
    # Of few prompts a third has to do for the fit.
    cut = COST_SEQUENCES if len(rows) > 1.5 * COST_SEQUENCES else -(-len(rows) * 2 // 3)
    if not len(extra):
        cut = max(1, min(cut, len(rows) - 1))
    fitted = np.concatenate([rows[cut:], extra])
    return rows[:cut], fitted if len(fitted) else rows


def make_predictor(run: Run, base: Base, reference: Reference) -> Predictor:
    """What costs of the base mean in tokens."""
    calibration = reference.part(CALIBRATION)

    def make(_: Path) -> npt.NDArray[np.float32]:
        with run.stages("Margins of the pruned model", 1):
            return signed_margins(load_model(base.checkpoint, run.device), calibration)

    original = base.checkpoint is run.checkpoint
    margins = calibration.margins if original else run.work.load_or_make(MARGINS, [base.key], make)
    return Predictor(margins, calibration.generated_lengths)
