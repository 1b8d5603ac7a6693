"""Ours against llama.cpp's own presets (Q4_K_M and the like) at equal file size.

For each preset llama.cpp's quantizer makes a GGUF from an F32 export of the original model, once
plain and once with its importance matrix ("im"). Our search then gets the size of that file as its
limit. All are replayed teacher-forced in llama.cpp on all held-out sequences, which neither the
costs nor the importance have seen. What ours is held against at a size is the preset file of least
SDT, plain or im, that is no larger. The ratio (our SDT - noise floor) / (its SDT - noise floor)
comes with a 95 % bootstrap interval, sequences being resampled together for all three files.
How many bytes fewer ours takes at equal SDT is read off the line through our measured points, size
against the logarithm of SDT.

At the sizes of --ablations parts of the method are left out or replaced, one at a time.

WORK_BUNDLE is a folder that `edge-dtm compress MODEL -o WORK_BUNDLE` made; its `work` folder gives
the reference, the costs, the blocks and the importance. Output: tables on the terminal, with --out
as Markdown, with --figure as a picture, with --json every figure. What was measured stays in
WORK_BUNDLE/work/bench, so that a second run is quick; GGUF files are removed once they are
measured.

    python tools/bench_quality.py WORK_BUNDLE --out docs/quality.md --figure docs/quality.png \\
        --json quality.json
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

# The script also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_quality_text import (
    SCHEMA_VERSION,
    load_other,
    markdown,
    notes,
    series,
    terminal_tables,
    too_few,
)

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import digest_of
from edge_dtm.core.metrics import (
    BoolArray,
    Interval,
    bootstrap,
    divergent_mask,
    first_divergent_tokens,
)
from edge_dtm.core.paths import default_model_dir
from edge_dtm.core.progress import Stages
from edge_dtm.formats.ggml_types import ALLOWED_TYPES, DEFAULT_TYPES
from edge_dtm.formats.plan import Component, Plan, Treatment, uniform
from edge_dtm.formats.profile import load_profile
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import CALIBRATION, HELD_OUT, Reference, load_imatrix
from edge_dtm.host import export
from edge_dtm.host.blocks.costs import captures, measure_costs
from edge_dtm.host.blocks.sensitivity import component_costs, edge_costs
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.equalized import EqualizedCheckpoint
from edge_dtm.host.checkpoint.model import load_model
from edge_dtm.host.measure import against, noise_floor, replay
from edge_dtm.host.prepare import reopen_run
from edge_dtm.host.quantize.equalize import input_scale
from edge_dtm.host.quantize.treat import treated_values
from edge_dtm.host.settings import Goal, Settings, Source
from edge_dtm.host.values import Base, Costs, Measurement, Run
from edge_dtm.llamacpp import llama
from edge_dtm.llamacpp.tensors import describe
from edge_dtm.report.frontier_figure import draw
from edge_dtm.search.allocation import convex_hull, search
from edge_dtm.search.cost_table import CostTable
from edge_dtm.search.predictor import Predictor

DEFAULT_PRESETS = "Q3_K_M,IQ4_NL,Q4_0,Q4_K_M,Q5_K_M,Q6_K,Q8_0"
DEFAULT_ABLATIONS = "Q4_K_M,Q6_K"

Vectors = Mapping[str, npt.NDArray[np.float32]]


def above_floor(mask: BoolArray, other: BoolArray, floor: BoolArray, seed: int = 0) -> Interval:
    """(SDT(mask) - SDT(floor)) / (SDT(other) - SDT(floor)) on the same sequences, resampled
    together. Infinite where `other` diverges no more than the floor."""
    base = floor.sum(axis=1)
    ours, theirs = mask.sum(axis=1) - base, other.sum(axis=1) - base
    return _paired(ours, theirs, seed)


def fdt_ratio(mask: BoolArray, other: BoolArray, lengths: Any, seed: int = 0) -> Interval:
    """Mean FDT(mask) / mean FDT(other), sequences resampled together."""
    ours, theirs = (first_divergent_tokens(m, lengths) for m in (mask, other))
    return _paired(ours, theirs, seed)


def _paired(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], seed: int) -> Interval:
    def ratio(index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        drawn = theirs[index].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(drawn > 0, ours[index].sum(axis=1) / drawn, np.inf)

    low, high = bootstrap(ratio, len(ours), seed)
    return Interval(float(ratio(np.arange(len(ours))[None])[0]), low, high)


def ratio_json(ratio: Interval) -> dict[str, float | None]:
    """JSON has no infinity: None."""
    return {k: v if np.isfinite(v) else None for k, v in ratio.to_json().items()}


def bytes_at(points: Sequence[tuple[int, float]], sdt: float) -> float | None:
    """The size at which our files would have that SDT: linear in log SDT between neighbouring
    points (bytes, SDT), the smallest size if there are several. None outside their range."""
    ordered = sorted(set(points))
    for (a, high), (b, low) in pairwise(ordered):
        if high >= sdt >= low > 0:
            return b if high == low else a + (b - a) * log(high / sdt) / log(high / low)
    return None


@dataclass(frozen=True)
class Candidate:
    """One GGUF: how large, of which tensor types, and how it did on the held-out sequences."""

    size_bytes: int
    types: Mapping[str, int]
    sha256: str
    measured: Measurement

    @property
    def sdt(self) -> float:
        return self.measured.divergence.sdt.value

    def to_json(self) -> dict[str, Any]:
        return {
            "size_bytes": self.size_bytes,
            "tensors_of_type": dict(self.types),
            "gguf_sha256": self.sha256,
            **self.measured.to_json(),
        }


class Bench:
    """Makes GGUFs and measures them; each file and each record once."""

    def __init__(self, run: Run, base: Base, reference: Reference) -> None:
        self.run, self.base, self.reference = run, base, reference
        self.held_out = reference.part(HELD_OUT)
        self.lengths = self.held_out.generated_lengths
        self.folder = run.work.folder / "bench"
        self.folder.mkdir(exist_ok=True)
        self.common = {
            "model": run.checkpoint.check(),
            "packages": export.provenance(run.checkpoint)["packages"],
            "fixed_bytes": base.fixed_bytes,
        }
        self.sources: dict[str, Path] = {}

    def candidate(self, title: str, what: Any, make: Callable[[Path], None]) -> Candidate:
        """what: JSON that, with the model, settles the file's bytes."""
        made = self.folder / f"made-{digest_of([self.common, what])}.json"
        facts = json.loads(made.read_text()) if made.is_file() else None
        record = self._record(facts["sha256"]) if facts else None
        if facts is None or record is None or not record.is_file():
            gguf = self.folder / "candidate.gguf"
            try:
                make(gguf)
                with gguf.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                types: dict[str, int] = {}
                for t in describe(gguf):
                    types[t.type] = types.get(t.type, 0) + 1
                facts = {"sha256": sha256, "size_bytes": gguf.stat().st_size, "types": types}
                record = self._record(sha256)
                if not record.is_file():
                    replay(self.run, gguf, self.held_out, f"{title}: replay").save(record)
                _write_json(made, facts)
            finally:
                gguf.unlink(missing_ok=True)
        measured = against(self.held_out, Record.load(record), 0.0)
        return Candidate(facts["size_bytes"], facts["types"], facts["sha256"], measured)

    def _record(self, sha256: str) -> Path:
        settings = {k: v for k, v in self.run.run_settings.to_json().items() if k != "threads"}
        llama = self.common["packages"]["llama-cpp-python"]
        return self.folder / f"record-{digest_of([sha256, self.run.key, settings, llama])}.npz"

    def kept(self, name: str, what: Any, make: Callable[[], Any]) -> Any:
        """JSON that is long in the making, from the folder or made now."""
        path = self.folder / f"{name}-{digest_of([self.common, self.run.key, what])}.json"
        if not path.is_file():
            _write_json(path, make())
        return json.loads(path.read_text())

    def mask(self, record: Record) -> BoolArray:
        return divergent_mask(self.held_out.generated_ids, record.ids, self.lengths)

    def preset(
        self, name: str, vectors: Vectors | None, checkpoint: Checkpoint | None = None
    ) -> Candidate:
        """vectors: llama.cpp's importance matrix. checkpoint: instead of the original."""
        checkpoint = checkpoint or self.run.checkpoint
        title = f"{name}{' + im' if vectors else ''}"
        what: list[Any] = ["preset", name]
        if isinstance(checkpoint, EqualizedCheckpoint):
            title += ", equalized"
            what.append(array_digest(checkpoint.scales))
        if vectors:
            what.append({"imatrix": array_digest(vectors)})
        return self.candidate(
            title, what, partial(self._quantize, name, vectors, checkpoint, title)
        )

    def ours(
        self,
        title: str,
        plan: Plan,
        checkpoint: Checkpoint,
        blocks: export.Importance | export.Blocks,
        blocks_name: str,
    ) -> Candidate:
        """blocks_name: says with the plan which blocks these are."""

        def make(path: Path) -> None:
            with self.run.stages(f"{title}: export", self.base.weights) as advance:
                export.export_gguf(checkpoint, plan, path, blocks, advance)

        return self.candidate(title, ["plan", plan.hash, blocks_name], make)

    def _source(self, checkpoint: Checkpoint) -> Path:
        """The F32 export that llama.cpp quantizes."""
        kind = "equalized" if isinstance(checkpoint, EqualizedCheckpoint) else "original"
        if kind not in self.sources:
            path = self.folder / f"f32-{kind}.gguf"
            plan = uniform(self.base.components, "F32", self.base.fixed_bytes)
            with self.run.stages(f"Exporting F32, {kind}", self.base.weights) as advance:
                export.export_gguf(checkpoint, plan, path, {}, advance)
            self.sources[kind] = path
        return self.sources[kind]

    def _quantize(
        self, name: str, vectors: Vectors | None, checkpoint: Checkpoint, title: str, path: Path
    ) -> None:
        source = self._source(checkpoint)
        lib = llama.library()  # sends llama.cpp's log elsewhere
        params = lib.llama_model_quantize_default_params()
        params.ftype, params.nthread = preset_ftype(name), self.run.run_settings.threads
        params.allow_requantize = False
        arrays = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in (vectors or {}).items()}
        if arrays:
            entries = (lib.llama_model_imatrix_data * (len(arrays) + 1))()  # the last: no name
            for entry, (key, data) in zip(entries, arrays.items(), strict=False):
                entry.name = f"{key}.weight".encode()
                entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                entry.size = data.size
            params.imatrix = ctypes.cast(entries, type(params.imatrix))
        llama.last_errors.clear()
        with self.run.stages(f"{title}: quantize", 1) as advance:
            code = lib.llama_model_quantize(
                os.fsencode(source), os.fsencode(path), ctypes.byref(params)
            )
            advance(1)
        if code:
            raise EdgeDtmError(
                f"llama.cpp could not make a {name} of this model{llama.error_text()}"
            )

    def close(self) -> None:
        """Remove what is large and quick to make again."""
        for path in self.sources.values():
            path.unlink(missing_ok=True)
        for captured in captures(self.run, self.base, self.reference):
            captured.remove()


