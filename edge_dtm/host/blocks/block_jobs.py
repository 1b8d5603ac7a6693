"""Jobs of one matrix of one block: its scales, its costs, its bytes. Functions of files in the work
folder; they know nothing of processes, GPUs or other machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.formats.reference import load_npz
from edge_dtm.host.blocks.encoded import EncodedStore, takes_feedback
from edge_dtm.host.blocks.fit import Fit, find_scales, fit_of, importance_of, part_of
from edge_dtm.host.blocks.sensitivity import Cost, Measured, costs_of
from edge_dtm.host.blocks.statistics import Statistics
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.decoder import SITES
from edge_dtm.host.checkpoint.derived import EqualizedCheckpoint
from edge_dtm.host.out_of_memory import with_less_at_a_time
from edge_dtm.host.quantize.equalize import Scales, consumers, input_scale
from edge_dtm.host.quantize.gptq import SIDE_BY_SIDE_WEIGHTS, gptq_quantize, group_rows
from edge_dtm.host.quantize.hessian import input_hessian, local_error, scaled_gradients
from edge_dtm.host.quantize.masks import SCORES, fit_masks
from edge_dtm.host.quantize.treat import treat, treated_values

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
JUDGED_STEP = 4  # of the measured tokens a quarter is enough to choose between two roundings


@dataclass(frozen=True)
class BlockJobs:
    """What the jobs of all blocks need.

    folder: of statistics and fits. checkpoint: the base, not equalized. edges: of the measured
    sequences among their tokens, (sequences + 1,); positions: margins among them. device: in
    words. threads: that a job computes with. feedback, equalize, mask_score: see Method. imatrix:
    importance vectors of the original in place of ours, component -> float32 (row_length,).
    """

    folder: Path
    checkpoint: Checkpoint
    edges: npt.NDArray[np.integer[Any]]
    positions: int
    device: str = "cpu"
    threads: int = 1
    feedback: bool = True
    equalize: bool = True
    mask_score: str = SCORES[0]
    imatrix: Mapping[str, FloatArray] | None = None

    def fitted_file(self, layer: int) -> Path:
        return self.folder / f"fitted-{layer:03d}.safetensors"

    def measured_file(self, layer: int) -> Path:
        return self.folder / f"measured-{layer:03d}.safetensors"

    def fit_file(self, layer: int) -> Path:
        return self.folder / f"fit-{layer:03d}.npz"

    def scales(self, layer: int) -> dict[str, FloatArray]:
        """Site -> float32 (row_length,)."""
        if not self.equalize:
            return {}
        names = [f"blk.{layer}.{site}" for site in SITES]
        return load_npz(self.fit_file(layer), names, "fit")[0]

    def statistics(self, layer: int, matrix: str | None, measured: bool) -> Statistics:
        """From the block's files, on the device."""
        tensors = dict(Statistics.load(self.fitted_file(layer), matrix).tensors)
        if measured:
            tensors |= Statistics.load(self.measured_file(layer), matrix).tensors
        return Statistics(tensors).to(torch.device(self.device))

    def importance(self, name: str, scales: Scales) -> FloatArray | None:
        """The given vector, as the equalized model has it; None where none is given."""
        vector, scale = self.imatrix.get(name) if self.imatrix else None, input_scale(scales, name)
        return vector if vector is None or scale is None else vector * scale * scale


def layer_of(component: Component) -> int:
    return int(component.name.split(".")[1])


def find_site_scales(jobs: BlockJobs, site: str) -> FloatArray:
    """Of `blk.3.attn_q`, float32 (row_length,)."""
    layer, part = int(site.split(".")[1]), part_of(site)
    tensors: dict[str, torch.Tensor] = {}
    for matrix in SITES[part]:
        tensors |= Statistics.load(jobs.fitted_file(layer), matrix).tensors
    weights = {c: jobs.checkpoint.hf_tensor(c + ".weight") for c in consumers(site)}
    return find_scales(Statistics(tensors), site, jobs.checkpoint.config, weights)


@torch.no_grad()
def measure_matrix(
    jobs: BlockJobs, task: tuple[Component, Sequence[Treatment], IntArray]
) -> dict[str, Any]:
    """One component's line of the costs.

    task: the component, its treatments and the sampled rows, rising. Of each treatment: what it
    costs by its weights and by its inputs, and whether error feedback (with zeros: refitting) made
    the local error smaller than plain rounding. Where all rows were gathered these costs are of
    all of them, and `ratios` tells by how much the local error differs from that of the sample:
    rows make up for each other, the more the more there are.
    """

    def measure(weights: int) -> dict[str, Any]:
        return _measure_matrix(jobs, task, weights)

    # As many types side by side as memory turns out to hold.
    least = len(task[2]) * task[0].row_length
    return with_less_at_a_time(measure, max(SIDE_BY_SIDE_WEIGHTS, least), least)


