"""Ours against llama.cpp's own presets (Q4_K_M and the like) at equal file size.

For each preset llama.cpp's quantizer makes a GGUF from an F32 export of the model, once plain and
once with our importance vectors as its imatrix. Our search then gets the size of that file as its
limit. All three are replayed teacher-forced in llama.cpp on all held-out sequences, which neither
the costs nor the importance vectors have seen. The SDT ratio ours / preset with imatrix comes
with a 95 % bootstrap interval, sequences being resampled together for both.

WORK_BUNDLE is a folder that `edge-dtm compress MODEL -o WORK_BUNDLE` made; its `work` folder gives
the reference, the costs and the importance vectors. Output: a table on the terminal, with --out as
Markdown, with --json every figure. What was measured stays in WORK_BUNDLE/work/bench, so that a
second run is quick; GGUF files are removed once they are measured.

    python tools/bench_quality.py WORK_BUNDLE --out docs/quality.md --json quality.json
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

# The script also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.device.runner import Record, RunSettings, _error_text, _last_errors, _library
from edge_dtm.errors import EdgeDtmError
from edge_dtm.host import export
from edge_dtm.host.checkpoint import open_checkpoint
from edge_dtm.host.compress import Measured, Settings, _key, _Run
from edge_dtm.host.model import choose_device
from edge_dtm.inspect import describe
from edge_dtm.metrics import divergent_mask, paired_ratio_interval
from edge_dtm.paths import default_model_dir
from edge_dtm.plan import uniform
from edge_dtm.profiles import load_profile
from edge_dtm.progress import Stages
from edge_dtm.reference import CALIBRATION, HELD_OUT, Reference
from edge_dtm.report import interval
from edge_dtm.search import Predictor, search

DEFAULT_PRESETS = "Q4_K_M,Q5_K_M,Q6_K,Q8_0"


def open_run(
    bundle: Path, model: Path, stages: Stages, threads: int | None = None, device: str = "auto"
) -> tuple[_Run, Reference]:
    """The stages of `compress` on the work folder of an earlier run, and that run's reference.

    Seed, tokens and prompts are the earlier run's: they are in its reference, whose file name
    holds the key under which the work folder keeps everything else.
    """
    if not model.exists():
        raise EdgeDtmError(
            f"{model} is not there: give --model, or run python tools/make_smollm2.py"
        )
    checkpoint = open_checkpoint(model)
    with stages(
        "Checking the checkpoint", sum(c.weights for c in checkpoint.components())
    ) as advance:
        sha256 = checkpoint.check(advance)
    found = []
    for path in (bundle / "work").glob("reference-*.npz"):
        reference = Reference.load(path)
        if reference.provenance.get("model_sha256") == sha256:
            found.append((path.stat().st_mtime, path, reference))
    if not found:
        raise EdgeDtmError(
            f"{bundle / 'work'} holds no reference of {model.name}: run edge-dtm compress first, "
            "with the same model, and keep its work folder"
        )
    _, path, reference = max(found, key=lambda f: f[0])
    if len(found) > 1:
        stages.note(f"{len(found)} references of this model in the work folder: newest taken")
    settings = Settings(
        model=model,
        out=bundle,
        profile=load_profile("raspberrypi"),
        tokens=int(reference.provenance["tokens"]),
        seed=int(reference.provenance["seed"]),
        device=device,
    )
    run = _Run(settings, stages)
    # What run.prepare() sets, but without the prompts and the budget: those are settled.
    run.torch_device, run.checkpoint = choose_device(device), checkpoint
    run.components = checkpoint.components()
    run.fixed_bytes = export.fixed_bytes(checkpoint)
    run.f16_bytes = export.f16_plan(checkpoint, run.fixed_bytes).size_bytes
    run.key = path.stem.removeprefix("reference-")
    if threads is not None:
        run.threads, run.run_settings = threads, RunSettings(threads=threads)
    return run, reference


@dataclass(frozen=True)
class Candidate:
    """One GGUF: how large, of which tensor types, and how it did on the held-out sequences."""

    size_bytes: int
    types: Mapping[str, int]
    sha256: str
    measured: Measured

    def to_json(self) -> dict[str, Any]:
        return {
            "size_bytes": self.size_bytes,
            "tensors_of_type": dict(self.types),
            "gguf_sha256": self.sha256,
            **self.measured.divergence.to_json(),
            "perplexity": self.measured.perplexity,
        }


class Bench:
    """Makes GGUFs and measures them; each file and each record once."""

    def __init__(self, run: _Run, reference: Reference, importance: export.Importance) -> None:
        self.run, self.reference, self.importance = run, reference, importance
        self.held_out = reference.part(HELD_OUT)
        self.folder = run.work / "bench"
        self.folder.mkdir(exist_ok=True)
        self.weights = sum(c.weights for c in run.components)
        self.common = {
            "model": run.checkpoint.check(),
            "packages": export.provenance(run.checkpoint)["packages"],
            "fixed_bytes": run.fixed_bytes,
            "importance": {
                k: hashlib.sha256(np.ascontiguousarray(v).data).hexdigest()
                for k, v in importance.items()
                if v is not None
            },
        }
        self.source = self.folder / f"f32-{_key(self.common)}.gguf"

    def candidate(self, title: str, what: Any, make: Callable[[Path], None]) -> Candidate:
        """what: JSON that, with the model and the importance vectors, settles the file's bytes."""
        made = self.folder / f"made-{_key([self.common, what])}.json"
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
                    measured = self.run.measure(gguf, self.reference, f"{title}: replay")
                    measured.record.save(record)
                temporary = made.with_suffix(".tmp")
                temporary.write_text(json.dumps(facts))
                temporary.replace(made)
            finally:
                gguf.unlink(missing_ok=True)
        measured = self.run._judge(Record.load(record), self.held_out)
        return Candidate(facts["size_bytes"], facts["types"], facts["sha256"], measured)

    def _record(self, sha256: str) -> Path:
        settings = {k: v for k, v in self.run.run_settings.to_json().items() if k != "threads"}
        llama = self.common["packages"]["llama-cpp-python"]
        return self.folder / f"record-{_key([sha256, self.run.key, settings, llama])}.npz"

    def preset(self, name: str, imatrix: bool) -> Candidate:
        title = f"{name}{' with imatrix' if imatrix else ''}"
        return self.candidate(
            title, ["preset", name, imatrix], partial(self._quantize, name, imatrix)
        )

    def ours(self, title: str, plan: Any) -> Candidate:
        def make(path: Path) -> None:
            with self.run.stages(f"{title}: export", self.weights) as advance:
                export.export_gguf(self.run.checkpoint, plan, path, self.importance, advance)

        return self.candidate(title, ["plan", plan.hash], make)

    def _quantize(self, name: str, imatrix: bool, path: Path) -> None:
        if not self.source.is_file():
            plan = uniform(self.run.components, "F32", self.run.fixed_bytes)
            with self.run.stages("Exporting F32", self.weights) as advance:
                export.export_gguf(self.run.checkpoint, plan, self.source, {}, advance)
        lib = _library()  # sends llama.cpp's log elsewhere
        params = lib.llama_model_quantize_default_params()
        params.ftype, params.nthread = preset_ftype(name), self.run.threads
        params.allow_requantize = False
        vectors = {k: np.ascontiguousarray(v) for k, v in self.importance.items() if v is not None}
        if imatrix:
            entries = (lib.llama_model_imatrix_data * (len(vectors) + 1))()  # the last: no name
            for entry, (key, data) in zip(entries, vectors.items(), strict=False):
                entry.name = f"{key}.weight".encode()
                entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                entry.size = data.size
            params.imatrix = ctypes.cast(entries, type(params.imatrix))
        _last_errors.clear()
        with self.run.stages(f"{name}{' with imatrix' if imatrix else ''}: quantize", 1) as advance:
            code = lib.llama_model_quantize(
                os.fsencode(self.source), os.fsencode(path), ctypes.byref(params)
            )
            advance(1)
        if code:
            raise EdgeDtmError(f"llama.cpp could not make a {name} of this model{_error_text()}")

    def close(self) -> None:
        self.source.unlink(missing_ok=True)