def _write_json(path: Path, data: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data))
    temporary.replace(path)


def array_digest(arrays: Vectors) -> str:
    return digest_of(
        {
            k: hashlib.sha256(np.ascontiguousarray(v, dtype=np.float32).data).hexdigest()
            for k, v in arrays.items()
        }
    )


def preset_ftype(name: str) -> int:
    value = getattr(llama.library(), f"LLAMA_FTYPE_MOSTLY_{name}", None)
    if value is None:
        raise EdgeDtmError(f"llama.cpp has no preset {name!r}; known are Q4_K_M, Q5_K_S, Q8_0, ...")
    return int(value)


def why_skipped(name: str, components: Sequence[Component]) -> str | None:
    """Why a preset cannot be compared on this model, or None."""
    unfit = [c for c in components if c.row_length % 256]
    if re.match("Q[23]_K", name) and unfit:
        return (
            f"the rows of {len(unfit)} of {len(components)} matrices do not divide by 256, and "
            "llama.cpp would silently give those a larger type"
        )
    return None


def best_plan(table: CostTable, max_bytes: int) -> tuple[Plan, bool]:
    """The plan for max_bytes, or the smallest there is, and whether it is that one."""
    smallest = table.fixed_bytes + sum(
        min(
            c.size_bytes(t)
            for t, cost in zip(ts, costs, strict=True)
            if not t.zero_share and np.isfinite(cost)
        )
        for c, ts, costs in zip(table.components, table.treatments, table.costs, strict=True)
    )
    return search(table, max(max_bytes, smallest)), smallest > max_bytes


