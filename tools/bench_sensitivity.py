"""The sensitivity's costs (gradients times local error) against measuring them directly.

Some block matrices, spread over layers and kinds, get each type in turn: the values of the blocks
that ship are put into the torch model (the equalized one), the matrix's input is rounded as the
device's kernel would, the model runs teacher-forced on calibration sequences, and the mean-square
change of the top-1/top-2 margin is noted, with the SDT. The same costs are then computed the way
`edge-dtm compress` does, on the same sequences, with a stopwatch on both. Pairs of matrix and type
that no plan can choose, since they lie above the convex hull of bytes and cost, have no blocks
where error feedback was kept; they are left out, and counted.

WORK_BUNDLE is a folder that `edge-dtm compress MODEL -o WORK_BUNDLE` made; its `work` folder gives
the reference, the cost table and the blocks. Output: rank correlation and ratio of the
costs to the direct measurement, and the time of both, measured on the sample and extrapolated to
all block matrices, all treatments and all of the sequences the sensitivity stage uses.

    python tools/bench_sensitivity.py WORK_BUNDLE --json sensitivity.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

# The script also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.paths import default_model_dir
from edge_dtm.core.progress import Stages
from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.formats.profile import load_profile
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.activations import Activations
from edge_dtm.host.blocks.capture import BATCH_SEQUENCES
from edge_dtm.host.blocks.encoded import EncodedStore
from edge_dtm.host.blocks.sensitivity import component_costs
from edge_dtm.host.checkpoint.checkpoint import to_hf_rows
from edge_dtm.host.checkpoint.equalized import EqualizedCheckpoint
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.compress import Pipeline
from edge_dtm.host.quantize.activations import activation_kind, round_activations
from edge_dtm.host.quantize.treat import treated_values
from edge_dtm.host.settings import Settings
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.floating[Any]]


def ranks(values: FloatArray) -> FloatArray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[inverse]


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Rank correlation; nan for fewer than 3 pairs or when one side is all the same."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def sample(components: Sequence[Component], count: int, seed: int) -> list[Component]:
    """`count` block matrices: kinds in turn, each kind's spread evenly over the layers."""
    kinds: dict[str, list[Component]] = {}
    for c in components:
        if c.in_block:
            kinds.setdefault(c.name.rpartition(".")[2], []).append(c)
    rng = np.random.default_rng(seed)
    order = [list(kinds)[i] for i in rng.permutation(len(kinds))]
    chosen = []
    for i, kind in enumerate(order):
        of_kind = kinds[kind]
        n = min(len(range(i, count, len(order))), len(of_kind))
        # One in each of n equal stretches of layers, all at the same random place in theirs.
        places = (np.arange(n) + rng.random()) * len(of_kind) / max(n, 1)
        chosen += [of_kind[int(p)] for p in places]
    names = {c.name for c in chosen}
    return [c for c in components if c.name in names]


def shipped_values(
    shipped: EncodedStore, component: Component, treatment: Treatment
) -> npt.NDArray[np.float32] | None:
    """What the blocks that ship stand for, float32 (rows, row_length), rows in HF's order; None
    where there are no blocks, since no plan can choose that treatment."""
    try:
        data = shipped.blocks(component, treatment)
    except EdgeDtmError:
        return None
    values = ggml.dequantize(treatment.type, data, component.row_length)
    heads = shipped.checkpoint._rotated_heads(component.name + ".weight")
    return to_hf_rows(values, heads) if heads else values


