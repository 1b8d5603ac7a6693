"""The cost of every treatment of every component, from the work folder or measured now."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.work import Kind
from edge_dtm.formats.plan import SPARSE_LEVELS, candidate_treatments
from edge_dtm.formats.reference import Reference, save_npz
from edge_dtm.host.blocks.activations import Activations
from edge_dtm.host.blocks.calibration import Calibration
from edge_dtm.host.blocks.encoded import EncodedStore
from edge_dtm.host.blocks.jobs import CostJobs, measure_components, read_costs
from edge_dtm.host.blocks.scales import (
    find_scales,
    load_scales,
    logit_difference,
    save_scales,
    top_logits,
)
from edge_dtm.host.checkpoint.derived import EqualizedCheckpoint
from edge_dtm.host.checkpoint.model import load_model
from edge_dtm.host.quantize.equalize import sites
from edge_dtm.host.settings import Goal
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.host.values import Base, Costs, Run
from edge_dtm.search.cost_table import CostTable

FloatArray = npt.NDArray[np.float32]
METHOD = 3  # of the measurement; raise it when that changes, and old costs are measured again
CHECKED_SEQUENCES = 4
SAME_LOGITS = 1e-3  # relative to the largest: float32 rounding through all layers stays below


def measure_costs(run: Run, base: Base, reference: Reference, goal: Goal | None = None) -> Costs:
    """goal: in place of the run's, where only some treatments are wanted."""
    goal = goal or run.settings.goal
    method, config = run.settings.method, base.checkpoint.config
    components = base.components
    treatments = [
        candidate_treatments(c, goal.types, goal.sparsity > 0, base.zeros.get(c.name, 0.0))
        for c in components
    ]
    inputs = _inputs(run, base, goal)
    results = run.work.path("costs", inputs, ".jsonl")
    known = read_costs(results)
    activations, calibration = captures(run, base, reference)
    scales_kind = Kind(
        "scales", ".npz", lambda path: load_scales(path, config), lambda s, p: save_scales(p, s)
    )
    complete = all(c.name in known for c in components) and (
        not method.equalize or scales_kind.is_complete(run.work.path_of(scales_kind, [base.key]))
    )
    if complete:
        run.stages.note("costs: taken from the work folder")
    else:
        capture(run, base, calibration, activations)
    equalized, scales = base.checkpoint, {}
    if method.equalize:
        scales = run.work.load_or_make(
            scales_kind, [base.key], lambda _: _find_scales(run, base, calibration, reference)
        )
        equalized = EqualizedCheckpoint(base.checkpoint, scales)
        activations = activations.equalized(scales, config)
    encoded = EncodedStore(run.work.path("encoded", inputs), equalized)
    if not complete:
        if base.checkpoint is run.checkpoint:
            _save_imatrix(run, calibration)
        jobs = CostJobs(
            activations,
            equalized.hf_tensor,
            run.device,
            config.tied,
            calibration if method.feedback else None,
            encoded,
            run.imatrix,
            method.mask_score,
        )
        with run.stages("Sensitivity", base.weights) as advance:
            measure_components(jobs, components, treatments, results, advance)
        known = read_costs(results)
    activations.remove()
    if not run.settings.goal.sparsity:  # masks are fitted once more for the export
        calibration.remove()
    table = CostTable(
        components,
        tuple(map(tuple, treatments)),
        tuple(tuple(known[c.name]["costs"]) for c in components),
        base.fixed_bytes,
    )
    return Costs(table, encoded, equalized, scales)


def _inputs(run: Run, base: Base, goal: Goal) -> list[object]:
    """What the costs depend on."""
    method, vectors = run.settings.method, run.imatrix or {}
    inputs: list[object] = [
        METHOD,
        base.key,
        goal.types,
        goal.sparsity > 0,
        method.feedback,
        method.equalize,
        sorted((k, hashlib.sha256(v.tobytes()).hexdigest()) for k, v in vectors.items()),
    ]
    if goal.sparsity:
        inputs += [SPARSE_LEVELS, method.mask_score, dict(base.zeros)]
    return inputs


def captures(run: Run, base: Base, reference: Reference) -> tuple[Activations, Calibration]:
    """What the cost measurement and the fits read of the base's inputs and gradients."""
    measured, fitted = calibration_rows(reference)
    return (
        Activations(
            run.work.folder / f"activations-{base.key}", reference.rows(measured), base.components
        ),
        Calibration(
            run.work.folder / f"calibration-{base.key}", reference.rows(fitted), base.components
        ),
    )


def capture(
    run: Run, base: Base, calibration: Calibration, activations: Activations | None = None
) -> None:
    """Run what is not captured yet through the base."""
    model, seed = load_model(base.checkpoint, run.device), run.settings.source.seed
    total = len(calibration.reference) + (len(activations.reference) if activations else 0)
    with run.stages("Gradients", total) as advance:
        if activations:
            activations.capture(model, seed, advance)
        calibration.capture(model, seed, advance)


def _find_scales(
    run: Run, base: Base, calibration: Calibration, reference: Reference
) -> dict[str, FloatArray]:
    """EdgeDtmError when the equalized model does not compute what the base computes."""
    with run.stages("Equalization", len(sites(base.checkpoint.config))) as advance:
        scales = find_scales(calibration, base.checkpoint, advance)
    equalized = EqualizedCheckpoint(base.checkpoint, scales)
    some = reference.rows(calibration_rows(reference)[0][:CHECKED_SEQUENCES])
    original = None
    if base.checkpoint is not run.checkpoint:
        original = top_logits(load_model(base.checkpoint, run.device), some)
    with run.stages("Checking the equalized model", 1):
        difference = logit_difference(load_model(equalized, run.device), some, original)
    if not difference <= SAME_LOGITS:
        raise EdgeDtmError(
            f"equalization moved the logits by {difference:.1e} of the largest, more than "
            f"rounding does ({SAME_LOGITS:.0e}): use --no-equalize, and please report this"
        )
    return scales


def _save_imatrix(run: Run, calibration: Calibration) -> None:
    """The original's importance vectors as llama.cpp's tools know them, for `edge-dtm recipe`."""
    tied = run.checkpoint.config.tied
    names = [c.name for c in run.checkpoint.components() if tied or c.name != "token_embd"]
    save_npz(
        run.work.folder / f"imatrix-{run.key}.npz",
        {n: calibration.input_squares(n).astype(np.float32) for n in names},
        {"kind": "imatrix", "tokens": calibration.tokens, "names": names},
    )
