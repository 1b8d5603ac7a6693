"""The cost of every treatment of every component, from the work folder or measured now: a sweep
forward over the blocks, then one back, on which each block is measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import SPARSE_LEVELS, Component, Treatment, candidate_treatments
from edge_dtm.formats.reference import Reference, load_npz, save_npz
from edge_dtm.host.blocks.block_jobs import find_site_scales, measure_matrix
from edge_dtm.host.blocks.check import check_equalized
from edge_dtm.host.blocks.cost_records import corrected, read_costs, whole_blocks
from edge_dtm.host.blocks.edges import EMBEDDED, HEAD, EdgeInputs, edge_costs, head_scales
from edge_dtm.host.blocks.encoded import EncodedStore
from edge_dtm.host.blocks.gather import BlockData, block_data, layer_components
from edge_dtm.host.blocks.statistics import SITE_OF, Statistics, sampled_rows
from edge_dtm.host.blocks.workers import Workers, workers
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.decoder import SITES
from edge_dtm.host.checkpoint.derived import EqualizedCheckpoint
from edge_dtm.host.settings import Goal
from edge_dtm.host.values import Base, Run
from edge_dtm.search.cost_table import CostTable

FloatArray = npt.NDArray[np.float32]
METHOD = 4  # of the measurement; raise it when that changes, and old costs are measured again
ROW_SHARE = 0.125  # of a matrix's groups of rows, on which costs are taken
Choices = Mapping[str, tuple[Treatment, ...]]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Costs:
    """The cost of every treatment of every component, and what their bytes are made with.

    encoded: where bytes are kept. equalized: the base with its scales worked in, what is rounded
    and exported. feedback: of each component, in the order of the table's treatments, which are
    made with error feedback, or with zeros refitted. data: the blocks' files.
    """

    table: CostTable
    encoded: EncodedStore
    equalized: Checkpoint
    scales: Mapping[str, FloatArray]
    feedback: Mapping[str, tuple[bool, ...]]
    data: BlockData

    def uses_feedback(self, component: Component, treatment: Treatment) -> bool:
        """Between two measured levels of zeros the upper one decides."""
        index = [c.name for c in self.table.components].index(component.name)
        measured = zip(self.table.treatments[index], self.feedback[component.name], strict=True)
        levels = [
            (t.zero_share, yes)
            for t, yes in measured
            if t.type == treatment.type and t.zero_share >= treatment.zero_share
        ]
        if not treatment.zero_share:
            levels = [level for level in levels if level[0] == 0]
        return min(levels)[1] if levels else False


def measure_costs(run: Run, base: Base, reference: Reference, goal: Goal | None = None) -> Costs:
    """goal: in place of the run's, where only some treatments are wanted."""
    goal = goal or run.settings.goal
    choices = {
        c.name: tuple(
            candidate_treatments(c, goal.types, goal.sparsity > 0, base.zeros.get(c.name, 0.0))
        )
        for c in base.components
    }
    inputs = _inputs(run, base, goal)
    results = run.work.path("costs", inputs, ".jsonl")
    data = block_data(run, base, reference)
    known = read_costs(results)
    if all(c.name in known for c in base.components) and _has_scales(data):
        run.stages.note("costs: taken from the work folder")
    else:
        _measure(data, base, choices, results)
        known = read_costs(results)
    scales = load_scales(data)
    equalized = base.checkpoint
    if scales:
        equalized = EqualizedCheckpoint(base.checkpoint, scales)
        check_equalized(run, base, equalized, reference)
    of_all_rows = corrected(known)
    table = CostTable(
        base.components,
        tuple(choices[c.name] for c in base.components),
        tuple(tuple(of_all_rows[c.name]) for c in base.components),
        base.fixed_bytes,
    )
    return Costs(
        table,
        EncodedStore(run.work.path("encoded", inputs), equalized),
        equalized,
        scales,
        {c.name: tuple(known[c.name]["feedback"]) for c in base.components},
        data,
    )


def load_scales(data: BlockData) -> dict[str, FloatArray]:
    """Site -> float32 (row_length,), of all blocks and an untied head."""
    if not data.jobs.equalize:
        return {}
    scales: dict[str, FloatArray] = {}
    try:
        for layer in range(data.model.layers):
            scales |= data.jobs.scales(layer)
        if not data.model.config.tied:
            scales |= load_npz(_head_file(data), [HEAD], "fit")[0]
    except EdgeDtmError as error:
        raise EdgeDtmError(f"{error}: run edge-dtm compress again with --no-resume") from None
    return scales


def _has_scales(data: BlockData) -> bool:
    files = [data.jobs.fit_file(layer) for layer in range(data.model.layers)]
    return all(file.is_file() for file in [*files, _head_file(data)])


def _head_file(data: BlockData) -> Path:
    return data.folder / "fit-head.npz"


