"""Ours against llama.cpp's own presets (Q4_K_M and the like) at equal file size.

For each preset llama.cpp's quantizer makes a GGUF from an F32 export of the original model, once
plain and once with its importance matrix ("im"). Our search then gets the size of that file as its
limit. llama.cpp replays all of them teacher-forced on all held-out sequences, which neither the
costs nor the importance have seen. What ours is held against at a size is the preset file of least
SDT, plain or im, that is no larger. The ratio (our SDT - noise floor) / (its SDT - noise floor)
comes with a 95 % bootstrap interval, sequences being resampled together for all three files.
How many bytes fewer ours takes at equal SDT is read off the line through our measured points, size
against the logarithm of SDT.

At the sizes of --ablations parts of the method are left out or replaced, one at a time.

WORK_BUNDLE is a folder that `edge-dtm compress MODEL -o WORK_BUNDLE` made; its `work` folder gives
the reference, the costs, the blocks and the importance. Output: Markdown, with --figure a picture,
with --json every figure. The answers of llama.cpp stay in WORK_BUNDLE/work/bench, so that a second
run is quick; GGUF files are removed once they are measured.

    python tools/bench_quality.py WORK_BUNDLE --out docs/quality.md --figure docs/quality.png \\
        --json quality.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# The script also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_quality_files import (
    Candidate,
    Files,
    Vectors,
    best_plan,
    equalized_imatrix,
    preset_ftype,
    why_skipped,
)
from bench_quality_text import (
    SCHEMA_VERSION,
    load_other,
    markdown,
    section,
    series,
    too_few,
)

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import default_model_dir
from edge_dtm.core.metrics import BoolArray, Interval, bootstrap, first_divergent_tokens
from edge_dtm.core.progress import Stages
from edge_dtm.formats.ggml_types import ALLOWED_TYPES, DEFAULT_TYPES
from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.formats.profile import load_profile
from edge_dtm.formats.reference import CALIBRATION, load_imatrix
from edge_dtm.host.blocks.costs import Costs, measure_costs
from edge_dtm.host.checkpoint.derived import EqualizedCheckpoint
from edge_dtm.host.measure import noise_floor
from edge_dtm.host.prepare import reopen_run
from edge_dtm.host.quantize.treat import treated_values
from edge_dtm.host.settings import Goal, Settings, Source
from edge_dtm.host.values import Run
from edge_dtm.report.frontier import draw
from edge_dtm.search.cost_table import CostTable, Predictor

DEFAULT_PRESETS = "Q3_K_M,IQ4_NL,Q4_0,Q4_K_M,Q5_K_M,Q6_K,Q8_0"
DEFAULT_ABLATIONS = "Q4_K_M,Q6_K"


# --- statistics -------------------------------------------------------------------------------


def above_floor(mask: BoolArray, other: BoolArray, floor: BoolArray) -> Interval:
    """(SDT(mask) - SDT(floor)) / (SDT(other) - SDT(floor)) on the same sequences, resampled
    together. Infinite where `other` diverges no more than the floor."""
    base = floor.sum(axis=1)
    return _paired(mask.sum(axis=1) - base, other.sum(axis=1) - base)


def fdt_ratio(mask: BoolArray, other: BoolArray, lengths: Any) -> Interval:
    """Mean FDT(mask) / mean FDT(other), sequences resampled together."""
    ours, theirs = (first_divergent_tokens(m, lengths) for m in (mask, other))
    return _paired(ours, theirs)


def _paired(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> Interval:
    def ratio(index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        drawn = theirs[index].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(drawn > 0, ours[index].sum(axis=1) / drawn, np.inf)

    low, high = bootstrap(ratio, len(ours))
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


# --- ablations --------------------------------------------------------------------------------

# What a variant's plans are chosen by, and what their bytes are made with.
Method = tuple[CostTable, Costs]


def with_costs(table: CostTable, cost_of: Callable[[Component, Treatment], float]) -> CostTable:
    costs = tuple(
        tuple(cost_of(c, t) for t in ts)
        for c, ts in zip(table.components, table.treatments, strict=True)
    )
    return replace(table, costs=costs)


def weight_error(run: Run, component: Component, treatment: Treatment) -> float:
    """Summed squared error of the original weights, plainly rounded."""
    weights = run.checkpoint.hf_tensor(component.name + ".weight")
    error = treated_values(weights, Treatment(treatment.type), None) - weights
    return float(np.square(error, dtype=np.float64).sum())


def methods(files: Files, full: Method) -> dict[str, Method]:
    """The variants of the ablations, by what they are called in the tables."""
    run = files.run
    out: dict[str, Method] = {}
    for title, changes in (
        ("without feedback", {"feedback": False}),
        ("without equalization", {"equalize": False}),
        ("without both", {"feedback": False, "equalize": False}),
    ):
        method = replace(run.settings.method, **changes)
        other = replace(run, settings=replace(run.settings, method=method))
        costs = measure_costs(other, files.base, files.reference)
        out[title] = costs.table, costs
    by_error = with_costs(full[0], lambda c, t: weight_error(run, c, t))
    out["weight error as cost"] = by_error, full[1]
    return out


def ablations(
    files: Files,
    full: Method,
    rows: Sequence[tuple[dict[str, Any], Candidate, Candidate]],
    vectors: Vectors,
    floor: BoolArray,
) -> list[dict[str, Any]]:
    """rows: for each size its JSON, our file and the best preset with importance matrix."""
    variants = methods(files, full) if rows else {}
    out = []
    for row, ours, best in rows:
        size, name = row["preset"], row["best_imatrix"]
        candidates = [("full method", ours, row["ours"]["smallest"])]
        for title, (table, costs) in variants.items():
            plan, smallest = best_plan(table, row["limit_bytes"])
            candidate = files.ours(f"{size}: {title}", plan, costs)
            candidates.append((title, candidate, smallest))
        candidates.append((f"{name} + im", best, False))
        equalized = full[1].equalized
        if isinstance(equalized, EqualizedCheckpoint):
            candidate = files.preset(name, equalized_imatrix(vectors, equalized), equalized)
            candidates.append((f"{name} + im, equalized", candidate, False))
        out += [
            {
                "preset": size,
                "variant": title,
                "smallest": smallest,
                **candidate.to_json(),
                "sdt_ratio_to_full": ratio_json(above_floor(candidate.mask, ours.mask, floor)),
            }
            for title, candidate, smallest in candidates
        ]
    return out


# --- the comparison ---------------------------------------------------------------------------


def compare_sizes(
    files: Files, presets: Sequence[str], full: Method, vectors: Vectors, floor: BoolArray
) -> list[tuple[dict[str, Any], Candidate, Candidate]]:
    """For each preset its row of --json, our file and the best preset with importance matrix."""
    theirs = {(n, im): files.preset(n, vectors if im else None) for n in presets for im in (0, 1)}
    calibration = files.reference.part(CALIBRATION)
    predictor = Predictor(calibration.margins, calibration.generated_lengths)
    rows = []
    for name in presets:
        limit = min(theirs[name, 0].size_bytes, theirs[name, 1].size_bytes)
        plan, smallest = best_plan(full[0], limit)
        ours = files.ours(f"Ours at {name}'s size", plan, full[1])
        within = [k for k, f in theirs.items() if f.size_bytes <= limit]
        best = min(within, key=lambda k: (theirs[k].sdt, theirs[k].size_bytes))
        best_im = min((k for k in within if k[1]), default=(name, 1), key=lambda k: theirs[k].sdt)
        mask, lengths = theirs[best].mask, files.held_out.generated_lengths
        row = {
            "preset": name,
            "limit_bytes": limit,
            "plain": theirs[name, 0].to_json(),
            "imatrix": theirs[name, 1].to_json(),
            "ours": {**ours.to_json(), "plan_sha256": plan.hash, "smallest": smallest},
            "predicted": predictor.predict(full[0].cost(plan)).to_json(),
            "best": {
                "preset": best[0],
                "file": "imatrix" if best[1] else "plain",
                **theirs[best].to_json(),
            },
            "best_imatrix": best_im[0],
            "sdt_ratio": ratio_json(above_floor(ours.mask, mask, floor)),
            "fdt_ratio": ratio_json(fdt_ratio(ours.mask, mask, lengths)),
        }
        rows.append((row, ours, theirs[best_im]))
    points = [(ours.size_bytes, ours.sdt) for _, ours, _ in rows]
    smallest_bytes, highest = min(points)
    for row, _, _ in rows:
        wanted = row["best"]["sdt"]["value"]
        size = bytes_at(points, wanted)
        row["our_bytes_at_equal_sdt"] = None if size is None else round(size)
        # Where even our smallest file diverges less, the saving is at least that much.
        row["our_smallest_bytes"] = smallest_bytes if highest <= wanted else None
    return rows


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
    if lost := [n for n in ablation_sizes if n not in presets]:
        raise EdgeDtmError(f"--ablations: {', '.join(lost)} must be among --presets too")
    goal = Goal(load_profile("raspberrypi"), types=tuple(types))
    run, base, reference = reopen_run(Settings(bundle, Source(model), goal), stages, threads)
    reasons = {n: why_skipped(n, base.components) for n in presets}
    skipped = [{"preset": n, "reason": why} for n, why in reasons.items() if why]
    presets = [n for n in presets if not reasons[n]]
    if not presets:
        raise EdgeDtmError("no preset is left to compare with: name others with --presets")
    files = Files(run, base, reference)
    for note in too_few(len(files.held_out)):
        stages.note(note)
    try:
        costs = measure_costs(run, base, reference)
        full = costs.table, costs
        # Read before the variants, which write it again.
        vectors, imatrix_tokens = load_imatrix(run.work.folder / f"imatrix-{run.key}.npz")
        lowest = noise_floor(run, reference)
        floor = files.mask(lowest.measurement.record)
        rows = compare_sizes(files, presets, full, vectors, floor)
        ablated = [row for row in rows if row[0]["preset"] in ablation_sizes]
        variants = ablations(files, full, ablated, vectors, floor)
    finally:
        files.close()
    return {
        "schema_version": SCHEMA_VERSION,
        "model": reference.provenance["model"],
        "model_sha256": reference.provenance["model_sha256"],
        "packages": reference.provenance["packages"],
        "seed": run.settings.source.seed,
        "tokens_per_prompt": run.settings.source.tokens,
        "sequences": len(files.held_out),
        "positions": int(files.held_out.generated_lengths.sum()),
        "imatrix_tokens": imatrix_tokens,
        "f16_bytes": run.f16_bytes,
        "noise_floor": lowest.measurement.to_json(),
        "skipped": skipped,
        "presets": [row for row, _, _ in rows],
        "ablations": variants,
        "units": {"sdt": "share", "fdt": "tokens", "size": "bytes"},
    }


# --- the command line -------------------------------------------------------------------------


def _commands(
    arguments: Sequence[str], args: argparse.Namespace, data: Mapping[str, Any]
) -> list[str]:
    """How to make it again; folders by their names only, since they differ between machines."""
    short = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    compress = ["edge-dtm", "compress", *([args.model.name] if args.model else [])]
    compress += ["-o", args.bundle.resolve().name]
    compress += ["--tokens", str(data["tokens_per_prompt"]), "--seed", str(data["seed"])]
    compress += ["--types", ",".join(args.types)] if args.types else []
    return [shlex.join(compress), shlex.join(["python", "tools/bench_quality.py", *short])]


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(p.strip() for p in text.split(",") if p.strip()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("bundle", metavar="WORK_BUNDLE", type=Path)
    add("--model", type=Path, help="HF folder or GGUF [default: SmolLM2]")
    add("--presets", type=_names, default=DEFAULT_PRESETS, help="[default: %(default)s]")
    add("--types", type=_names, help="those `compress` was given [default: its default]")
    add(
        "--ablations",
        metavar="SIZES",
        type=_names,
        help="presets at whose sizes the variants are measured, or none "
        f"[default: those of {DEFAULT_ABLATIONS} that are among --presets]",
    )
    add("--threads", type=int, help="CPU threads of llama.cpp [default: all]")
    add("--json", type=Path, help="also write every figure as JSON")
    add("--out", type=Path, help="write the tables there, not to the terminal")
    add("--figure", type=Path, help="also draw size against SDT and FDT, as PNG")
    add(
        "--with",
        dest="others",
        metavar="OTHER.json",
        type=Path,
        action="append",
        default=[],
        help="add another model, from what --json wrote for it, to --out and --figure; repeatable",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(arguments)
    types = args.types or list(DEFAULT_TYPES)
    if unknown := [t for t in types if t not in ALLOWED_TYPES]:
        parser.error(
            f"--types: {', '.join(unknown)} is unknown, known are {', '.join(ALLOWED_TYPES)}"
        )
    if args.ablations is None:
        args.ablations = [n for n in _names(DEFAULT_ABLATIONS) if n in args.presets]
    sizes = [] if args.ablations == ["none"] else args.ablations
    try:
        for path in (args.json, args.out, args.figure):
            if path is not None and not path.parent.is_dir():
                raise EdgeDtmError(f"{path.parent} is no folder: make it or write elsewhere")
        others = [load_other(path) for path in args.others]
        data = bench(
            args.bundle, args.model or default_model_dir(), args.presets, sizes,
            args.threads, Stages(), types,
        )  # fmt: skip
    except EdgeDtmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    data["commands"] = _commands(arguments, args, data)
    if args.json is not None:
        args.json.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if args.figure is not None:
        draw([series(d) for d in (data, *others)], args.figure)
    if args.out is None:
        print("\n".join(section(data)))
    else:
        link = None
        if args.figure is not None:
            link = Path(os.path.relpath(args.figure, args.out.parent)).as_posix()
        args.out.write_text(markdown([data, *others], link), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
