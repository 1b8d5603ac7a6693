"""The files of a base's blocks: boundaries, statistics, scales. Each is made when it is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_dtm.core.files import digest_of
from edge_dtm.formats.plan import Component
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.block_jobs import BlockJobs
from edge_dtm.host.blocks.boundaries import Boundaries
from edge_dtm.host.blocks.edges import EdgeInputs, edge_inputs
from edge_dtm.host.blocks.statistics import Gathering
from edge_dtm.host.blocks.sweeps import back_through, keep, start_back, sweep_back, sweep_forward
from edge_dtm.host.blocks.text import Text
from edge_dtm.host.blocks.workers import Crew, crew
from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.checkpoint.decoder import MATRICES, SITES
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.out_of_memory import with_less_at_a_time
from edge_dtm.host.quantize.gptq import SIDE_BY_SIDE_WEIGHTS
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.host.values import Base, Run

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
# Statistics that take less in all stay until the plan is quantized; larger ones are gathered again.
KEPT_STATISTICS_BYTES = 2 * 10**9
PROCESS_BYTES = 500 * 10**6  # Python with torch


@dataclass(frozen=True)
class BlockData:
    """Where the blocks of a base are swept and gathered.

    folder: of all files below. model: computes on the run's device. crew: who does the jobs. keeps:
    whether the statistics of the fitted sequences stay on disk between measuring and quantizing.
    """

    run: Run
    model: Llama
    text: Text
    boundaries: Boundaries
    jobs: BlockJobs
    crew: Crew
    keeps: bool

    @property
    def folder(self) -> Path:
        return self.jobs.folder

    def prepare(self, top: int) -> None:
        """The boundaries that blocks `top` and below are gathered from, and that behind the last."""
        last, has = self.model.layers, self.boundaries.has
        if not all(has("hidden", number) for number in (*range(top + 1), last)):
            with self.run.stages("Sweep forward", last) as advance:
                self._in_batches(lambda t: sweep_forward(self.model, t, self.boundaries, advance))
        if has("gradient", top + 1):
            return
        self._in_batches(lambda text: start_back(self.model, text, self.boundaries))
        if top + 1 < last:
            self._sweep()

    def gather(self, layer: int, rows: Mapping[str, IntArray] | None) -> None:
        """One block's statistics, and the gradient boundary before it, from the boundaries on both
        sides. rows: as in Gathering."""
        self._in_batches(lambda text: self._gather(text, layer, rows))

    def _in_batches(self, work: Callable[[Text], None]) -> None:
        """Where memory runs out, with less text side by side, down to single sequences."""

        def attempt(tokens: int) -> None:
            work(replace(self.text, batch_tokens=tokens))

        with_less_at_a_time(attempt, self.text.batch_tokens, max(map(len, self.text.sequences)))

    def _gather(self, text: Text, layer: int, rows: Mapping[str, IntArray] | None) -> None:
        boundaries = self.boundaries
        gathering = Gathering(text, rows, self.keeps)
        part = "all" if rows else "fitted"
        pieces = back_through(self.model, text, boundaries, layer, part)
        if boundaries.has("gradient", layer) or not rows:
            for piece in pieces:
                gathering.add(piece)
        else:
            with boundaries.writing("gradient", layer) as gradients:
                for piece in pieces:
                    keep(piece, boundaries, gradients)
                    gathering.add(piece)
        fitted, measured = gathering.finish().parts()
        fitted.save(self.jobs.fitted_file(layer))
        if rows:
            measured.save(self.jobs.measured_file(layer))

    def ensure_fitted(self, layer: int) -> None:
        """The statistics of the fitted sequences, for quantizing."""
        if self.jobs.fitted_file(layer).is_file():
            return
        if not self.boundaries.has("gradient", layer + 1) or not self.boundaries.has(
            "hidden", layer
        ):
            self._sweep()
        self.gather(layer, None)

    def ensure_ends(self) -> None:
        """The boundaries at both ends of the model."""
        ends = self.boundaries.has("gradient", 0), self.boundaries.has("hidden", self.model.layers)
        if not all(ends):
            self._sweep()

    def _sweep(self) -> None:
        self.prepare(self.model.layers - 1)
        with self.run.stages("Sweep back", self.model.layers) as advance:
            self._in_batches(lambda t: sweep_back(self.model, t, self.boundaries, advance))

    def done_with(self, layer: int) -> None:
        """What only the measurement of the block reads goes."""
        self.jobs.measured_file(layer).unlink(missing_ok=True)
        if self.keeps:  # then its boundaries are not needed for quantizing
            self.boundaries.remove("hidden", layer)
            self.boundaries.remove("gradient", layer + 1)
        else:
            self.jobs.fitted_file(layer).unlink(missing_ok=True)

    def quantized(self, layer: int) -> None:
        """What is not kept goes, and where no other plan will follow, what it was gathered from."""
        if self.keeps:
            return
        self.jobs.fitted_file(layer).unlink(missing_ok=True)
        goal = self.run.settings.goal
        if goal.max_sdt is None and goal.min_fdt is None and not goal.sparsity:
            self.boundaries.remove("hidden", layer)
            self.boundaries.remove("gradient", layer + 1)

    def edge_inputs(self) -> EdgeInputs:
        return edge_inputs(self.model, self.text, self.boundaries)

    def remove(self) -> None:
        """What is large goes; the scales, which costs and bytes belong to, stay."""
        self._remove("hidden-*", "gradient-*", "fitted-*", "measured-*")

    def _remove(self, *names: str) -> None:
        for name in names:
            for path in self.folder.glob(name):
                path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Once the bundle is there: what is kept serves another size of the same model."""
        if self.keeps:
            self._remove("measured-*")
        else:
            self.remove()


