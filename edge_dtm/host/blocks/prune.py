"""The zeros of a plan: encoded as they were measured, then by sequential pruning if that is better."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.distill.evaluate import check
from edge_dtm.host.distill.result import Tensors, load_tensors, save_tensors
from edge_dtm.host.distill.teacher import reference_sequences
from edge_dtm.host.distill.trained import set_weights, start_values
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.host.values import Base, Costs, Encoded, Run

FloatArray = npt.NDArray[np.float32]
Treated = Sequence[tuple[Component, Treatment]]

# The blocks of matrices with zeros; none where sequential pruning was not better.
SEQUENTIAL: Kind[Tensors] = Kind(
    "sequential-pruning", ".pt", load_tensors, lambda blocks, path: save_tensors(path, blocks)
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

    def importance(self, name: str) -> FloatArray | None:
        return self.before.importance(name)

    def encoded(self, component: Component, treatment: Treatment) -> npt.NDArray[np.uint8]:
        """uint8 (rows, row_bytes), rows as GGUF orders them."""
        if component.name not in self.blocks:
            return self.before.encoded(component, treatment)
        return self.checkpoint.gguf_rows(component.name, self.blocks[component.name].numpy())


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
    if missing := [(c, t) for c, t in pruned if not store.has(c, t)]:
        capture(run, base, calibration)
        _encode(run, base, costs, missing, calibration)
    if not run.settings.method.sequential_pruning:
        return store

    def make(_: Path) -> Tensors:
        capture(run, base, calibration)
        return _prune_sequentially(run, costs, plan, pruned, calibration, reference)

    inputs = [store.key, plan.hash]
    blocks = run.work.load_or_make(SEQUENTIAL, inputs, make)
    key = run.work.path_of(SEQUENTIAL, inputs).stem
    return Replaced(key, store.checkpoint, blocks, store) if blocks else store


def _encode(run: Run, base: Base, costs: Costs, missing: Treated, calibration: Calibration) -> None:
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
    costs: Costs,
    plan: Plan,
    pruned: Treated,
    calibration: Calibration,
    reference: Reference,
) -> Tensors:
    """The masked matrices' blocks fitted layer by layer, none if that is not better."""
    measured, fitted = calibration_rows(reference)
    validation = reference.rows(measured)
    original = load_model(costs.equalized, run.device)
    student = copy.deepcopy(original)
    starts = start_values(costs.equalized, plan, costs.encoded)
    set_weights(student, starts)
    before = check(student, validation)
    config = costs.equalized.config
    matrices = {
        c.name: Pruned(
            t,
            original.get_submodule(module_name(c.name)).weight,
            torch.from_numpy(starts[c.name].values != 0).to(run.device),
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
    return {name: torch.from_numpy(data) for name, (data, _) in encoded.items()} if better else {}