def equalized_imatrix(vectors: Vectors, equalized: EqualizedCheckpoint) -> dict[str, Any]:
    """The importance matrix of the equalized model: its inputs are the original's times scales."""
    out = {}
    for name, vector in vectors.items():
        scale = input_scale(equalized.scales, name)
        out[name] = vector if scale is None else vector * np.square(scale)
    return out


def with_costs(table: CostTable, cost_of: Callable[[Component, Treatment], float]) -> CostTable:
    """The table with other costs, for the types that our own costs put on the convex hull: of
    the others there are no blocks."""
    treatments = []
    for c, ts, costs in zip(table.components, table.treatments, table.costs, strict=True):
        dense = [j for j, t in enumerate(ts) if not t.zero_share]
        hull = convex_hull([c.size_bytes(ts[j]) for j in dense], [costs[j] for j in dense])
        treatments.append(tuple(ts[dense[i]] for i in hull))
    return CostTable(
        table.components,
        tuple(treatments),
        tuple(
            tuple(cost_of(c, t) for t in ts)
            for c, ts in zip(table.components, treatments, strict=True)
        ),
        table.fixed_bytes,
    )


def weight_errors(run: Run, table: CostTable) -> dict[str, dict[str, float]]:
    """Component -> type -> summed squared error of the original weights, plainly rounded."""
    out: dict[str, dict[str, float]] = {}
    with run.stages("Weight errors", sum(c.weights for c in table.components)) as advance:
        for c, treatments in zip(table.components, table.treatments, strict=True):
            weights = run.checkpoint.hf_tensor(c.name + ".weight")
            types = {t.type for t in treatments}
            out[c.name] = {}
            for kind in sorted(types):
                error = treated_values(weights, Treatment(kind), None) - weights
                out[c.name][kind] = float(np.square(error, dtype=np.float64).sum())
            advance(c.weights)
    return out