def preset_ftype(name: str) -> int:
    value = getattr(_library(), f"LLAMA_FTYPE_MOSTLY_{name}", None)
    if value is None:
        raise EdgeDtmError(f"llama.cpp has no preset {name!r}; known are Q4_K_M, Q5_K_S, Q8_0, ...")
    return int(value)


def bench(
    bundle: Path, model: Path, presets: list[str], threads: int | None, stages: Stages
) -> Any:
    """Everything, as what --json writes."""
    for name in presets:
        preset_ftype(name)
    run, reference = open_run(bundle, model, stages, threads)
    table, importance = run.costs(reference)
    calibration = reference.part(CALIBRATION)
    predictor = Predictor(calibration.margins, calibration.generated_lengths)
    floor = run.noise_floor(reference, importance)
    held_out = reference.part(HELD_OUT)
    results = []
    work = Bench(run, reference, importance)
    try:
        for name in presets:
            plain, matrix = work.preset(name, False), work.preset(name, True)
            plan = search(table, min(plain.size_bytes, matrix.size_bytes))
            ours = work.ours(f"Ours at {name}'s size", plan)
            masks = [
                divergent_mask(
                    held_out.generated_ids, c.measured.record.ids, held_out.generated_lengths
                )
                for c in (ours, matrix, plain)
            ]
            ratio, plain_ratio = (
                paired_ratio_interval(masks[0], m, held_out.generated_lengths) for m in masks[1:]
            )
            results.append(
                {
                    "preset": name,
                    "plain": plain.to_json(),
                    "imatrix": matrix.to_json(),
                    "ours": {**ours.to_json(), "plan_sha256": plan.hash},
                    "predicted": predictor.predict(table.cost(plan)).to_json(),
                    "sdt_ratio_to_imatrix": ratio.to_json(),
                    "sdt_ratio_to_plain": plain_ratio.to_json(),
                }
            )
    finally:
        work.close()
    return {
        "model": reference.provenance["model"],
        "model_sha256": reference.provenance["model_sha256"],
        "packages": reference.provenance["packages"],
        "seed": run.s.seed,
        "tokens_per_prompt": run.s.tokens,
        "sequences": len(held_out),
        "positions": int(held_out.generated_lengths.sum()),
        "calibration_sequences": len(calibration),
        "f16_bytes": run.f16_bytes,
        "noise_floor": floor,
        "presets": results,
        "units": {"sdt": "share", "fdt": "tokens", "size": "bytes"},
    }


