"""Distillation and gradual pruning as stages of `compress`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.work import Kind
from edge_dtm.formats.plan import Component, Plan, Treatment
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.costs import Costs, measure_costs
from edge_dtm.host.blocks.prune import prune_plan
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.derived import EditedCheckpoint, write_edited
from edge_dtm.host.checkpoint.model import load_model
from edge_dtm.host.distill.result import Distilled, load_tensors, save_tensors
from edge_dtm.host.distill.settings import DistillSettings
from edge_dtm.host.distill.teacher import teacher_text
from edge_dtm.host.distill.trained import start_values
from edge_dtm.host.distill.trainer import Trainer
from edge_dtm.host.measure import export_and_measure
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.host.values import Base, Candidate, Encoded, NoiseFloor, Run
from edge_dtm.search.allocation import search

RESULT = "distilled.pt"
DISTILLED: Kind[Distilled] = Kind(
    "distilled",
    "",
    lambda folder: Distilled(**load_tensors(folder / RESULT)),
    lambda result, folder: save_tensors(folder / RESULT, vars(result)),
    marker=RESULT,
    version=4,
)


@dataclass(frozen=True)
class Replaced:
    """Some matrices treated again, the others as they were.

    key: names what they were treated with. checkpoint: has the order of rows. blocks: by component
    uint8 (rows, row_bytes), rows as Hugging Face orders them.
    """

    key: str
    checkpoint: Checkpoint
    blocks: Mapping[str, torch.Tensor]
    before: Encoded

    def importance(self, name: str) -> npt.NDArray[np.float32] | None:
        return self.before.importance(name)

    def encoded(self, component: Component, treatment: Treatment) -> npt.NDArray[np.uint8]:
        """uint8 (rows, row_bytes), rows as GGUF orders them."""
        if component.name not in self.blocks:
            return self.before.encoded(component, treatment)
        return self.checkpoint.gguf_rows(component.name, self.blocks[component.name].numpy())


@dataclass(frozen=True)
class Distillation:
    """One distillation. name: of the stage, such as `of the plan`; encoded: what it trained, in
    place of the bytes that it began with; inputs: all it depends on."""

    name: str
    result: Distilled
    encoded: Replaced
    inputs: list[Any]

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        names = ("curve", "best_step", "steps", "tokens_per_s", "peak_rss_bytes")
        return {name: getattr(self.result, name) for name in names}


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
        encoded = prune_plan(run, costs, plan, reference)
        distillation = _distill(run, costs, plan, encoded, reference, f"at {share:.1%} zeros")
        distillations.append(distillation)
        costs.data.remove()
        base = _next_base(run, base, costs, plan, distillation)
    return base, tuple(distillations)


def _next_base(run: Run, base: Base, costs: Costs, plan: Plan, distillation: Distillation) -> Base:
    """The distilled model as what is pruned further."""
    starts = start_values(costs.equalized, plan, distillation.encoded)
    matrices = {n + ".weight": s.values for n, s in starts.items() if n.startswith("blk.")}
    checkpoint = _edited(run, costs, distillation, "base", matrices)
    zeros = {c.name: t.zero_share for c, t in plan.pairs if t.zero_share}
    key = run.work.path("base", distillation.inputs).name.removeprefix("base-")
    return Base(checkpoint, key, base.fixed_bytes, {**base.zeros, **zeros})


def _edited(
    run: Run,
    costs: Costs,
    distillation: Distillation,
    kind: str,
    matrices: Mapping[str, npt.NDArray[np.float32]],
) -> EditedCheckpoint:
    """The checkpoint with the trained norm gains, and with matrices by full GGUF name."""
    file = run.work.path(kind, distillation.inputs, ".safetensors")
    gains = {name: gain.numpy() for name, gain in distillation.result.vectors.items()}
    write_edited(file, {**matrices, **gains})
    return EditedCheckpoint(costs.equalized, file)


def _distill(
    run: Run, costs: Costs, plan: Plan, encoded: Encoded, reference: Reference, name: str
) -> Distillation:
    """One distillation, from the work folder or made now."""
    steps, equalized = run.settings.method.distill_steps, costs.equalized
    settings = DistillSettings(steps, seed=run.settings.source.seed)
    measured, _ = calibration_rows(reference)

    def make(folder: Path) -> Distilled:
        text = teacher_text(run, reference, steps, settings.batch_tokens)
        head = "token_embd" if run.checkpoint.config.tied else "output"
        with run.stages(f"Distillation {name}", steps) as advance:
            done = 0

            def progress(step: int, loss: float, sdt: float) -> None:
                nonlocal done
                run.stages.describe(f"Distillation {name}: loss {loss:.3f}, SDT {sdt:.2%}")
                advance(step - done)
                done = step

            folder.mkdir(exist_ok=True)
            return Trainer(
                load_model(equalized, run.device),
                start_values(equalized, plan, encoded),
                torch.from_numpy(run.checkpoint.hf_tensor(head + ".weight")),
                text,
                reference.rows(measured),
                settings,
                folder,
                progress,
            ).run()

    inputs = [run.key, costs.encoded.key, plan.hash, encoded.key, steps]
    result = run.work.load_or_make(DISTILLED, inputs, make)
    first, best = result.curve[0], result.best
    run.stages.note(
        f"Distillation {name}, on {len(measured)} sequences that were not trained on: SDT "
        f"{first['sdt']:.2%} became {best['sdt']:.2%}, mean FDT {first['fdt']:.1f} became "
        f"{best['fdt']:.1f}, perplexity {first['perplexity']:.4f} became {best['perplexity']:.4f} "
        f"(best at step {result.best_step} of {result.steps}; {result.tokens_per_s:.0f} tokens/s, "
        f"peak memory {result.peak_rss_bytes / 1e9:.1f} GB)"
    )
    key = run.work.path_of(DISTILLED, inputs).name
    return Distillation(name, result, Replaced(key, equalized, result.blocks, encoded), inputs)


def distill_plan(
    run: Run, costs: Costs, chosen: Candidate, reference: Reference, floor: NoiseFloor
) -> tuple[Candidate, tuple[Distillation, ...]]:
    """With --distill: the plan's model trained with its grids and zeros, exported and measured."""
    if not run.settings.method.distill_steps:
        return chosen, ()
    distillation = _distill(run, costs, chosen.plan, chosen.encoded, reference, "of the plan")
    if not distillation.result.best_step:
        return chosen, (distillation,)
    vectors = _edited(run, costs, distillation, "vectors", {})
    encoded = distillation.encoded
    measurement = export_and_measure(run, chosen.plan, encoded, vectors, reference, floor)
    return replace(chosen, encoded=encoded, measurement=measurement), (distillation,)
