"""The measurement of every component as an independent job, on as many processes as fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.ggml_types import SPARSE_TYPES
from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.host.blocks.activations import SIGN_DRAWS, Activations
from edge_dtm.host.blocks.calibration import Calibration
from edge_dtm.host.blocks.encoded import EncodedStore
from edge_dtm.host.blocks.fit import (
    component_hessians,
    component_importance,
    edge_feedback,
    fit_component,
)
from edge_dtm.host.blocks.sensitivity import component_costs, edge_costs
from edge_dtm.host.blocks.workers import in_workers, worker_count
from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.quantize.equalize import Scales, input_scale
from edge_dtm.host.quantize.masks import SCORES, fit_masks
from edge_dtm.search.allocation import convex_hull

FloatArray = npt.NDArray[np.float32]
Advance = Callable[[int], None] | None

SMALL_WEIGHTS = 10_000_000  # below that, starting processes takes as long as the work
LIBRARIES_BYTES = 2**29  # what Python, torch and numpy take in a process


@dataclass(frozen=True)
class CostJobs:
    """What every cost job needs; goes to the worker processes.

    read: GGUF name -> float32 weights in HF layout. tied: the head is the embedding. calibration:
    what error feedback is fitted to, None: plain rounding. encoded: keeps what a plan may choose.
    imatrix: importance vectors of the original in place of ours, component -> float32
    (row_length,). mask_score: see masks.SCORES.
    """

    activations: Activations
    read: Callable[[str], FloatArray]
    device: torch.device
    tied: bool
    calibration: Calibration | None = None
    encoded: EncodedStore | None = None
    imatrix: Mapping[str, FloatArray] | None = None
    mask_score: str = SCORES[0]

    def importance(self, component: Component) -> FloatArray | None:
        """The given vector, as the equalized model has it; None where none is given."""
        return given_importance(self.imatrix, self.activations.scales, component.name)


def given_importance(
    imatrix: Mapping[str, FloatArray] | None, scales: Scales, name: str
) -> FloatArray | None:
    vector = imatrix.get(name) if imatrix else None
    scale = input_scale(scales, name)
    return vector if vector is None or scale is None else vector * scale * scale


def read_costs(results: Path) -> dict[str, dict[str, Any]]:
    """What `measure_components` has written: component -> its costs and where feedback was kept."""
    known: dict[str, dict[str, Any]] = {}
    if results.is_file():
        for line in results.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the run was killed
            known[record["name"]] = record
    return known


def measure_components(
    jobs: CostJobs,
    components: Sequence[Component],
    treatments: Sequence[Sequence[Treatment]],
    results: Path,
    progress: Advance = None,
) -> list[list[float]]:
    """Costs of all components, one line of `results` (JSONL) a component as soon as it is known;
    lines that are there already are not measured again. progress: called with weights done."""
    known = read_costs(results)
    missing = [
        (component, tuple(choices))
        for component, choices in zip(components, treatments, strict=True)
        if len(known.get(component.name, {"costs": ()})["costs"]) != len(choices)
    ]
    if progress and len(missing) < len(components):
        progress(sum(c.weights for c in components) - sum(c.weights for c, _ in missing))
    # The longest first, so that no core is left with it at the end.
    missing.sort(key=lambda task: -task[0].weights)
    needed = [_cost_bytes(c, len(t), jobs) for c, t in missing]
    workers = _worker_count(jobs.device, [c for c, _ in missing], needed)
    with results.open("a") as file:
        for (component, _), record in in_workers(_measure, jobs, missing, workers):
            known[component.name] = record
            file.write("\n" * (file.tell() > 0) + json.dumps(record))
            file.flush()
            if progress:
                progress(component.weights)
    return [known[c.name]["costs"] for c in components]


def _worker_count(
    device: torch.device, components: Sequence[Component], needed_bytes: Sequence[int]
) -> int:
    """The GPU takes its work from one process."""
    if device.type != "cpu" or sum(c.weights for c in components) <= SMALL_WEIGHTS:
        return 1
    return worker_count(len(components), max(needed_bytes))


def _cost_bytes(component: Component, treatments: int, jobs: CostJobs) -> int:
    """About what one worker holds while it measures the component."""
    tokens = int(jobs.activations.edges[-1]) * (SIGN_DRAWS + 2)
    if jobs.calibration:
        tokens = max(tokens, 2 * jobs.calibration.tokens)
    rows, n = (component.rows, component.row_length) if component.in_block else (0, 0)
    widest = max(rows, component.row_length)
    moments = 40 * widest**2
    return LIBRARIES_BYTES + 4 * tokens * widest + 16 * treatments * rows * n + moments


def _measure(jobs: CostJobs, task: tuple[Component, Sequence[Treatment]]) -> dict[str, Any]:
    """One component's line of the results."""
    component, choices = task
    weights = jobs.read(component.name + ".weight")
    if component.in_block:
        costs, with_feedback = _measure_block_matrix(jobs, component, choices, weights)
    else:
        costs, with_feedback = _measure_edge(jobs, component, choices, weights)
    return {"name": component.name, "costs": costs, "feedback": with_feedback}


