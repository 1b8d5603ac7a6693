"""The zeros of a plan: encoded as they were measured, then by sequential pruning if that is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_dtm.core.files import write_whole
from edge_dtm.core.work import Kind
from edge_dtm.formats.plan import Component, Plan, Treatment
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.block_jobs import layer_of
from edge_dtm.host.blocks.costs import Costs
from edge_dtm.host.blocks.encoded import EncodedStore
from edge_dtm.host.blocks.fit import output_hessian, part_of
from edge_dtm.host.blocks.quantize import quantize
from edge_dtm.host.blocks.sequential_pruning import Pruned, prune_sequentially
from edge_dtm.host.checkpoint.derived import TreatedCheckpoint
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.distill.evaluate import check_llama
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.host.values import Encoded, Run

FloatArray = npt.NDArray[np.float32]


def _finish(better: bool, folder: Path) -> None:
    """What is not better goes."""
    for file in () if better else folder.glob("*.npy"):
        file.unlink()
    write_whole(folder / DONE, b"")


DONE = "done"
# A folder as EncodedStore has it, of the matrices with zeros; whether it is taken.
SEQUENTIAL: Kind[bool] = Kind(
    "sequential-pruning", "", lambda folder: any(folder.glob("*.npy")), _finish, marker=DONE
)


@dataclass(frozen=True)
class Refitted:
    """The bytes of `store` where it has them, else those before."""

    store: EncodedStore
    before: EncodedStore

    @property
    def key(self) -> str:
        return self.store.key

    def importance(self, name: str) -> FloatArray | None:
        return self.before.importance(name)

    def encoded(self, component: Component, treatment: Treatment) -> npt.NDArray[np.uint8]:
        """uint8 (rows, row_bytes), rows as GGUF orders them."""
        has = self.store.has(component, treatment)
        return (self.store if has else self.before).encoded(component, treatment)


def prune_plan(run: Run, costs: Costs, plan: Plan, reference: Reference) -> Encoded:
    """What to export: the bytes as they were measured, or with zeros fitted block by block,
    whichever diverges less on sequences that neither was fitted to."""
    chosen = plan.pairs
    quantize(run, costs, chosen)
    store = costs.encoded
    pruned = {c.name: (c, t) for c, t in chosen if t.zero_share and costs.uses_feedback(c, t)}
    if not pruned or not run.settings.method.sequential_pruning:
        return store
    inputs = [store.key, plan.hash]
    folder = run.work.path_of(SEQUENTIAL, inputs)
    refitted = Refitted(EncodedStore(folder, store.checkpoint), store)

    def make(_: Path) -> bool:
        return _prune_sequentially(run, costs, plan, pruned, refitted, reference)

    return refitted if run.work.load_or_make(SEQUENTIAL, inputs, make) else store


def _prune_sequentially(
    run: Run,
    costs: Costs,
    plan: Plan,
    pruned: Mapping[str, tuple[Component, Treatment]],
    refitted: Refitted,
    reference: Reference,
) -> bool:
    """Fit the masked matrices that `refitted` lacks, block by block; whether that is better."""
    data, original = costs.data, costs.equalized
    measured, _ = calibration_rows(reference)
    validation = reference.rows(measured)

    def llama(encoded: Encoded) -> Llama:
        return Llama(TreatedCheckpoint(original, (plan, encoded)), run.device)

    def wanted(name: str) -> Pruned | None:
        if name not in pruned or refitted.store.has(*pruned[name]):
            return None
        component, treatment = pruned[name]
        layer, part = layer_of(component), part_of(name)
        data.ensure_fitted(layer)
        statistics = data.jobs.statistics(layer, part, False)
        outputs = partial(output_hessian, statistics, component, costs.scales, original.config)
        return Pruned(treatment.type, statistics[f"token_weights.{part}"], outputs)

    def keep(name: str, blocks: npt.NDArray[np.uint8]) -> None:
        refitted.store.save(*pruned[name], blocks)

    before = check_llama(llama(refitted.before), validation)
    with run.stages("Sequential pruning", original.config.layers) as advance:

        def done(layer: int) -> None:
            if not data.keeps:
                data.jobs.fitted_file(layer).unlink(missing_ok=True)
            advance(1)

        models = Llama(original, run.device), llama(refitted)
        prune_sequentially(*models, data.text, wanted, keep, done)
    after = check_llama(llama(refitted), validation)
    better = (after.sdt, after.perplexity) < (before.sdt, before.perplexity)
    run.stages.note(
        f"Sequential pruning, on {len(measured)} sequences that nothing was fitted to: SDT "
        f"{before.sdt:.2%} became {after.sdt:.2%}, perplexity {before.perplexity:.4f} became "
        f"{after.perplexity:.4f}: {'taken' if better else 'not taken'}"
    )
    return better
