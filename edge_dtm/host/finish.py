"""The end of `compress`: the bundle's files put in their place, the manifest last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from edge_dtm.core import strict_json
from edge_dtm.core.metrics import divergent_mask, first_divergent_tokens, perplexity
from edge_dtm.formats import bundle
from edge_dtm.formats.ggml_types import facts
from edge_dtm.formats.plan import Plan, distinct_texts
from edge_dtm.formats.reference import CALIBRATION, EXTRA, HELD_OUT, Reference
from edge_dtm.formats.thresholds import Thresholds, thresholds_from, tolerance_of_kernels
from edge_dtm.host import export
from edge_dtm.host.distill.stage import Distillation
from edge_dtm.host.measure import model_path
from edge_dtm.host.trajectory.reference import check_reference
from edge_dtm.host.values import Candidate, Measurement, NoiseFloor, Run
from edge_dtm.llamacpp import probe_model
from edge_dtm.llamacpp.ggml import zero_shares
from edge_dtm.report import summary
from edge_dtm.search.allocation import frontier
from edge_dtm.search.cost_table import CostTable, Prediction, Predictor

UNITS = {
    "size": "bytes",
    "cost": "logits squared",
    "sigma": "logits",
    "fdt": "tokens",
}


def finish(
    run: Run,
    reference: Reference,
    plan_json: Mapping[str, Any],
    chosen: Candidate,
    results: Mapping[str, Any],
) -> None:
    """Write the bundle. An old manifest or signature is removed first: it would vouch for files
    that are being replaced."""
    work, out = run.work.folder, run.settings.out
    plan, measurement = chosen.plan, chosen.measurement
    held_out = reference.part(HELD_OUT)
    details = _details(run, reference)
    (work / bundle.PLAN).write_text(strict_json.dumps(plan_json))
    held_out.save(work / bundle.REFERENCE)
    measurement.record.save(work / bundle.HOST_RECORD)
    divergence = measurement.divergence
    export.write_measured(model_path(run), divergence.sdt.value, divergence.fdt.value)
    probe = work / "probe.gguf"
    probe_model.record(probe, run.run_settings).save(work / bundle.PROBE_RECORD)
    probe.unlink()
    zeros = zero_shares(model_path(run)) if plan.zero_share else {}
    report = summary.markdown(plan, results, details, zeros)
    (work / bundle.REPORT).write_text(report)
    for name in (bundle.MANIFEST, bundle.SIGNATURE):
        (out / name).unlink(missing_ok=True)
    for name in bundle.LISTED_FILES:
        (work / name).replace(out / name)
    thresholds = _thresholds(run, plan, measurement, held_out)
    bundle.write_manifest(out, bundle.LISTED_FILES, thresholds, details, strict_json.plain(results))
    for path in work.glob("calibration-*"):
        shutil.rmtree(path, ignore_errors=True)
    run.stages.note("")
    summary.print_summary(run.stages.console, plan, results, run.stages.seconds, out)


def plan_with_costs(
    plan: Plan, prediction: Prediction, table: CostTable, predictor: Predictor
) -> dict[str, Any]:
    """plan.json: the plan, and what it was chosen from."""
    return {
        **plan.to_json(),
        "sha256": plan.hash,
        "predicted": prediction.to_json(),
        "frontier": [p.to_json() for p in frontier(table, predictor)],
        "costs": [
            {"name": c.name, "costs": {texts[t]: v for t, v in zip(ts, cs, strict=True)}}
            for c, ts, cs in zip(table.components, table.treatments, table.costs, strict=True)
            for texts in [distinct_texts(ts)]
        ],
        "units": UNITS,
    }


def results_of(
    run: Run,
    reference: Reference,
    chosen: Candidate,
    before_distillation: Measurement,
    floor: NoiseFloor,
    packaged: Measurement | None,
    distillations: Sequence[Distillation],
) -> dict[str, Any]:
    """What was measured, as the manifest and the report have it."""
    held_out = reference.part(HELD_OUT)
    original = held_out.top_logits[:, :, 0] - held_out.log_normalizers
    method = run.settings.method
    results = {
        **chosen.measurement.to_json(),
        "predicted": chosen.prediction.to_json(),
        "original_perplexity": perplexity(original, held_out.generated_lengths),
        "noise_floor": _floor_json(floor, held_out),
        "size_bytes": chosen.plan.size_bytes,
        "f16_bytes": run.f16_bytes,
        "zero_share": chosen.plan.zero_share,
        "packaged_prompts": None if packaged is None else packaged.divergence.to_json(),
        "run_settings": run.run_settings.to_json(),
    }
    if distillations:
        results["distillation"] = {d.name: d.to_json() for d in distillations}
    if method.sparsity_steps > 1:
        results["sparsity_steps"] = method.sparsity_steps
    if method.distill_steps:
        results["before_distillation"] = before_distillation.to_json()
    return results


def _floor_json(floor: NoiseFloor, held_out: Reference) -> dict[str, Any]:
    lengths, record = held_out.generated_lengths, floor.measurement.record
    mask = divergent_mask(held_out.generated_ids, record.ids, lengths)
    return {
        **floor.measurement.to_json(),
        "first_divergent_tokens": first_divergent_tokens(mask, lengths).tolist(),
        "lengths": lengths.tolist(),
        "type": "F16",
    }


def _details(run: Run, reference: Reference) -> dict[str, Any]:
    """Where the bundle comes from: its manifest's provenance."""
    source, goal, method = run.settings.source, run.settings.goal, run.settings.method
    fitted = (reference.split == CALIBRATION) | (reference.split == EXTRA)
    return {
        **export.provenance(run.checkpoint, check_reference(run, reference)),
        "profile": goal.profile.name,
        "budget": run.budget.text,
        "max_bytes": run.budget.max_bytes,
        "seed": source.seed,
        "tokens": source.tokens,
        "types": list(goal.types),
        "prompts": source.prompts.name if source.prompts else "packaged",
        "calibration_sequences": int(fitted.sum()),
        "error_feedback": method.feedback,
        "equalization": method.equalize,
        "imatrix": source.imatrix.name if source.imatrix else "our own",
        "work_key": run.key,
        "held_out_sequences": len(reference.part(HELD_OUT)),
        **({"mask_score": method.mask_score} if goal.sparsity else {}),
        **({"sparsity_steps": method.sparsity_steps} if goal.sparsity else {}),
        **({"distill_steps": method.distill_steps} if method.distill_steps else {}),
    }


def _thresholds(run: Run, plan: Plan, measurement: Measurement, held_out: Reference) -> Thresholds:
    record, goal = measurement.record, run.settings.goal
    tolerance = tolerance_of_kernels(
        held_out.generated_ids, record.top_ids, record.top_logits, held_out.generated_lengths
    )
    quantized = any(facts(t.type).quantized for t in plan.treatments)
    return thresholds_from(measurement.divergence, tolerance, quantized, goal.max_sdt, goal.min_fdt)