def unaware_costs(
    run: Run, base: Base, reference: Reference, table: CostTable
) -> list[list[float]]:
    """Costs of plain rounding without importance, as if the inputs were not rounded. (The head's
    inputs still are: edge_costs has no such switch.)"""
    activations, _ = captures(run, base, reference)
    with run.stages("Gradients", len(activations.reference)) as advance:
        activations.capture(
            load_model(run.checkpoint, run.device), run.settings.source.seed, advance
        )
    costs = []
    with run.stages("Costs without activations", base.weights) as advance:
        for c, ts in zip(table.components, table.treatments, strict=True):
            weights = run.checkpoint.hf_tensor(c.name + ".weight")
            if c.in_block:
                costs.append(
                    component_costs(
                        activations, c, ts, weights, run.device, None, exact_inputs=True
                    )
                )
            else:
                tied = run.checkpoint.config.tied
                costs.append(edge_costs(activations, c, ts, weights, None, tied)[0])
            advance(c.weights)
    return costs


Blocks = export.Importance | export.Blocks
# What a variant's files are made with: its costs, the checkpoint, the blocks and their name.
Method = tuple[CostTable, Checkpoint, Blocks, str]


def method_of(costs: Costs) -> Method:
    return costs.table, costs.equalized, costs.encoded.encoded, costs.encoded.key