def _measure_matrix(
    jobs: BlockJobs, task: tuple[Component, Sequence[Treatment], IntArray], at_once_weights: int
) -> dict[str, Any]:
    component, choices, sample = task
    statistics = jobs.statistics(layer_of(component), part_of(component.name), True)
    rows = statistics[f"rows.{part_of(component.name)}"].cpu()
    at_once = max(1, at_once_weights // (len(rows) * component.row_length))
    parts = [choices[i : i + at_once] for i in range(0, len(choices), at_once)]
    costs, errors, fitted = _measure_rows(jobs, statistics, component, parts, rows)
    record = {
        "name": component.name,
        "by_weights": [c.by_weights for c in costs],
        "by_inputs": [c.by_inputs for c in costs],
        "feedback": fitted,
    }
    if len(sample) < len(rows):
        _, some, _ = _measure_rows(jobs, statistics, component, parts, torch.from_numpy(sample))
        upscale = len(rows) / len(sample)
        record["ratios"] = [
            a / (upscale * b) if b > 0 else 1.0 for a, b in zip(errors, some, strict=True)
        ]
    return record


def _measure_rows(
    jobs: BlockJobs,
    statistics: Statistics,
    component: Component,
    parts: Sequence[Sequence[Treatment]],
    rows: torch.Tensor,
) -> tuple[list[Cost], list[float], list[bool]]:
    """On these rows, costs (scaled up to all rows), local errors, and where feedback is better.
    parts: of the treatments, each made side by side."""
    scales, config = jobs.scales(layer_of(component)), jobs.checkpoint.config
    equalized = EqualizedCheckpoint(jobs.checkpoint, scales)
    weights = equalized.hf_tensor(component.name + ".weight")[rows.numpy()]
    vector = jobs.importance(component.name, scales)
    fit = fit_of(statistics, component, scales, config, vector, rows)
    measured = Measured.of(statistics, component, scales, config, jobs.edges, jobs.positions, rows)
    w = torch.from_numpy(weights).to(jobs.device)
    v = measured.sizes[::JUDGED_STEP]
    judge = input_hessian(measured.inputs[::JUDGED_STEP], v)
    outputs = scaled_gradients(measured.gradients[0, ::JUDGED_STEP], v)
    encoded: dict[Treatment, torch.Tensor] = {}
    costs, errors, fitted = [], [], []
    for some in parts:
        if jobs.feedback:
            encoded = {t: e[1] for t, e in _encode(jobs, fit, component, some, w).items()}
        values = []
        for treatment in some:
            plain = treated_values(weights, treatment, fit.importance)
            best = torch.from_numpy(plain).to(jobs.device)
            error, better = local_error(best - w, judge, outputs), encoded.get(treatment)
            fitted.append(False)
            if better is not None:
                with_feedback = local_error(better - w, judge, outputs)
                if with_feedback < error:
                    error, best, fitted[-1] = with_feedback, better, True
            values.append(best)
            errors.append(error)
        costs += costs_of(measured, some, w, values, component.rows)
    return costs, errors, fitted


def _encode(
    jobs: BlockJobs,
    fit: Fit,
    component: Component,
    choices: Sequence[Treatment],
    weights: torch.Tensor,
) -> dict[Treatment, tuple[ByteArray, torch.Tensor]]:
    """With error feedback, or what the zeros leave refitted: of those treatments that can be, bytes
    and values. weights: float32 (rows, row_length), all rows or the sampled ones."""
    dense = [t for t in choices if takes_feedback(t)]
    sparse = [t for t in choices if t.zero_share]
    threads, group = jobs.threads, group_rows(component.rows)
    both = fit.inputs, fit.outputs
    encoded = gptq_quantize(weights, [t.type for t in dense], *both, threads=threads, group=group)
    score = jobs.mask_score
    encoded += fit_masks(weights, sparse, *both, fit.squares, score, threads, group)
    return dict(zip([*dense, *sparse], encoded, strict=True))


@dataclass(frozen=True)
class QuantizeJobs:
    """What the jobs that make a plan's bytes need."""

    blocks: BlockJobs
    store: EncodedStore


@torch.no_grad()
def quantize_matrix(jobs: QuantizeJobs, task: tuple[Component, Treatment, bool]) -> None:
    """Make the bytes of one matrix of a block and keep them; the flag: with error feedback, or what
    the zeros leave refitted."""
    component, treatment, with_feedback = task
    blocks, layer = jobs.blocks, layer_of(component)
    scales = blocks.scales(layer)
    statistics = blocks.statistics(layer, part_of(component.name), False)
    weights = jobs.store.checkpoint.hf_tensor(component.name + ".weight")
    vector = blocks.importance(component.name, scales)
    if with_feedback:
        fit = fit_of(statistics, component, scales, blocks.checkpoint.config, vector)
        w = torch.from_numpy(weights).to(blocks.device)
        data, _ = _encode(blocks, fit, component, [treatment], w)[treatment]
        importance = fit.importance
    else:
        importance = importance_of(statistics, component, scales) if vector is None else vector
        data = treat(weights, treatment, importance)
    jobs.store.save(component, treatment, data, importance)
