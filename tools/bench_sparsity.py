#!/usr/bin/env python
"""What zeros, removal and int8 cost in tokens and buy in bytes, memory and speed, in llama.cpp.

    python tools/bench_sparsity.py demo-bundle --out docs/sparsity-measured.md

Needs the work folder of a bundle that `edge-dtm compress` made (reference and prompts are taken
from there). Everything is made from the same checkpoint and replayed on the same held-out
sequences; what is known already is taken from the work folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.host.bought import ROUNDS, Weighed, weigh
from edge_dtm.host.stage_remove import measured_units, unit_options

from edge_dtm.core.files import digest_of
from edge_dtm.core.metrics import perplexity
from edge_dtm.core.paths import default_model_dir
from edge_dtm.core.progress import Stages
from edge_dtm.formats.plan import Plan, Treatment
from edge_dtm.formats.profile import load_profile
from edge_dtm.formats.reference import HELD_OUT, Reference
from edge_dtm.formats.transfer import packed_bytes
from edge_dtm.host import export, removal
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.compress import Pipeline
from edge_dtm.host.settings import Settings
from edge_dtm.report.summary import interval
from edge_dtm.search.allocation import least_divergent_share, search
from edge_dtm.search.structure import remove_share

LEVELS = (0.25, 0.5, 0.75)
INT8_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Row:
    """One GGUF: bytes of the file and after zstd; SDT, FDT and perplexity on the original's text,
    and its ratio to the original's own."""

    name: str
    file_bytes: int
    packed_bytes: int
    sdt: Mapping[str, float]
    fdt: Mapping[str, float]
    perplexity: float
    perplexity_ratio: float


class Bench:
    """Makes and replays GGUFs; each row is kept as a file."""

    def __init__(self, run: Pipeline, reference: Reference) -> None:
        self.run, self.reference = run, reference
        self.folder = run.work / "sparsity"
        self.folder.mkdir(exist_ok=True)
        held_out = reference.part(HELD_OUT)
        original = held_out.top_logits[:, :, 0] - held_out.log_normalizers
        self.original = perplexity(original, held_out.generated_lengths)

    def row(self, name: str, key: Any, make: Callable[[Path], None]) -> Row:
        """make: writes the GGUF."""
        saved = self.folder / f"{digest_of([self.run.key, key])}.json"
        if saved.is_file():
            return Row(**{**json.loads(saved.read_text()), "name": name})
        path = self.folder / "model.gguf"
        make(path)
        found = self.run.measure(path, self.reference, name)
        row = Row(
            name,
            path.stat().st_size,
            packed_bytes(path),
            found.divergence.sdt.to_json(),
            found.divergence.fdt.to_json(),
            found.perplexity,
            found.perplexity / self.original,
        )
        path.unlink()
        saved.write_text(json.dumps(asdict(row)))
        return row

    def plan(self, name: str, plan: Plan, shipped: Any, checkpoint: Checkpoint) -> Row:
        """A plan with the blocks that its costs were measured with."""

        def make(path: Path) -> None:
            self.run.fit_plan_zeros(plan, shipped, self.reference)
            export.export_gguf(checkpoint, plan, path, shipped.blocks)

        return self.row(name, [plan.hash, shipped.folder.name], make)


def uniform(run: Pipeline, type_name: str, zero_share: float) -> Plan:
    """All block matrices with the same zeros; embedding and head without."""
    kinds = tuple(Treatment(type_name, zero_share if c.in_block else 0.0) for c in run.components)
    return Plan(run.components, kinds, run.fixed_bytes)


def masks(bench: Bench) -> list[Row]:
    """Uniform and allocated masks, in F16 and Q8_0, and the plain score |W|·||x|| beside them."""
    run = bench.run
    table, shipped = run.costs(bench.reference)
    vectors, _ = run.imatrix()
    rows = []
    for level in LEVELS:
        plain = uniform(run, "F16", level)
        rows.append(
            bench.row(
                f"F16, {level:.0%} zeros, uniform, |W|·‖x‖ and nothing else",
                [plain.hash, "plain"],
                lambda path, plan=plain: export.export_gguf(  # type: ignore[misc]
                    run.checkpoint, plan, path, vectors
                ),
            )
        )
        for kind in ("F16", "Q8_0"):
            plan = uniform(run, kind, level)
            rows.append(
                bench.plan(
                    f"{kind}, {level:.0%} zeros, uniform, fitted", plan, shipped, run.equalized
                )
            )
            some = table.restricted((kind,), sparse=True)
            plan = search(some, some.fixed_bytes + 2 * run.f16_bytes, level)
            rows.append(
                bench.plan(
                    f"{kind}, {level:.0%} zeros, allocated, fitted", plan, shipped, run.equalized
                )
            )
    dense = uniform(run, "Q8_0", 0.0)
    rows.append(bench.plan("Q8_0, no zeros", dense, shipped, run.equalized))
    return rows


def wire(run: Pipeline) -> list[str]:
    """File bytes, and bytes that travel, against the share of zeros in Q8_0; Markdown. Zeros by
    |W|·||x|| and nothing else, since what the other weights are does not matter here."""
    vectors, _ = run.imatrix()
    path = run.work / "wire.gguf"
    lines = [
        "| zeros in the block matrices, all in Q8_0 | file MB | after zstd MB | ratio |",
        "|---|---:|---:|---:|",
    ]
    for share in (0.0, *LEVELS):
        export.export_gguf(run.checkpoint, uniform(run, "Q8_0", share), path, vectors)
        size, packed = path.stat().st_size, packed_bytes(path)
        lines.append(
            f"| {share:.0%} | {size / 1e6:.1f} | {packed / 1e6:.1f} | {packed / size:.3f} |"
        )
        path.unlink()
    return [*lines, ""]