HEAD = (
    "preset", "bytes", "preset SDT", "FDT", "preset+im SDT", "FDT", "our bytes", "our SDT", "FDT",
    "predicted SDT", "SDT ratio ours / preset+im",
)  # fmt: skip
FILES = (("plain", "preset"), ("imatrix", "preset+im"), ("ours", "ours"))


def rows(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    out = []
    for r in data["presets"]:
        cells = [r["preset"], f"{r['imatrix']['size_bytes']:,}"]
        for key in ("plain", "imatrix", "ours"):
            if key == "ours":
                cells.append(f"{r['ours']['size_bytes']:,}")
            cells += [f"{r[key]['sdt']['value']:.2%}", f"{r[key]['fdt']['value']:.1f}"]
        q = r["sdt_ratio_to_imatrix"]
        cells.append(f"{r['predicted']['sdt']:.2%}")
        cells.append(ratio_text(q))
        out.append(tuple(cells))
    return out


def terminal_table(data: Mapping[str, Any]) -> Table:
    """A line a file, so that it fits 80 columns."""
    table = Table(box=None, pad_edge=False)
    heads = ("preset", "file", "bytes", "SDT", "FDT", "predicted\nSDT", "SDT ratio\nours / this")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i > 1 else "left", no_wrap=True)
    for r in data["presets"]:
        for key, title in FILES:
            q = r.get(f"sdt_ratio_to_{key}")
            table.add_row(
                r["preset"] if key == "plain" else "",
                title,
                f"{r[key]['size_bytes']:,}",
                f"{r[key]['sdt']['value']:.2%}",
                f"{r[key]['fdt']['value']:.1f}",
                f"{r['predicted']['sdt']:.2%}" if key == "ours" else "",
                ratio_text(q) if q else "",
                end_section=key == "ours",
            )
    return table


