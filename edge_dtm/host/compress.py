"""From a checkpoint to a bundle: the way of the data, stage by stage. Each leaves what the next run
can go on from."""

from __future__ import annotations

from pathlib import Path

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.progress import Stages
from edge_dtm.formats.plan import Plan
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.costs import Costs, measure_costs
from edge_dtm.host.blocks.prune import prune_plan
from edge_dtm.host.distill.stage import distill_plan, prune_gradually
from edge_dtm.host.finish import finish, plan_with_costs, results_of
from edge_dtm.host.measure import export_and_measure, noise_floor, on_packaged_prompts
from edge_dtm.host.out_of_memory import out_of_memory_in_words
from edge_dtm.host.prepare import open_run
from edge_dtm.host.settings import Goal, Settings
from edge_dtm.host.trajectory.reference import greedy_reference, make_predictor
from edge_dtm.host.values import Candidate, NoiseFloor, Run
from edge_dtm.report import summary
from edge_dtm.search import target
from edge_dtm.search.allocation import frontier, least_divergent_share, search
from edge_dtm.search.cost_table import CostTable, Predictor


def compress(settings: Settings, stages: Stages) -> Path:
    """Make the bundle in settings.out and return that folder. EdgeDtmError on anything that
    cannot be done, before the long part wherever it can be known."""
    with out_of_memory_in_words(settings.method.device):
        return _compress(settings, stages)


def _compress(settings: Settings, stages: Stages) -> Path:
    run, base = open_run(settings, stages)
    reference = greedy_reference(run)
    floor = noise_floor(run, reference)
    base, gradual = prune_gradually(run, base, reference)
    costs = measure_costs(run, base, reference)
    predictor = make_predictor(run, base, reference)
    chosen = choose_plan(run, costs, predictor, floor, reference)
    final, distilled = distill_plan(run, costs, chosen, reference, floor)
    packaged = on_packaged_prompts(run, reference, floor)
    results = results_of(
        run, reference, final, chosen.measurement, floor, packaged, (*gradual, *distilled)
    )
    plan_json = plan_with_costs(final.plan, final.prediction, costs.table, predictor)
    finish(run, reference, plan_json, final, results)
    costs.data.finish()
    return settings.out


def choose_plan(
    run: Run,
    costs: Costs,
    predictor: Predictor,
    floor: NoiseFloor,
    reference: Reference,
) -> Candidate:
    """The plan of least predicted divergence within the budget, exported and measured; with a
    target, the smallest that was measured to meet it."""
    goal = run.settings.goal
    table = costs.table.restricted(goal.types, sparse=goal.sparsity > 0)

    def candidate(limit_bytes: int) -> Candidate:
        plan = search_plan(table, goal, limit_bytes)
        encoded = prune_plan(run, costs, plan, reference)
        measurement = export_and_measure(run, plan, encoded, costs.equalized, reference, floor)
        return Candidate(plan, predictor.predict(table.cost(plan)), encoded, measurement)

    wanted = target.Target(goal.max_sdt, goal.min_fdt)
    if wanted == target.Target():
        return candidate(run.budget.max_bytes)

    def attempt(limit_bytes: int) -> target.Attempt:
        tried = candidate(limit_bytes)
        divergence, predicted = tried.measurement.divergence, tried.prediction
        result = target.Attempt(
            tried.plan.size_bytes,
            predicted.sdt,
            predicted.fdt,
            divergence.sdt.value,
            divergence.fdt.value,
        )
        verdict = "meets" if wanted.met(result.sdt, result.fdt) else "misses"
        run.stages.note(
            f"{result.size_bytes:,} bytes: SDT "
            f"{summary.interval(divergence.sdt.to_json(), True)}, mean FDT "
            f"{summary.interval(divergence.fdt.to_json(), False)}: {verdict} the target"
        )
        return result

    best, attempts = target.smallest(
        frontier(table, predictor), wanted, attempt, run.budget.max_bytes
    )
    if best is None:
        raise _target_missed(run, wanted, attempts[-1] if attempts else None, floor)
    return candidate(best.size_bytes)


def search_plan(table: CostTable, goal: Goal, limit_bytes: int) -> Plan:
    """The plan of least cost within limit_bytes, or the int8 share that was asked for."""
    if goal.int8_share is None:
        return search(table, limit_bytes, goal.sparsity)
    plan = least_divergent_share(table, "Q8_0", "F16", goal.int8_share)
    if plan.size_bytes > limit_bytes:
        raise EdgeDtmError(
            f"{goal.int8_share:.0%} of the components in Q8_0 and the rest in F16 take "
            f"{plan.size_bytes:,} bytes, the budget is {limit_bytes:,}: raise --max-bytes"
        )
    return plan


def _target_missed(
    run: Run, wanted: target.Target, closest: target.Attempt | None, floor: NoiseFloor
) -> EdgeDtmError:
    divergence = floor.measurement.divergence
    nearest = (
        f"{closest.size_bytes:,} bytes have a measured SDT of {closest.sdt:.2%} and a mean FDT of "
        f"{closest.fdt:.1f}; "
        if closest
        else ""
    )
    return EdgeDtmError(
        f"no plan within {run.budget.max_bytes:,} bytes has {wanted}: {nearest}the uncompressed "
        f"F16 file in llama.cpp has {divergence.sdt.value:.2%} and {divergence.fdt.value:.1f} (the "
        "noise floor); relax --max-sdt/--min-fdt, raise --max-bytes or allow more --types"
    )
