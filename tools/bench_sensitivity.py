"""The sensitivity's costs (gradients times local error) against measuring them directly.

Some block matrices, spread over layers and kinds, get each type in turn: the values that ship are put
into the torch model (the equalized one), the matrix's input is rounded as the device's kernel would,
the model runs teacher-forced on calibration sequences, and the mean-square change of the top-1/top-2
margin is noted, with the SDT.

WORK_BUNDLE is a folder that `edge-dtm compress MODEL -o WORK_BUNDLE` made, with its `work` folder.
Output: rank correlation and ratio of the cost table to the direct measurement.

    python tools/bench_sensitivity.py WORK_BUNDLE --json sensitivity.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# The script also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import default_model_dir
from edge_dtm.core.progress import Stages
from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.formats.profile import load_profile
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.costs import Costs, measure_costs
from edge_dtm.host.blocks.quantize import quantize
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.prepare import reopen_run
from edge_dtm.host.quantize.activations import activation_kind, round_activations
from edge_dtm.host.settings import Goal, Settings, Source
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.floating[Any]]
BATCH_SEQUENCES = 8


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
    costs: Costs, component: Component, treatment: Treatment
) -> npt.NDArray[np.float32]:
    """What ships, float32 (rows, row_length), rows in HF's order, of a matrix that is quantized."""
    data = costs.encoded.encoded(component, treatment)
    values = ggml.dequantize(treatment.type, data, component.row_length)
    rows: npt.NDArray[np.float32] = costs.equalized.hf_rows(component.name, values)
    return rows


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
    def run(self) -> tuple[FloatArray, FloatArray]:
        """Margins float64 and whether the argmax is another, bool, at all generated positions."""
        head, margins, other = self.model.lm_head.weight, [], []
        for ids, at, top, generated in self.batches:
            # Padding stands to the right, where causal attention never looks back from.
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = hidden[at[0], at[1]] @ head.T
            two = logits.gather(1, top)
            margins.append((two[:, 0] - two[:, 1]).double().cpu())
            other.append((logits.argmax(-1) != generated).cpu())
        return torch.cat(margins).numpy(), torch.cat(other).numpy()

    def treated(self, component: Component, values: FloatArray, kind: str) -> Any:
        """`run` with other weights in one block matrix and its input rounded. values: float32, HF rows."""
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


def bench(
    bundle: Path,
    model_path: Path,
    count: int,
    types: Sequence[str],
    sequences: int,
    stages: Stages,
) -> dict[str, Any]:
    """Everything, as what --json writes."""
    settings = Settings(bundle, Source(model_path), Goal(load_profile("raspberrypi")))
    run, base, reference = reopen_run(settings, stages)
    costs = measure_costs(run, base, reference)
    table = costs.table
    whole = reference.rows(calibration_rows(reference)[0])
    part = whole.rows(np.arange(min(sequences, len(whole))))
    chosen = sample(base.components, count, run.settings.source.seed)
    index = {c.name: i for i, c in enumerate(base.components)}
    wanted = [(c, Treatment(t)) for c in chosen for t in types if c.fits(t)]
    missing = {t.type for c, t in wanted if t not in table.treatments[index[c.name]]}
    if missing or not wanted:
        raise EdgeDtmError(
            f"--types {','.join(types)}: {', '.join(sorted(missing)) or 'none of them'} "
            f"{'has no costs in the work folder' if missing else 'fits the matrices'}"
        )
    quantize(run, costs, wanted)
    direct = Direct(load_model(costs.equalized, run.device), part)
    exact, exact_other = direct.run()
    rows: list[dict[str, Any]] = []
    with stages("Direct measurement", len(wanted)) as advance:
        for component, treatment in wanted:
            values = shipped_values(costs, component, treatment)
            margins, other = direct.treated(component, values, activation_kind(treatment.type))
            i = index[component.name]
            rows.append(
                {
                    "component": component.name,
                    "type": treatment.type,
                    "direct": float(np.square(margins - exact).mean()),
                    "direct_sdt": float(other.mean()),
                    "table": table.costs[i][table.treatments[i].index(treatment)],
                }
            )
            advance(1)

    return {
        "model": reference.provenance["model"],
        "packages": reference.provenance["packages"],
        "seed": run.settings.source.seed,
        "device": str(run.device),
        "sequences": len(part),
        "positions": int(part.generated_lengths.sum()),
        "stage_sequences": len(whole),
        "components": len(chosen),
        "block_components": sum(c.in_block for c in base.components),
        "base_sdt": float(exact_other.mean()),
        "pairs": rows,
        "agreement": agreement(rows, types),
        "units": {"direct": "logits squared", "direct_sdt": "share"},
    }


def agreement(rows: Sequence[Mapping[str, Any]], types: Sequence[str]) -> list[dict[str, Any]]:
    """Rank correlation and ratio over all pairs (first) and those of each type."""
    out = []
    for kind in ("all", *types):
        of = [r for r in rows if kind in ("all", r["type"])]
        if not of:
            continue
        cost, direct, sdt = (
            np.array([r[k] for r in of]) for k in ("table", "direct", "direct_sdt")
        )
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


def table(data: Mapping[str, Any]) -> str:
    """Markdown."""
    rows = [
        ["type", "pairs", "Spearman", "median ratio", "quartiles", "median direct", "median SDT",
         "Spearman with SDT"],
        ["---", *["---:"] * 7],
    ]  # fmt: skip
    for a in data["agreement"]:
        low, high = map(_text, a["ratio_quartiles"])
        rows.append([a["type"], str(a["pairs"]), _text(a["spearman"], 3), _text(a["ratio_median"])])
        rows[-1] += [f"{low} to {high}", f"{a['direct_median']:.2e}"]
        rows[-1] += [f"{a['direct_sdt_median']:.2%}", _text(a["spearman_sdt"], 3)]
    return "\n".join(
        [
            f"{data['model']}: {data['components']} of {data['block_components']} block matrices, "
            f"{len(data['pairs'])} pairs of matrix and type, "
            f"{data['sequences']} sequences, {data['positions']:,} positions; torch on "
            f"{data['device']}. Cost table ({data['stage_sequences']} sequences) against direct "
            "measurement:",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
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
            Stages(),
        )
    except EdgeDtmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(data))
    if args.json is not None:
        args.json.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