def _inputs(run: Run, base: Base, goal: Goal) -> list[object]:
    """What the costs depend on."""
    method, vectors = run.settings.method, run.imatrix or {}
    inputs: list[object] = [
        METHOD,
        ROW_SHARE,
        base.key,
        goal.types,
        goal.sparsity > 0,
        method.feedback,
        method.equalize,
        sorted((k, hashlib.sha256(v.tobytes()).hexdigest()) for k, v in vectors.items()),
    ]
    if goal.sparsity:
        inputs += [SPARSE_LEVELS, method.mask_score, dict(base.zeros)]
    return inputs


def _measure(data: BlockData, base: Base, choices: Choices, results: Path) -> None:
    """Append what is not measured yet to `results`, a line a component."""
    known = read_costs(results)
    layers = range(data.model.layers)
    missing = {
        layer: [c for c in layer_components(base.components, layer).values() if c.name not in known]
        for layer in layers
    }
    todo = [n for n in layers if missing[n] or not data.jobs.fit_file(n).is_file()]
    if todo:
        data.prepare(max(todo))
    else:
        data.ensure_ends()
    with (
        results.open("a") as file,
        workers(data.jobs, data.crew) as pool,
        data.run.stages("Blocks", base.weights) as advance,
    ):

        def write(record: Mapping[str, Any], weights: int) -> None:
            file.write("\n" * (file.tell() > 0) + json.dumps(record))
            file.flush()
            advance(weights)

        advance(sum(c.weights for c in base.components if c.name in known))
        # From the highest that is not done down, since each leaves the gradient for the next.
        for layer in reversed(range(max(todo, default=-1) + 1)):
            components = layer_components(base.components, layer)
            seed = data.run.settings.source.seed
            sample = {c.name: sampled_rows(c, ROW_SHARE, seed) for c in components.values()}
            whole = layer in whole_blocks(data.model.layers)
            data.gather(
                layer,
                {m: np.arange(c.rows) if whole else sample[c.name] for m, c in components.items()},
            )
            _save_fit(data, layer, pool)
            # The longest first, so that no core is left with it at the end.
            here = sorted(missing[layer], key=lambda c: -c.weights)
            tasks = [(c, choices[c.name], sample[c.name]) for c in here]
            for (component, _, _), record in pool.run(measure_matrix, tasks):
                write(record, component.weights)
            data.done_with(layer)
        _measure_edges(data, base, choices, known, write)


def _save_fit(data: BlockData, layer: int, pool: Workers) -> None:
    """The block's scales, and the mean squares of its inputs."""
    if data.jobs.fit_file(layer).is_file():
        return
    statistics = Statistics.load(data.jobs.fitted_file(layer))
    arrays = {
        f"squares.{site}": statistics[f"squares.{site}"].numpy().astype(np.float32)
        for site in SITES
    }
    if data.jobs.equalize:
        sites = [f"blk.{layer}.{site}" for site in SITES]
        arrays |= dict(pool.run(find_site_scales, sites))
    save_npz(data.jobs.fit_file(layer), arrays, {"kind": "fit"})


def _measure_edges(
    data: BlockData,
    base: Base,
    choices: Choices,
    known: Mapping[str, Any],
    write: Callable[[Mapping[str, Any], int], None],
) -> None:
    edges = [c for c in base.components if not c.in_block]
    inputs, run, config = data.edge_inputs(), data.run, base.checkpoint.config
    scales: dict[str, FloatArray] = {}
    if not config.tied and data.jobs.equalize:
        weights = base.checkpoint.hf_tensor(HEAD + ".weight")
        scales = {HEAD: head_scales(inputs, weights, config)}
    save_npz(_head_file(data), scales, {"kind": "fit"})
    if base.checkpoint is run.checkpoint:
        _save_imatrix(data, inputs)
    equalized = EqualizedCheckpoint(base.checkpoint, scales) if scales else base.checkpoint
    for component in edges:
        if component.name in known:
            continue
        costs, with_feedback = edge_costs(
            inputs,
            component,
            choices[component.name],
            equalized.hf_tensor(component.name + ".weight"),
            config.tied,
            scales,
            data.jobs.feedback,
            data.jobs.importance(component.name, scales),
        )
        record = {
            "name": component.name,
            "by_weights": costs,
            "by_inputs": [0.0] * len(costs),
            "feedback": with_feedback,
        }
        write(record, component.weights)


def _save_imatrix(data: BlockData, inputs: EdgeInputs) -> None:
    """The original's importance vectors as llama.cpp's tools know them, for `edge-dtm recipe`."""
    config, run = data.model.config, data.run
    vectors: dict[str, FloatArray] = {}
    for layer in range(config.layers):
        names = [f"squares.{site}" for site in SITES]
        squares = load_npz(data.jobs.fit_file(layer), names, "fit")[0]
        vectors |= {f"blk.{layer}.{m}": squares[f"squares.{site}"] for m, site in SITE_OF.items()}
    vectors[EMBEDDED if config.tied else HEAD] = inputs.head_squares.astype(np.float32)
    save_npz(
        run.work.folder / f"imatrix-{run.key}.npz",
        vectors,
        {
            "kind": "imatrix",
            "tokens": data.text.tokens - data.text.measured_tokens,
            "names": list(vectors),
        },
    )