def block_data(run: Run, base: Base, reference: Reference) -> BlockData:
    measured, fitted = calibration_rows(reference)
    rows = np.concatenate([measured, fitted])
    text = Text(reference.rows(rows), len(measured), run.settings.source.seed)
    method, config = run.settings.method, base.checkpoint.config
    key = digest_of([base.key, method.equalize])
    folder = run.work.folder / f"blocks-{key}"
    who = crew(base.weights, task_bytes(config, text.measured_tokens), method.workers, run.device)
    return BlockData(
        run=run,
        model=Llama(base.checkpoint, run.device),
        text=text,
        boundaries=Boundaries(folder, text.tokens, text.measured_tokens, config.hidden),
        jobs=BlockJobs(
            folder=folder,
            checkpoint=base.checkpoint,
            edges=text.edges[: text.measured + 1],
            positions=text.measured_positions,
            device=str(run.device),
            threads=who.threads,
            feedback=method.feedback,
            equalize=method.equalize,
            mask_score=method.mask_score,
            imatrix=run.imatrix,
        ),
        crew=who,
        keeps=keeps_fitted(config),
    )


def shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Matrix of a block -> (rows, row_length)."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    rows = dict(
        zip(
            MATRICES, (q, kv, kv, config.hidden, config.ffn, config.ffn, config.hidden), strict=True
        )
    )
    lengths = {
        "attn_q": config.hidden,
        "attn_output": q,
        "ffn_gate": config.hidden,
        "ffn_down": config.ffn,
    }
    return {m: (rows[m], lengths[site]) for site, fed in SITES.items() for m in fed}


def fitted_bytes(config: ModelConfig) -> int:
    """Of one block's statistics of the fitted sequences: Hessians of both sides."""
    return sum(4 * (rows**2 + length**2) for rows, length in shapes(config).values())


def keeps_fitted(config: ModelConfig) -> bool:
    """Whether the statistics of the fitted sequences stay until the plan is quantized."""
    return fitted_bytes(config) * config.layers <= KEPT_STATISTICS_BYTES


def task_bytes(config: ModelConfig, tokens: int) -> int:
    """What a job takes at most, of measured tokens so many."""
    sizes = []
    for rows, length in shapes(config).values():
        factors = 6 * (rows**2 + length**2)  # a Hessian, damped, its factor twice, what passes on
        side_by_side = max(rows * length, SIDE_BY_SIDE_WEIGHTS)
        sizes.append(factors + 10 * min(side_by_side, 16 * rows * length) + 8 * tokens * length)
    return 4 * max(sizes) + PROCESS_BYTES


def layer_components(components: tuple[Component, ...], layer: int) -> dict[str, Component]:
    """Matrix -> component."""
    prefix = f"blk.{layer}."
    return {c.name.removeprefix(prefix): c for c in components if c.name.startswith(prefix)}