def methods(work: Bench, full: Method) -> dict[str, Method]:
    """The variants of the ablations, by what they are called in the tables."""
    run, reference, table = work.run, work.reference, full[0]
    out: dict[str, Method] = {}
    for title, changes in (
        ("without feedback", {"feedback": False}),
        ("without equalization", {"equalize": False}),
        ("without both", {"feedback": False, "equalize": False}),
    ):
        method = replace(run.settings.method, **changes)
        other = replace(run, settings=replace(run.settings, method=method))
        out[title] = method_of(measure_costs(other, work.base, reference))
    types = [[str(t) for t in ts] for ts in table.treatments]
    unaware = work.kept(
        "unaware", [types, full[3]], lambda: unaware_costs(run, work.base, reference, table)
    )
    out["without activations"] = (
        replace(table, costs=tuple(map(tuple, unaware))), run.checkpoint, {}, "plain",
    )  # fmt: skip
    errors = work.kept("errors", types, lambda: weight_errors(run, table))
    out["weight error as cost"] = (
        with_costs(table, lambda c, t: errors[c.name][t.type]), *full[1:],
    )  # fmt: skip
    return out


def ablations(
    work: Bench,
    full: Method,
    rows: Sequence[tuple[dict[str, Any], Candidate, Candidate]],
    vectors: Vectors,
    floor: BoolArray,
) -> list[dict[str, Any]]:
    """rows: for each size its JSON, our file and the best preset with importance matrix."""
    variants = methods(work, full) if rows else {}
    out = []
    for row, ours, best in rows:
        size, name = row["preset"], row["best_imatrix"]
        candidates = [("full method", ours, row["ours"]["smallest"])]
        for title, (table, checkpoint, blocks, blocks_name) in variants.items():
            plan, smallest = best_plan(table, row["limit_bytes"])
            made = work.ours(f"{size}: {title}", plan, checkpoint, blocks, blocks_name)
            candidates.append((title, made, smallest))
        candidates.append((f"{name} + im", best, False))
        equalized = full[1]
        if isinstance(equalized, EqualizedCheckpoint):
            changed = equalized_imatrix(vectors, equalized)
            made = work.preset(name, changed, equalized)
            candidates.append((f"{name} + im, equalized", made, False))
        masks = [work.mask(c.measured.record) for _, c, _ in candidates]
        for (title, made, smallest), mask in zip(candidates, masks, strict=True):
            ratio = above_floor(mask, masks[0], floor)
            out.append(
                {
                    "preset": size,
                    "variant": title,
                    "smallest": smallest,
                    **made.to_json(),
                    "sdt_ratio_to_full": ratio_json(ratio),
                }
            )
    return out