def _measure_block_matrix(
    jobs: CostJobs, component: Component, choices: Sequence[Treatment], weights: FloatArray
) -> tuple[list[float], list[bool]]:
    importance = vector = jobs.importance(component)
    fitted: dict[Treatment, tuple[npt.NDArray[np.uint8], torch.Tensor]] = {}
    if jobs.calibration:
        importance, fitted = fit_component(
            jobs.calibration,
            jobs.activations,
            component,
            choices,
            weights,
            jobs.device,
            vector,
            jobs.mask_score,
        )
    elif vector is None:
        importance = component_importance(jobs.activations, component, jobs.tied)
    costs = component_costs(
        jobs.activations,
        component,
        choices,
        weights,
        jobs.device,
        importance,
        {t: values for t, (_, values) in fitted.items()},
    )
    if jobs.encoded:
        for t in sorted(_may_be_chosen(component, choices, costs) & set(fitted)):
            jobs.encoded.save(component, t, fitted[t][0])
        types = [t.type for t in choices if t in fitted and not t.zero_share]
        masks = {t: t in fitted for t in choices if t.zero_share}
        jobs.encoded.save_component(component.name, importance, types, None, masks)
    return costs, [t in fitted for t in choices]


def _may_be_chosen(
    component: Component, choices: Sequence[Treatment], costs: Sequence[float]
) -> set[Treatment]:
    """The dense treatments that a search can choose: those on the hull."""
    dense = [j for j, t in enumerate(choices) if not t.zero_share]
    hull = convex_hull([component.size_bytes(choices[j]) for j in dense], [costs[j] for j in dense])
    chosen = {choices[dense[i]] for i in hull}
    if len(dense) < len(choices):  # zeros may be given back down to the dense type
        chosen |= {choices[j] for j in dense if choices[j].type in SPARSE_TYPES}
    return chosen


def _measure_edge(
    jobs: CostJobs, component: Component, choices: Sequence[Treatment], weights: FloatArray
) -> tuple[list[float], list[bool]]:
    """`token_embd` or `output`."""
    importance = jobs.importance(component)
    if importance is None:
        importance = component_importance(jobs.activations, component, jobs.tied)
    feedback = None
    if jobs.calibration:
        feedback = edge_feedback(jobs.calibration, jobs.activations.scales, component, jobs.tied)
    costs, with_feedback = edge_costs(
        jobs.activations, component, choices, weights, importance, jobs.tied, feedback
    )
    if jobs.encoded:
        pairs = list(zip(choices, with_feedback, strict=True))
        types = [t.type for t, yes in pairs if yes and not t.zero_share]
        masks = {t: yes for t, yes in pairs if t.zero_share}
        jobs.encoded.save_component(component.name, importance, types, feedback, masks)
    return costs, with_feedback


@dataclass(frozen=True)
class MaskJobs:
    """What every mask job needs; fields as in CostJobs. config: None without scales."""

    calibration: Calibration
    scales: Scales
    config: ModelConfig | None
    read: Callable[[str], FloatArray]
    device: torch.device
    encoded: EncodedStore
    imatrix: Mapping[str, FloatArray] | None = None
    mask_score: str = SCORES[0]


def encode_masks(
    jobs: MaskJobs, chosen: Sequence[tuple[Component, Treatment]], progress: Advance = None
) -> None:
    """Encode treatments with zeros once more and keep them: all that were measured would fill the
    disk. They come out as they were measured. progress: called with weights done."""
    tasks = sorted(chosen, key=lambda pair: -pair[0].weights)
    needed = [
        LIBRARIES_BYTES
        + 12 * jobs.calibration.tokens * c.row_length
        + 40 * (c.weights + max(c.rows, c.row_length) ** 2)  # both sides' moments, as above
        for c, _ in tasks
    ]
    workers = _worker_count(jobs.device, [c for c, _ in tasks], needed)
    for (component, _), _ in in_workers(_encode_mask, jobs, tasks, workers):
        if progress:
            progress(component.weights)


@torch.no_grad()
def _encode_mask(jobs: MaskJobs, task: tuple[Component, Treatment]) -> bool:
    component, treatment = task
    vector = given_importance(jobs.imatrix, jobs.scales, component.name)
    m = component_hessians(
        jobs.calibration, jobs.scales, jobs.config, component, jobs.device, vector
    )
    weights = torch.from_numpy(jobs.read(component.name + ".weight")).to(jobs.device)
    fitted = fit_masks(weights, [treatment], m.inputs, m.outputs, m.squares, jobs.mask_score)
    jobs.encoded.save(component, treatment, fitted[0][0])
    return True
