"""The zeros of a plan: encoded as they were measured, then by sequential pruning if that is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.work import Kind
from edge_dtm.formats.plan import Component, Plan, Treatment
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.calibration import Calibration
from edge_dtm.host.blocks.costs import capture, captures
from edge_dtm.host.blocks.encoded import EncodedStore
from edge_dtm.host.blocks.fit import component_output_hessian
from edge_dtm.host.blocks.jobs import MaskJobs, encode_masks
from edge_dtm.host.blocks.sequential_pruning import Pruned, prune_sequentially
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.distill.evaluate import check
from edge_dtm.host.distill.inputs import start_values
from edge_dtm.host.distill.teacher import reference_sequences
from edge_dtm.host.distill.trained import Trained
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.host.values import Base, Costs, Encoded, Run

# The marker says whether sequential pruning was better.
SEQUENTIAL: Kind[bool] = Kind(
    "sequential-pruning",
    "",
    lambda folder: (folder / "judged").read_text() == "better",
    lambda better, folder: (folder / "judged").write_text("better" if better else "worse"),
    marker="judged",
    version=2,
)


def prune_plan(run: Run, base: Base, costs: Costs, plan: Plan, reference: Reference) -> Encoded:
    """What to export: the bytes as they were measured, or with zeros fitted layer by layer,
    whichever diverges less on sequences that neither was fitted to."""
    store = costs.encoded
    assert isinstance(store, EncodedStore)
    pruned = [
        (c, t)
        for c, t in zip(plan.components, plan.treatments, strict=True)
        if t.zero_share and store.is_fitted(c, t)
    ]
    if not pruned:
        return store
    calibration = captures(run, base, reference)[1]
    missing = [(c, t) for c, t in pruned if not store.has(c, t)]
    if missing:
        capture(run, base, calibration)
        _encode(run, base, costs, missing, calibration)
    if not run.settings.method.sequential_pruning:
        return store
    inputs = [store.key, plan.hash]

    def make(folder: Path) -> bool:
        capture(run, base, calibration)
        sequential = SequentiallyPruned(folder, store)
        return _prune_sequentially(
            run, base, costs, plan, pruned, calibration, reference, sequential
        )

    better = run.work.load_or_make(SEQUENTIAL, inputs, make)
    folder = run.work.path_of(SEQUENTIAL, inputs)
    return SequentiallyPruned(folder, store) if better else store


def _encode(
    run: Run,
    base: Base,
    costs: Costs,
    missing: Sequence[tuple[Component, Treatment]],
    calibration: Calibration,
) -> None:
    store = costs.encoded
    assert isinstance(store, EncodedStore)
    method = run.settings.method
    jobs = MaskJobs(
        calibration,
        costs.scales,
        base.checkpoint.config if method.equalize else None,
        costs.equalized.hf_tensor,
        run.device,
        store,
        run.imatrix,
        method.mask_score,
    )
    with run.stages("Fitting what the masks leave", sum(c.weights for c, _ in missing)) as advance:
        encode_masks(jobs, missing, advance)


def _prune_sequentially(
    run: Run,
    base: Base,
    costs: Costs,
    plan: Plan,
    pruned: Sequence[tuple[Component, Treatment]],
    calibration: Calibration,
    reference: Reference,
    target: SequentiallyPruned,
) -> bool:
    """Fit the masked matrices layer by layer into `target`, and say whether that is better."""
    measured, fitted = calibration_rows(reference)
    validation = reference.rows(measured)
    original = load_model(costs.equalized, run.device)
    student = load_model(costs.equalized, run.device)
    values = start_values(costs.equalized, plan, costs.encoded)
    _set_weights(student, values, run.device)
    before = check(student, validation)
    config = base.checkpoint.config
    matrices = {
        c.name: Pruned(
            t,
            torch.from_numpy(costs.equalized.hf_tensor(c.name + ".weight")).to(run.device),
            torch.from_numpy(values[c.name].start != 0).to(run.device),
            component_output_hessian(
                calibration,
                costs.scales,
                config if run.settings.method.equalize else None,
                c,
                run.device,
            ),
            torch.from_numpy(calibration.token_weights(c.name)).to(run.device),
        )
        for c, t in pruned
    }
    sequences = reference_sequences(reference.rows(fitted))
    with run.stages("Sequential pruning", config.layers) as advance:
        encoded = prune_sequentially(original, student, matrices, sequences, advance)
    after = check(student, validation)
    better = (after.sdt, after.perplexity) < (before.sdt, before.perplexity)
    run.stages.note(
        f"Sequential pruning, on {len(measured)} sequences that nothing was fitted to: SDT "
        f"{before.sdt:.2%} became {after.sdt:.2%}, perplexity {before.perplexity:.4f} became "
        f"{after.perplexity:.4f}: {'taken' if better else 'not taken'}"
    )
    for c, t in pruned:
        target.save(c, t, encoded[c.name][0])
    return better


@torch.no_grad()
def _set_weights(model: Any, values: Mapping[str, Trained], device: torch.device) -> None:
    """Put the plan's values into a model of load_model."""
    modules = dict(model.named_modules())
    for name, trained in values.items():
        module = model.model.embed_tokens if name == "token_embd" else modules[module_name(name)]
        module.weight.copy_(torch.from_numpy(trained.start).to(device))


class SequentiallyPruned(EncodedStore):
    """What sequential pruning encoded, and the rest as it was measured."""

    def __init__(self, folder: Path, before: EncodedStore) -> None:
        super().__init__(folder, before.checkpoint)
        self.before = before

    def encoded(self, component: Component, treatment: Treatment) -> npt.NDArray[np.uint8]:
        """uint8 (rows, row_bytes), rows as GGUF orders them."""
        if self.has(component, treatment) and treatment.zero_share:
            return self.load(component, treatment)
        return self.before.encoded(component, treatment)

    def importance(self, name: str) -> npt.NDArray[np.float32] | None:
        return self.before.importance(name)

    def is_fitted(self, component: Component, treatment: Treatment) -> bool:
        return self.before.is_fitted(component, treatment)