def bench(
    bundle: Path,
    model: Path,
    presets: list[str],
    ablation_sizes: list[str],
    threads: int | None,
    stages: Stages,
    types: Sequence[str] = DEFAULT_TYPES,
) -> dict[str, Any]:
    """Everything, as what --json writes. types: those our plans may use, as `compress` had them."""
    for name in presets:
        preset_ftype(name)
    lost = [n for n in ablation_sizes if n not in presets]
    if lost:
        raise EdgeDtmError(f"--ablations: {', '.join(lost)} must be among --presets too")
    settings = Settings(
        out=bundle,
        source=Source(model),
        goal=Goal(load_profile("raspberrypi"), types=tuple(types)),
    )
    run, base, reference = reopen_run(settings, stages, threads)
    reasons = {n: why_skipped(n, base.components) for n in presets}
    skipped = [{"preset": n, "reason": why} for n, why in reasons.items() if why]
    presets = [n for n in presets if not reasons[n]]
    for s in skipped:
        stages.note(f"{s['preset']} is skipped: {s['reason']}")
    if not presets:
        raise EdgeDtmError("no preset is left to compare with: name others with --presets")
    work = Bench(run, base, reference)
    for note in too_few(len(work.held_out)):
        stages.note(note)
    try:
        full = method_of(measure_costs(run, base, reference))
        table = full[0]
        # Read before the variants, which write it again.
        vectors, imatrix_tokens = load_imatrix(run.work.folder / f"imatrix-{run.key}.npz")
        calibration = reference.part(CALIBRATION)
        predictor = Predictor(calibration.margins, calibration.generated_lengths)
        lowest = noise_floor(run, reference).measurement
        floor = work.mask(lowest.record)
        files = {(n, im): work.preset(n, vectors if im else None) for n in presets for im in (0, 1)}
        results: list[dict[str, Any]] = []
        ours_of: dict[str, Candidate] = {}
        for name in presets:
            limit = min(files[name, 0].size_bytes, files[name, 1].size_bytes)
            plan, smallest = best_plan(table, limit)
            ours = ours_of[name] = work.ours(f"Ours at {name}'s size", plan, *full[1:])
            within = [k for k, f in files.items() if f.size_bytes <= limit]
            best = min(within, key=lambda k: (files[k].sdt, files[k].size_bytes))
            best_im = min(
                (k for k in within if k[1]), default=(name, 1), key=lambda k: files[k].sdt
            )
            mine, theirs = (work.mask(c.measured.record) for c in (ours, files[best]))
            results.append(
                {
                    "preset": name,
                    "limit_bytes": limit,
                    "plain": files[name, 0].to_json(),
                    "imatrix": files[name, 1].to_json(),
                    "ours": {**ours.to_json(), "plan_sha256": plan.hash, "smallest": smallest},
                    "predicted": predictor.predict(table.cost(plan)).to_json(),
                    "best": {
                        "preset": best[0],
                        "file": "imatrix" if best[1] else "plain",
                        **files[best].to_json(),
                    },
                    "best_imatrix": best_im[0],
                    "sdt_ratio": ratio_json(above_floor(mine, theirs, floor)),
                    "fdt_ratio": ratio_json(fdt_ratio(mine, theirs, work.lengths)),
                }
            )
        points = [(c.size_bytes, c.sdt) for c in ours_of.values()]
        for r in results:
            size = bytes_at(points, r["best"]["sdt"]["value"])
            r["our_bytes_at_equal_sdt"] = None if size is None else round(size)
            # Where even our smallest file diverges less, the saving is at least that much.
            smallest, least = min(points)
            r["our_smallest_bytes"] = smallest if least <= r["best"]["sdt"]["value"] else None
        left_out = ablations(
            work,
            full,
            [
                (r, ours_of[r["preset"]], files[r["best_imatrix"], 1])
                for r in results
                if r["preset"] in ablation_sizes
            ],
            vectors,
            floor,
        )
    finally:
        work.close()
    return {
        "schema_version": SCHEMA_VERSION,
        "model": reference.provenance["model"],
        "model_sha256": reference.provenance["model_sha256"],
        "packages": reference.provenance["packages"],
        "seed": run.settings.source.seed,
        "tokens_per_prompt": run.settings.source.tokens,
        "sequences": len(work.held_out),
        "positions": int(work.lengths.sum()),
        "calibration_sequences": len(calibration),
        "imatrix_tokens": imatrix_tokens,
        "f16_bytes": run.f16_bytes,
        "noise_floor": lowest.to_json(),
        "skipped": skipped,
        "presets": results,
        "ablations": left_out,
        "units": {"sdt": "share", "fdt": "tokens", "size": "bytes"},
    }


