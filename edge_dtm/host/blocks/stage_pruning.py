"""The zeros of a plan, fitted again in the order in which the layers run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.digest import digest_of
from edge_dtm.formats.plan import Component, Plan, Treatment
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.sensitivity import output_moments
from edge_dtm.host.blocks.sequential_pruning import Pruned, fit_in_order
from edge_dtm.host.blocks.shipped import Shipped
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.distill.distill import check
from edge_dtm.host.distill.retrain import start_values
from edge_dtm.host.distill.teacher import reference_sequences

if TYPE_CHECKING:
    from edge_dtm.host.compress import Pipeline

METHOD = 2  # a change of it makes what was fitted before void


def fit_plan(run: Pipeline, plan: Plan, shipped: Shipped, reference: Reference) -> Shipped:
    """What to export: the blocks as they were measured, or with zeros fitted in order, whichever
    diverges less on sequences that neither was fitted to."""
    from edge_dtm.host.compress import calibration_rows

    zeros = [
        (c, t)
        for c, t in zip(plan.components, plan.treatments, strict=True)
        if t.zero_share and shipped.is_fitted(c, t)
    ]
    if not zeros:
        return shipped
    run.fit_plan_zeros(plan, shipped, reference)
    if not run.s.in_order:
        return shipped
    key = digest_of([METHOD, shipped.folder.name, plan.hash])
    ordered = InOrder(run.work / f"in-order-{key}", shipped)
    done = ordered.folder / "judged"
    if not done.is_file():
        measured, fitted = calibration_rows(reference)
        calibration = run.captures(reference)[1]
        run.capture(None, calibration)
        run.forget_model()
        original = load_model(run.equalized, run.torch_device)
        student = load_model(run.equalized, run.torch_device)
        modules = dict(student.named_modules())
        values = start_values(run.equalized, plan, shipped)
        for c in plan.components:
            module = student.model.embed_tokens if c.name == "token_embd" else None
            start = torch.from_numpy(values[c.name].start).to(run.torch_device)
            (module or modules[module_name(c.name)]).weight.copy_(start)
        before = check(student, reference.rows(measured))
        pruned = {
            c.name: Pruned(
                t,
                torch.from_numpy(run.equalized.hf_tensor(c.name + ".weight")).to(run.torch_device),
                torch.from_numpy(values[c.name].start != 0).to(run.torch_device),
                output_moments(
                    calibration,
                    run.scales(),
                    run.base.config if run.s.equalize else None,
                    c,
                    run.torch_device,
                ),
                torch.from_numpy(calibration.token_weights(c.name)).to(run.torch_device),
            )
            for c, t in zeros
        }
        sequences = reference_sequences(reference.rows(fitted))
        with run.stages("Fitting the zeros in order", run.base.config.layers) as advance:
            made = fit_in_order(original, student, pruned, sequences, advance)
        after = check(student, reference.rows(measured))
        better = (after.sdt, after.perplexity) < (before.sdt, before.perplexity)
        run.stages.note(
            f"Zeros fitted in order, on {len(measured)} sequences that nothing was fitted to: SDT "
            f"{before.sdt:.2%} became {after.sdt:.2%}, perplexity {before.perplexity:.4f} became "
            f"{after.perplexity:.4f}: {'taken' if better else 'not taken'}"
        )
        for c, t in zeros:
            ordered.save(c, t, made[c.name][0])
        done.write_text("better" if better else "worse")
    return ordered if done.read_text() == "better" else shipped


class InOrder(Shipped):
    """What was fitted in order, and the rest as it was measured."""

    def __init__(self, folder: Path, before: Shipped) -> None:
        super().__init__(folder, before.checkpoint)
        self.before = before

    def blocks(self, component: Component, treatment: Treatment) -> npt.NDArray[np.uint8]:
        """uint8 (rows, row_bytes), rows as GGUF orders them."""
        if self.has(component, treatment) and treatment.zero_share:
            return self.load(component, treatment)
        return self.before.blocks(component, treatment)

    def importance(self, name: str) -> npt.NDArray[np.float32] | None:
        return self.before.importance(name)

    def is_fitted(self, component: Component, treatment: Treatment) -> bool:
        return self.before.is_fitted(component, treatment)