def int8(bench: Bench, run: Pipeline) -> list[Row]:
    """The paper's int8 experiment: shares of the components in Q8_0, plainly rounded."""
    table, shipped = run.costs(bench.reference)
    rows = []
    for share in (0.0, *INT8_SHARES):
        plan = least_divergent_share(table, "Q8_0", "F16", share)
        rows.append(
            bench.row(
                f"{share:.0%} of the components in Q8_0, the rest F16",
                [plan.hash, shipped.folder.name],
                lambda path, plan=plan: export.export_gguf(  # type: ignore[misc]
                    run.equalized, plan, path, shipped.blocks
                ),
            )
        )
    return rows


def removals(bench: Bench, shares: tuple[float, ...]) -> tuple[list[Row], dict[str, Weighed]]:
    """Smaller dense models without recovery, and bytes, memory and speed of each beside the whole
    model's."""
    run, checkpoint = bench.run, bench.run.checkpoint
    units, calibration = measured_units(run, bench.reference), run.captures(bench.reference)[1]
    rows, files = [], {}
    whole = export.f16_plan(checkpoint, export.fixed_bytes(checkpoint))
    files["whole"] = bench.folder / "whole.gguf"
    export.export_gguf(checkpoint, whole, files["whole"], {})
    for share in shares:
        chosen = remove_share(unit_options(checkpoint, units, run.s.types), share)
        kept = {(int(n.split(".")[0]), n.split(".")[1]): k for n, k in chosen.items()}
        file = bench.folder / f"removed-{share}.safetensors"
        reduced = removal.reduce(checkpoint, units, kept, calibration, {}, file, run.torch_device)
        plan = export.f16_plan(reduced, export.fixed_bytes(reduced))
        name = f"F16, {share:.0%} removed"
        files[name] = bench.folder / f"removed-{share}.gguf"
        export.export_gguf(reduced, plan, files[name], {})
        rows.append(
            bench.row(
                name,
                [reduced.check(), "removed"],
                lambda path, source=files[name]: path.write_bytes(source.read_bytes()),  # type: ignore[misc]
            )
        )
        file.unlink()
    with run.stages("Memory and speed", ROUNDS) as advance:
        weighed = weigh(files, run.run_settings, advance)
    for path in files.values():
        path.unlink()
    return rows, weighed


def table_of(rows: list[Row]) -> list[str]:
    """Markdown."""
    return [
        "| | file MB | after zstd MB | SDT | mean FDT | perplexity | ratio to the original's |",
        "|---|---:|---:|---|---|---:|---:|",
        *(
            f"| {r.name} | {r.file_bytes / 1e6:.1f} | {r.packed_bytes / 1e6:.1f} | "
            f"{interval(r.sdt, True)} | {interval(r.fdt, False)} | {r.perplexity:.4f} | "
            f"{r.perplexity_ratio:.4f} |"
            for r in rows
        ),
        "",
    ]


def weighed_table(weighed: Mapping[str, Weighed]) -> list[str]:
    """Markdown; ratios to the first."""
    first = next(iter(weighed.values()))
    return [
        "| | file MB | ratio | peak memory MB | decoding tokens/s | ratio |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {w.file_bytes / 1e6:.1f} | {w.file_bytes / first.file_bytes:.3f} | "
            f"{w.peak_rss_bytes / 1e6:.0f} | {w.decode_tokens_per_s:.1f} "
            f"({w.slowest_decode_tokens_per_s:.1f} to {w.fastest_decode_tokens_per_s:.1f}) | "
            f"{w.decode_tokens_per_s / first.decode_tokens_per_s:.3f} |"
            for name, w in weighed.items()
        ),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, default=default_model_dir())
    parser.add_argument("--out", type=Path, default=Path("sparsity.md"))
    parser.add_argument("--parts", default="wire,masks,int8,removal", help="which to measure")
    parser.add_argument("--removed", default="0.05,0.1,0.2", help="shares to remove")
    args = parser.parse_args()
    stages, parts = Stages(), args.parts.split(",")
    settings = Settings(
        model=args.model,
        out=args.bundle,
        profile=load_profile("raspberrypi"),
        types=("F16", "Q8_0"),
        zero_share=0.5,
    )
    run, reference = Pipeline.reopen(settings, stages)
    run.keep_activations = True
    bench = Bench(run, reference)
    lines = [
        f"# Zeros, removal and int8: {run.checkpoint.config.name}",
        "",
        f"Held-out sequences: {len(reference.part(HELD_OUT))}; the original's own perplexity on "
        f"its text: {bench.original:.4f}. Without any training. Made by tools/bench_sparsity.py.",
        "",
    ]
    if "masks" in parts:
        lines += ["## Zeros", "", *table_of(masks(bench))]
    if "wire" in parts:
        lines += ["## Bytes that travel", "", *wire(run)]
    if "int8" in parts:
        plain, _ = Pipeline.reopen(
            Settings(
                model=args.model,
                out=args.bundle,
                profile=settings.profile,
                types=("F16", "Q8_0"),
                equalize=False,
                feedback=False,
            ),
            stages,
        )
        plain.keep_activations = True
        lines += ["## int8", "", *table_of(int8(bench, plain))]
    if "removal" in parts:
        rows, weighed = removals(bench, tuple(float(s) for s in args.removed.split(",")))
        lines += ["## Removal", "", *table_of(rows), *weighed_table(weighed)]
    temporary = args.out.with_name(args.out.name + ".tmp")
    temporary.write_text("\n".join(lines), encoding="utf-8")
    temporary.replace(args.out)
    stages.note(f"written: {args.out}")


if __name__ == "__main__":
    main()
