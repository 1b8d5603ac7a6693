"""Distillation and gradual pruning as stages of `compress`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edge_dtm.core.work import Kind
from edge_dtm.formats.plan import Plan
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.costs import captures, measure_costs
from edge_dtm.host.blocks.prune import prune_plan
from edge_dtm.host.checkpoint.model import load_model
from edge_dtm.host.distill.distill import distill
from edge_dtm.host.distill.inputs import (
    DistilledStore,
    head_weight,
    start_values,
    teacher_text,
    texts_for,
    with_values,
    with_vectors,
)
from edge_dtm.host.distill.result import Distilled, plain_point
from edge_dtm.host.distill.settings import DistillSettings
from edge_dtm.host.measure import export_and_measure
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.host.values import Base, Candidate, Costs, Encoded, NoiseFloor, Run
from edge_dtm.search.allocation import search

DISTILLED: Kind[Distilled] = Kind(
    "distilled",
    "",
    Distilled.load,
    lambda result, folder: result.save(folder),
    marker="distilled.json",
    version=3,
)


@dataclass(frozen=True)
class Distillation:
    """One distillation, for the report. name: of the stage, such as `of the plan`."""

    name: str
    result: Distilled

    def to_json(self) -> dict[str, Any]:
        return {
            # Before the first step there is no loss.
            "curve": [plain_point(p) for p in self.result.curve],
            "best_step": self.result.best_step,
            "steps": self.result.steps,
            "tokens_per_s": self.result.tokens_per_s,
            "peak_rss_bytes": self.result.peak_rss_bytes,
        }


def prune_gradually(
    run: Run, base: Base, reference: Reference
) -> tuple[Base, tuple[Distillation, ...]]:
    """With --sparsity in several steps: all but the last of them, each with its distillation. The
    last is the plan's own, in which types are chosen too."""
    goal, method = run.settings.goal, run.settings.method
    if not goal.sparsity or method.sparsity_steps < 2:
        return base, ()
    distillations: list[Distillation] = []
    for step in range(1, method.sparsity_steps):
        # Each step prunes the same share of what is left.
        share = 1 - (1 - goal.sparsity) ** (step / method.sparsity_steps)
        run.stages.note(f"Sparsity, step {step} of {method.sparsity_steps}: {share:.1%} zeros")
        masks_only = replace(goal, types=("F16",), sparsity=share)
        costs = measure_costs(run, base, reference, masks_only)
        plan = search(costs.table, base.fixed_bytes + 2 * run.f16_bytes, share)
        encoded = prune_plan(run, base, costs, plan, reference)
        distillation = _distill(run, costs, plan, encoded, reference, f"at {share:.1%} zeros")
        distillations.append(distillation)
        base = _next_base(run, base, costs, plan, encoded, distillation, reference)
    return base, tuple(distillations)


def _next_base(
    run: Run,
    base: Base,
    costs: Costs,
    plan: Plan,
    encoded: Encoded,
    distillation: Distillation,
    reference: Reference,
) -> Base:
    """The distilled model as what is pruned further."""
    inputs = _inputs(run, costs, plan, encoded)
    checkpoint = with_values(
        costs.equalized, distillation.result, run.work.path("base", inputs, ".safetensors")
    )
    captures(run, base, reference)[1].remove()
    zeros = {
        c.name: t.zero_share
        for c, t in zip(plan.components, plan.treatments, strict=True)
        if t.zero_share
    }
    key = run.work.path("base", inputs).name.removeprefix("base-")
    return Base(checkpoint, key, base.fixed_bytes, {**base.zeros, **zeros})


def _inputs(run: Run, costs: Costs, plan: Plan, encoded: Encoded) -> list[Any]:
    """What a distillation depends on."""
    settings = run.settings
    return [run.key, costs.encoded.key, plan.hash, encoded.key, settings.method.distill_steps]


def _distill(
    run: Run, costs: Costs, plan: Plan, encoded: Encoded, reference: Reference, name: str
) -> Distillation:
    """One distillation, from the work folder or made now."""
    settings = DistillSettings(run.settings.method.distill_steps, seed=run.settings.source.seed)
    measured, _ = calibration_rows(reference)

    def make(folder: Any) -> Distilled:
        text = teacher_text(run, reference, texts_for(settings.steps, settings.batch_tokens))
        student = load_model(costs.equalized, run.device)
        with run.stages(f"Distillation {name}", settings.steps) as advance:
            done = 0

            def progress(step: int, loss: float, sdt: float) -> None:
                nonlocal done
                run.stages.describe(f"Distillation {name}: loss {loss:.3f}, SDT {sdt:.2%}")
                advance(step - done)
                done = step

            return distill(
                student,
                start_values(costs.equalized, plan, encoded),
                head_weight(run.checkpoint),
                text,
                reference.rows(measured),
                settings,
                folder,
                progress,
            )

    result = run.work.load_or_make(DISTILLED, _inputs(run, costs, plan, encoded), make)
    first, best = result.curve[0], _best(result)
    run.stages.note(
        f"Distillation {name}, on {len(measured)} sequences that were not trained on: SDT "
        f"{first['sdt']:.2%} became {best['sdt']:.2%}, mean FDT {first['fdt']:.1f} became "
        f"{best['fdt']:.1f}, perplexity {first['perplexity']:.4f} became {best['perplexity']:.4f} "
        f"(best at step {result.best_step} of {result.steps}; {result.tokens_per_s:.0f} tokens/s, "
        f"peak memory {result.peak_rss_bytes / 1e9:.1f} GB)"
    )
    return Distillation(name, result)


def _best(result: Distilled) -> Mapping[str, float]:
    return next(p for p in result.curve if p["step"] == result.best_step)


def distill_plan(
    run: Run, costs: Costs, chosen: Candidate, reference: Reference, floor: NoiseFloor
) -> tuple[Candidate, tuple[Distillation, ...]]:
    """With --distill: the plan's model trained with its grids and zeros, exported and measured."""
    if not run.settings.method.distill_steps:
        return chosen, ()
    distillation = _distill(run, costs, chosen.plan, chosen.encoded, reference, "of the plan")
    result = distillation.result
    if not result.best_step:
        return chosen, (distillation,)
    inputs = _inputs(run, costs, chosen.plan, chosen.encoded)
    vectors = with_vectors(
        costs.equalized, result, run.work.path("vectors", inputs, ".safetensors")
    )
    key = run.work.path_of(DISTILLED, inputs).name
    encoded = DistilledStore(key, costs.equalized, result, chosen.encoded)
    measurement = export_and_measure(run, chosen.plan, encoded, vectors, reference, floor)
    return replace(chosen, encoded=encoded, measurement=measurement), (distillation,)
