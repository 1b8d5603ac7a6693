"""Recovery and gradual sparsification as stages of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_dtm.core.digest import digest_of
from edge_dtm.formats.plan import Plan
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.shipped import Shipped
from edge_dtm.host.blocks.stage_pruning import fit_plan
from edge_dtm.host.checkpoint.model import load_model
from edge_dtm.host.distill.distill import Recovered, RecoverSettings, Trained, plain_point, recover
from edge_dtm.host.distill.retrain import (
    RecoveredBlocks,
    same_head,
    start_values,
    teacher_text,
    texts_for,
    with_values,
    with_vectors,
)
from edge_dtm.search.allocation import search

if TYPE_CHECKING:
    from edge_dtm.host.compress import Measured, Pipeline

METHOD = 2  # of recovery; a change of it makes what was trained before void


def sparsify(run: Pipeline, reference: Reference) -> None:
    """With --sparsity in several steps: all but the last of them, each with its recovery. The last
    is the plan's own, in which types are chosen too."""
    s = run.s
    if not s.zero_share or s.sparsity_steps < 2:
        return
    for step in range(1, s.sparsity_steps):
        # Each step prunes the same share of what is left.
        share = 1 - (1 - s.zero_share) ** (step / s.sparsity_steps)
        run.stages.note(f"Sparsity, step {step} of {s.sparsity_steps}: {share:.1%} zeros")
        masks_only = replace(s, types=("F16",), zero_share=share, max_transfer=None)
        table, shipped = run.costs(reference, masks_only)
        plan = search(table, table.fixed_bytes + 2 * run.f16_bytes, share)
        shipped = fit_plan(run, plan, shipped, reference)
        values = start_values(run.equalized, plan, shipped)
        # Before the base changes: what is based on zeros is not dense any more.
        run.held.update(
            (c.name, t.zero_share)
            for c, t in zip(plan.components, plan.treatments, strict=True)
            if t.zero_share
        )
        recover_base(run, plan, values, reference, f"at {share:.1%} zeros", shipped)
    run.story["sparsity_steps"] = s.sparsity_steps


def _key(run: Pipeline, plan: Plan, shipped: Shipped | None) -> str:
    said: list[Any] = [METHOD, run.base_key, plan.hash, run.s.recover_steps, run.s.seed]
    return digest_of([*said, shipped.folder.name if shipped else None, run.s.equalize])


def recover_base(
    run: Pipeline,
    plan: Plan,
    values: Mapping[str, Trained],
    reference: Reference,
    name: str,
    shipped: Shipped | None = None,
) -> None:
    """Train what `values` are, and go on with the result as the base. Without --recover the
    values themselves are the base."""
    file = run.work / f"base-{_key(run, plan, shipped)}.safetensors"
    if run.s.recover_steps:
        result = _train(run, plan, values, reference, name, shipped)
    else:
        result = Recovered(0, 0, [], {}, {n: v.start for n, v in values.items()}, {}, {}, 0.0, 0)
    edited = with_values(run.equalized, result, file)
    run.captures(reference)[1].remove()
    run.rebase(edited)


def _train(
    run: Pipeline,
    plan: Plan,
    values: Mapping[str, Trained],
    reference: Reference,
    name: str,
    shipped: Shipped | None,
) -> Recovered:
    """One recovery, from the work folder or made now; its curve goes into the report."""
    from edge_dtm.host.compress import calibration_rows

    s = run.s
    folder = run.work / f"recover-{_key(run, plan, shipped)}"
    measured, fitted = calibration_rows(reference)
    if not (folder / "recovered.json").is_file():
        settings = RecoverSettings(s.recover_steps, seed=s.seed)
        run.forget_model()
        model = load_model(run.checkpoint, run.torch_device)
        text = teacher_text(
            run.work / f"text-{run.key}",
            model,
            run.checkpoint,
            reference,
            fitted,
            texts_for(settings.steps, settings.batch_tokens),
            s.seed,
            run.stages,
        )
        del model
        student = load_model(run.equalized, run.torch_device)
        with run.stages(f"Recovery {name}", settings.steps) as advance:
            done = 0

            def progress(step: int, loss: float, sdt: float) -> None:
                nonlocal done
                run.stages.describe(f"Recovery {name}: loss {loss:.3f}, SDT {sdt:.2%}")
                advance(step - done)
                done = step

            result = recover(
                student,
                values,
                same_head(run.checkpoint),
                text,
                reference.rows(measured),
                settings,
                folder,
                progress,
            )
        result.save(folder)
    result = Recovered.load(folder)
    first = result.curve[0]
    best = next(p for p in result.curve if p["step"] == result.best_step)
    run.stages.note(
        f"Recovery {name}, on {len(measured)} sequences that were not trained on: SDT "
        f"{first['sdt']:.2%} became {best['sdt']:.2%}, mean FDT {first['fdt']:.1f} became "
        f"{best['fdt']:.1f}, perplexity {first['perplexity']:.4f} became {best['perplexity']:.4f} "
        f"(best at step {result.best_step} of {result.steps}; {result.tokens_per_s:.0f} tokens/s, "
        f"peak memory {result.peak_rss_bytes / 1e9:.1f} GB)"
    )
    run.story.setdefault("recovery", {})[name] = {
        # Before the first step there is no loss.
        "curve": [plain_point(p) for p in result.curve],
        "best_step": result.best_step,
        "steps": result.steps,
        "tokens_per_s": result.tokens_per_s,
        "peak_rss_bytes": result.peak_rss_bytes,
    }
    return result


def recover_plan(
    run: Pipeline, plan: Plan, shipped: Shipped, reference: Reference, measured: Measured
) -> Measured:
    """With --recover: the plan's model trained with its grids and zeros, exported and measured."""
    if not run.s.recover_steps:
        return measured
    values = start_values(run.equalized, plan, shipped)
    result = _train(run, plan, values, reference, "of the plan", shipped)
    run.story["before_recovery"] = {
        **measured.divergence.to_json(),
        "perplexity": measured.perplexity,
    }
    if not result.best_step:
        return measured
    key = _key(run, plan, shipped)
    vectors = with_vectors(run.equalized, result, run.work / f"vectors-{key}.safetensors")
    trained = RecoveredBlocks(run.work / f"recover-{key}", run.equalized, result, shipped)
    return run.export_and_measure(plan, trained, reference, vectors)