def ratio_text(q: Mapping[str, float]) -> str:
    return f"{q['value']:.2f} ({q['low']:.2f} to {q['high']:.2f})"


def notes(data: Mapping[str, Any]) -> list[str]:
    f = data["noise_floor"]
    return [
        f"Noise floor (F16 in llama.cpp, {data['f16_bytes']:,} bytes): SDT {interval(f['sdt'], True)}, "
        f"mean FDT {interval(f['fdt'], False)}.",
        f"{data['sequences']} held-out sequences, {data['positions']:,} generated tokens, at most "
        f"{data['tokens_per_prompt']} a sequence; brackets: 95 % bootstrap over sequences.",
    ]


def markdown(data: Mapping[str, Any], commands: list[str]) -> str:
    packages = ", ".join(f"{k} {v}" for k, v in data["packages"].items())
    lines = [
        f"# {data['model']}: ours against llama.cpp's presets at equal size",
        "",
        "SDT: share of tokens whose argmax differs from the original's, smaller is better. FDT: "
        "mean position of the first that differs, larger is better. im: llama.cpp's quantizer was "
        "given our importance vectors as its imatrix. Ours: the best plan the search finds in the "
        "preset's file size. A ratio below 1 means fewer divergent tokens than the preset.",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|---|{'---:|' * (len(HEAD) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows(data)),
        "",
        *(line for note in notes(data) for line in (note, "")),
        "Intervals of each SDT and mean FDT:",
        "",
        "| preset | file | SDT | mean FDT | tensors of each type |",
        "|---|---|---:|---:|---|",
    ]
    for r in data["presets"]:
        for key, title in FILES:
            kinds = sorted(r[key]["tensors_of_type"].items(), key=lambda item: -item[1])
            lines.append(
                f"| {r['preset']} | {title} | {interval(r[key]['sdt'], True)} | "
                f"{interval(r[key]['fdt'], False)} | {', '.join(f'{n} {t}' for t, n in kinds)} |"
            )
    lines += ["", f"Versions: {packages}. Made with:", "", *(f"    {c}" for c in commands), ""]
    return "\n".join(lines)


def _commands(args: argparse.Namespace, data: Mapping[str, Any]) -> list[str]:
    """How to make it again; folders by their names only, since they differ between machines."""
    name = args.bundle.resolve().name
    model = "" if args.model is None else f" {args.model.resolve().name}"
    option = "" if args.model is None else f" --model {args.model.resolve().name}"
    given = f" --out {args.out.name}" if args.out.is_absolute() else f" --out {args.out}"
    return [
        f"edge-dtm compress{model} -o {name} --tokens {data['tokens_per_prompt']} "
        f"--seed {data['seed']}",
        f"python tools/bench_quality.py {name}{option} --presets {shlex.quote(args.presets)}{given}",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", metavar="WORK_BUNDLE", type=Path)
    parser.add_argument("--model", type=Path, help="HF folder or GGUF [default: SmolLM2]")
    parser.add_argument("--presets", default=DEFAULT_PRESETS, help=f"[default: {DEFAULT_PRESETS}]")
    parser.add_argument("--threads", type=int, help="CPU threads of llama.cpp [default: all]")
    parser.add_argument("--json", type=Path, help="also write every figure as JSON")
    parser.add_argument("--out", type=Path, help="also write the table as Markdown")
    args = parser.parse_args(argv)
    presets = list(dict.fromkeys(p.strip() for p in args.presets.split(",") if p.strip()))
    if not presets:
        parser.error("--presets names none")
    stages = Stages()
    try:
        data = bench(args.bundle, args.model or default_model_dir(), presets, args.threads, stages)
    except EdgeDtmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = Console()
    console.print(terminal_table(data))
    for note in notes(data):
        console.print(note, highlight=False, soft_wrap=True)
    if args.json is not None:
        args.json.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if args.out is not None:
        args.out.write_text(markdown(data, _commands(args, data)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