class Direct:
    """Teacher-forced runs of the torch model on some sequences."""

    def __init__(self, model: Any, reference: Reference) -> None:
        self.model, self.reference = model, reference
        self.device = next(model.parameters()).device
        self.modules = dict(model.named_modules())
        r = reference
        lengths = r.prompt_lengths + r.generated_lengths - 1
        self.batches = []
        for start in range(0, len(r), BATCH_SEQUENCES):
            batch = range(start, min(start + BATCH_SEQUENCES, len(r)))
            ids = torch.zeros((len(batch), max(int(lengths[i]) for i in batch)), dtype=torch.long)
            at, top, generated = [], [], []
            for k, i in enumerate(batch):
                n, first = int(r.generated_lengths[i]), int(r.prompt_lengths[i]) - 1
                ids[k, : lengths[i]] = torch.tensor((r.prompt(i) + r.generated(i))[: lengths[i]])
                at += [(k, first + t) for t in range(n)]
                top.append(r.top_ids[i, :n, :2])
                generated += r.generated(i)
            self.batches.append(
                [
                    torch.as_tensor(x, dtype=torch.long).to(self.device)
                    for x in (ids, np.array(at).T, np.concatenate(top), generated)
                ]
            )

    @torch.no_grad()
    def run(self, head_kind: str | None = None) -> tuple[FloatArray, FloatArray]:
        """Margins float64 and whether the argmax is another, bool, at all generated positions.
        head_kind: how the head's inputs are rounded, None for not at all."""
        head, margins, other = self.model.lm_head.weight, [], []
        for ids, at, top, generated in self.batches:
            # Padding stands to the right, where causal attention never looks back from.
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            hidden = hidden[at[0], at[1]]
            if head_kind is not None:
                hidden = round_activations(hidden, head_kind)
            logits = hidden @ head.T
            two = logits.gather(1, top)
            margins.append((two[:, 0] - two[:, 1]).double().cpu())
            other.append((logits.argmax(-1) != generated).cpu())
        return torch.cat(margins).numpy(), torch.cat(other).numpy()

    def treated(self, component: Component, values: FloatArray, kind: str) -> Any:
        """`run` with other weights in one matrix and its input rounded. values: float32, HF rows."""
        if not component.in_block:
            return self._treated_edge(component, values, kind)
        module = self.modules[module_name(component.name)]
        original = module.weight.data

        def round_input(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            flat = round_activations(args[0].reshape(-1, component.row_length), kind)
            return (flat.reshape(args[0].shape), *args[1:])

        handle = module.register_forward_pre_hook(round_input)
        try:
            module.weight.data = torch.from_numpy(values).to(self.device)
            return self.run()
        finally:
            module.weight.data = original
            handle.remove()

    def _treated_edge(self, component: Component, values: FloatArray, kind: str) -> Any:
        """`treated` of `token_embd`, whose rows are looked up, and of the head; a tied embedding
        is both."""
        looked_up = component.name == "token_embd"
        is_head = not looked_up or self.model.config.tie_word_embeddings
        modules = [self.model.model.embed_tokens] * looked_up + [self.model.lm_head] * is_head
        original = [m.weight.data for m in modules]
        try:
            for module in modules:
                module.weight.data = torch.from_numpy(values).to(self.device)
            return self.run(kind if is_head else None)
        finally:
            for module, data in zip(modules, original, strict=True):
                module.weight.data = data


def bench(
    bundle: Path,
    model_path: Path,
    count: int,
    types: Sequence[str],
    sequences: int,
    device: str,
    stages: Stages,
) -> dict[str, Any]:
    """Everything, as what --json writes."""
    settings = Settings(
        model=model_path, out=bundle, profile=load_profile("raspberrypi"), device=device
    )
    run, reference = Pipeline.reopen(settings, stages)
    table, shipped = run.costs(reference)
    whole = reference.rows(calibration_rows(reference)[0])
    part = whole.rows(np.arange(min(sequences, len(whole))))
    chosen = sample(run.components, count, run.s.seed)
    index = {c.name: i for i, c in enumerate(run.components)}
    wanted = [(c, Treatment(t)) for c in chosen for t in types if c.fits(t)]
    missing = {t.type for c, t in wanted if t not in table.treatments[index[c.name]]}
    if missing or not wanted:
        raise EdgeDtmError(
            f"--types {','.join(types)}: {', '.join(sorted(missing)) or 'none of them'} "
            f"{'has no costs in the work folder' if missing else 'fits the matrices'}"
        )
    pairs = [(c, t) for c, t in wanted if shipped_values(shipped, c, t) is not None]
    if not pairs:
        raise EdgeDtmError(f"--types {','.join(types)}: none of them can be in a plan; name others")
    if len(pairs) < len(wanted):
        stages.note(f"{len(wanted) - len(pairs)} of {len(wanted)} pairs left out: never in a plan")
    weights = {c.name: run.equalized.hf_tensor(c.name + ".weight") for c in chosen}

    direct = Direct(load_model(run.equalized, run.torch_device), part)
    direct.run()  # the first run is slower; not timed
    base, base_other = direct.run()
    rows: list[dict[str, Any]] = []
    quantize_s, forward_s = 0.0, 0.0
    with stages("Direct measurement", len(pairs)) as advance:
        for component, treatment in pairs:
            start = time.perf_counter()
            values = shipped_values(shipped, component, treatment)
            assert values is not None
            middle = time.perf_counter()
            margins, other = direct.treated(component, values, activation_kind(treatment.type))
            end = time.perf_counter()
            quantize_s, forward_s = quantize_s + middle - start, forward_s + end - middle
            i = index[component.name]
            rows.append(
                {
                    "component": component.name,
                    "type": treatment.type,
                    "direct": float(np.square(margins - base).mean()),
                    "direct_sdt": float(other.mean()),
                    "table": table.costs[i][table.treatments[i].index(treatment)],
                }
            )
            advance(1)

    del direct

    def values_of(
        c: Component, choices: Sequence[Treatment]
    ) -> dict[Treatment, npt.NDArray[np.float32]]:
        """Of the blocks that ship where there are some, of plain rounding elsewhere."""
        out, use = {}, activations.importance(c.name)
        for t in choices:
            values = shipped_values(shipped, c, t)
            out[t] = treated_values(weights[c.name], t, use) if values is None else values
        return out

    # All block matrices are captured, as the stage does; costs are timed for the chosen ones only,
    # but with all of their treatments.
    blocks = [c for c in run.components if c.in_block]
    folder = run.work / "bench" / "activations"
    activations = Activations(folder, part, run.components)
    activations.remove()
    if isinstance(run.equalized, EqualizedCheckpoint):
        activations.scales, activations.config = run.equalized.scales, run.checkpoint.config
    costs: dict[str, list[float]] = {}
    try:
        model = run.model()  # not timed; the original, since that is what the stage captures
        start = time.perf_counter()
        with stages("Gradients of the same sequences", len(part)) as advance:
            activations.capture(model, run.s.seed, advance)
        run.__dict__.pop("_loaded", None)
        capture_s = time.perf_counter() - start
        start = time.perf_counter()
        with stages("Costs of the same matrices", len(chosen)) as advance:
            for c in chosen:
                choices = table.treatments[index[c.name]]
                known = {
                    t: torch.from_numpy(v).to(run.torch_device)
                    for t, v in values_of(c, choices).items()
                }
                costs[c.name] = component_costs(
                    activations, c, choices, weights[c.name], run.torch_device, None, known
                )
                advance(1)
        costs_s = time.perf_counter() - start
        # The part of it that does not grow with the tokens: the values of every treatment.
        start = time.perf_counter()
        for c in chosen:
            values_of(c, table.treatments[index[c.name]])
        fixed_s = min(time.perf_counter() - start, costs_s)
    finally:
        activations.remove()
    for row in rows:
        choices = table.treatments[index[row["component"]]]
        row["same_sequences"] = costs[row["component"]][choices.index(Treatment(row["type"]))]

    tokens = replayed(whole) / replayed(part)
    matrices = sum(c.weights for c in blocks) / sum(c.weights for c in chosen)
    treatments = [len(table.treatments[index[c.name]]) for c in blocks]
    weights_treated = sum(c.weights * n for c, n in zip(blocks, treatments, strict=True))
    direct_all = (
        quantize_s * weights_treated / sum(c.weights for c, _ in pairs)
        + forward_s * sum(treatments) / len(pairs) * tokens
    )
    gradient_all = capture_s * tokens + (fixed_s + (costs_s - fixed_s) * tokens) * matrices
    return {
        "model": reference.provenance["model"],
        "packages": reference.provenance["packages"],
        "seed": run.s.seed,
        "device": str(run.torch_device),
        "threads": torch.get_num_threads(),
        "sequences": len(part),
        "positions": int(part.generated_lengths.sum()),
        "stage_sequences": len(whole),
        "components": len(chosen),
        "block_components": len(blocks),
        "block_treatments": sum(treatments),
        "base_sdt": float(base_other.mean()),
        "pairs": rows,
        "pairs_left_out": len(wanted) - len(pairs),
        "agreement": {name: agreement(rows, name, types) for name in ("table", "same_sequences")},
        "seconds_measured": {
            "direct_quantize": quantize_s,
            "direct_forward": forward_s,
            "gradient_capture": capture_s,
            "gradient_costs": costs_s,
            "gradient_costs_quantize": fixed_s,
        },
        "seconds_extrapolated": {"direct": direct_all, "gradient": gradient_all},
        "time_ratio": direct_all / gradient_all,
        "units": {"direct": "logits squared", "direct_sdt": "share"},
    }


def replayed(reference: Reference) -> int:
    return int((reference.prompt_lengths + reference.generated_lengths - 1).sum())


def agreement(
    rows: Sequence[Mapping[str, Any]], name: str, types: Sequence[str]
) -> list[dict[str, Any]]:
    """Rank correlation and ratio over all pairs (first) and those of each type."""
    out = []
    for kind in ("all", *types):
        of = [r for r in rows if kind in ("all", r["type"])]
        if not of:
            continue
        cost, direct, sdt = (np.array([r[k] for r in of]) for k in (name, "direct", "direct_sdt"))
        positive = direct > 0
        ratio = cost[positive] / direct[positive]
        low, middle, high = np.percentile(ratio, [25, 50, 75]) if ratio.size else [np.nan] * 3
        out.append(
            {
                "type": kind,
                "pairs": len(of),
                "spearman": _finite(spearman(cost, direct)),
                "spearman_sdt": _finite(spearman(cost, sdt)),
                "ratio_median": _finite(middle),
                "ratio_quartiles": [_finite(low), _finite(high)],
                "direct_median": float(np.median(direct)),
                "direct_sdt_median": float(np.median(sdt)),
            }
        )
    return out


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no nan


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show(data: Mapping[str, Any], console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(
        f"{data['model']}: {data['components']} of {data['block_components']} block matrices, "
        f"{len(data['pairs'])} pairs of matrix and type ({data['pairs_left_out']} more are never in a "
        f"plan), {data['sequences']} sequences, "
        f"{data['positions']:,} positions; torch on {data['device']}, {data['threads']} threads"
    )
    titles = {
        "table": f"Cost table ({data['stage_sequences']} sequences) against direct measurement",
        "same_sequences": f"Costs on the same {data['sequences']} sequences against it",
    }
    for name, title in titles.items():
        table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
        heads = ("type", "pairs", "Spearman", "median\nratio", "\n(quartiles)", "median\ndirect",
                 "median\nSDT", "Spearman\nwith SDT")  # fmt: skip
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left", no_wrap=True)
        for a in data["agreement"][name]:
            low, high = a["ratio_quartiles"]
            table.add_row(
                a["type"], str(a["pairs"]), _text(a["spearman"], 3), _text(a["ratio_median"]),
                f"{_text(low)}-{_text(high)}", f"{a['direct_median']:.2e}",
                f"{a['direct_sdt_median']:.2%}", _text(a["spearman_sdt"], 3),
            )  # fmt: skip
        console.print(table)
    m, e = data["seconds_measured"], data["seconds_extrapolated"]
    say(
        f"measured: direct {m['direct_quantize'] + m['direct_forward']:.1f} s for "
        f"{len(data['pairs'])} pairs (quantizing {m['direct_quantize']:.1f} s, forward passes "
        f"{m['direct_forward']:.1f} s); gradients {m['gradient_capture']:.1f} s for all matrices, "
        f"costs {m['gradient_costs']:.1f} s for {data['components']} of them with all treatments "
        f"(quantizing {m['gradient_costs_quantize']:.1f} s of it)"
    )
    say(
        f"extrapolated to {data['block_components']} block matrices, {data['block_treatments']} "
        f"treatments and {data['stage_sequences']} sequences: direct {e['direct']:.0f} s, "
        f"sensitivity {e['gradient']:.0f} s, which is {data['time_ratio']:.1f} times less"
    )
    say(
        "(quantizing grows with treated weights, forward passes with treatments and tokens, gradients "
        "with tokens, the rest of the costs with weights and tokens; embedding and head are left out, "
        "and so is making blocks with error feedback, which both need)"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", metavar="WORK_BUNDLE", type=Path)
    parser.add_argument("--model", type=Path, help="HF folder or GGUF [default: SmolLM2]")
    parser.add_argument("--components", type=int, default=40, help="[default: 40]")
    parser.add_argument("--types", default="Q8_0,Q5_0,Q4_0", help="[default: Q8_0,Q5_0,Q4_0]")
    parser.add_argument("--sequences", type=int, default=16, help="[default: 16]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="also write every figure as JSON")
    args = parser.parse_args(argv)
    types = list(dict.fromkeys(t.strip() for t in args.types.split(",") if t.strip()))
    if args.components < 1 or args.sequences < 1 or not types:
        parser.error("--components and --sequences must be 1 or more, --types name one")
    try:
        data = bench(
            args.bundle,
            args.model or default_model_dir(),
            args.components,
            types,
            args.sequences,
            args.device,
            Stages(),
        )
    except EdgeDtmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(data, Console())
    if args.json is not None:
        args.json.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