def _commands(args: argparse.Namespace, data: Mapping[str, Any]) -> list[str]:
    """How to make it again; folders by their names only, since they differ between machines."""

    def shown(path: Path) -> str:
        return shlex.quote(path.name if path.is_absolute() else str(path))

    name = shlex.quote(args.bundle.resolve().name)
    given = None if args.model is None else shlex.quote(args.model.resolve().name)
    options = [] if given is None else [f"--model {given}"]
    types = f" --types {args.types}" if args.types else ""
    options.append(f"--presets {shlex.quote(args.presets)}")
    options.append(f"--ablations {shlex.quote(args.ablations or 'none')}")
    options += [
        f"--{key} {shown(path)}"
        for key in ("out", "figure", "json")
        if (path := getattr(args, key)) is not None
    ]
    options += [f"--with {shown(path)}" for path in args.others]
    return [
        f"edge-dtm compress{'' if given is None else f' {given}'} -o {name} "
        f"--tokens {data['tokens_per_prompt']} --seed {data['seed']}{types}",
        f"python tools/bench_quality.py {name} {' '.join(options)}{types}",
    ]


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(p.strip() for p in text.split(",") if p.strip()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", metavar="WORK_BUNDLE", type=Path)
    parser.add_argument("--model", type=Path, help="HF folder or GGUF [default: SmolLM2]")
    parser.add_argument("--presets", default=DEFAULT_PRESETS, help=f"[default: {DEFAULT_PRESETS}]")
    parser.add_argument("--types", help="those `compress` was given [default: its default]")
    parser.add_argument(
        "--ablations",
        metavar="SIZES",
        help="presets at whose sizes the variants are measured, or none "
        f"[default: those of {DEFAULT_ABLATIONS} that are among --presets]",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of llama.cpp [default: all]")
    parser.add_argument("--json", type=Path, help="also write every figure as JSON")
    parser.add_argument("--out", type=Path, help="also write the tables as Markdown")
    parser.add_argument("--figure", type=Path, help="also draw size against SDT and FDT, as PNG")
    parser.add_argument(
        "--with",
        dest="others",
        metavar="OTHER.json",
        type=Path,
        action="append",
        default=[],
        help="add another model, from what --json wrote for it, to --out and --figure; repeatable",
    )
    args = parser.parse_args(argv)
    presets = _names(args.presets)
    if not presets:
        parser.error("--presets names none")
    if args.ablations is None:
        args.ablations = ",".join(n for n in _names(DEFAULT_ABLATIONS) if n in presets)
    types = _names(args.types) if args.types else list(DEFAULT_TYPES)
    if unknown := [t for t in types if t not in ALLOWED_TYPES]:
        parser.error(
            f"--types: {', '.join(unknown)} is unknown, known are {', '.join(ALLOWED_TYPES)}"
        )
    sizes = [] if args.ablations == "none" else _names(args.ablations)
    if args.others and args.out is None and args.figure is None:
        parser.error("--with needs --out or --figure")
    stages = Stages()
    try:
        for path in (args.json, args.out, args.figure):
            if path is not None and not path.parent.is_dir():
                raise EdgeDtmError(f"{path.parent} is no folder: make it or write elsewhere")
        others = [load_other(path) for path in args.others]
        data = bench(
            args.bundle, args.model or default_model_dir(), presets, sizes,
            args.threads, stages, types,
        )  # fmt: skip
    except EdgeDtmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    data["commands"] = _commands(args, data)
    console = Console()
    for table in terminal_tables(data):
        console.print(table)
    for note in notes(data):
        console.print(note, highlight=False, soft_wrap=True)
    if args.json is not None:
        args.json.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if args.figure is not None:
        draw([series(d) for d in (data, *others)], args.figure)
    if args.out is not None:
        link = None
        if args.figure is not None:
            link = Path(os.path.relpath(args.figure, args.out.parent)).as_posix()
        args.out.write_text(markdown([data, *others], link), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
