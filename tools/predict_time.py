"""How long `edge-dtm compress` would take for a model of some shape, stage by stage.

Measures on this machine what the long stages consist of: nanoseconds a weight of each GGML type in
ggml's quantizer on one core, and the rate of matrix products on the device. The rest is counting:
products and quantizer passes of each stage, from the shape alone. What the counting leaves out
(elementwise work, files, small steps) is put in as one factor a stage, which was fitted to
SmolLM2-135M on two cores; --gflops, --cores and --launch-us describe another machine.

    python tools/predict_time.py                                    # SmolLM2-135M, here
    python tools/predict_time.py --layers 32 --hidden 4096 --ffn 11008 --heads 32 --kv-heads 32 \\
        --vocab 32000 --gflops 30000 --cores 16 --gpu --launch-us 8     # 7B, one GPU
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from edge_dtm.formats import ggml_types

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.formats.plan import CANDIDATE_TYPES, Component, Treatment, candidate_treatments
from edge_dtm.host.blocks.activations import SIGN_DRAWS
from edge_dtm.host.blocks.encoded import takes_feedback
from edge_dtm.host.blocks.fit import ROW_STEP
from edge_dtm.host.distill.distill import DistillSettings
from edge_dtm.host.distill.trained import distillation_bytes as needed_bytes
from edge_dtm.host.quantize.activations import activation_kind
from edge_dtm.host.quantize.gptq import DESCENT_SWEEPS, ROW_GROUPS
from edge_dtm.llamacpp import ggml

# Measured seconds over counted seconds, SmolLM2-135M on two x86-64 cores (docs/time.md).
FACTORS = {"Greedy reference": 2.6, "Gradients": 2.8, "Sensitivity": 1.8, "Recovery": 1.0}
LAUNCHES_A_STEP = 25  # torch operations in one step of the feedback


@dataclass(frozen=True)
class Machine:
    """gflops: of float32 products on the device; quantize_ns: type -> ns a weight on a core."""

    gflops: float
    cores: int
    launch_us: float
    gpu: bool
    quantize_ns: dict[str, float]


@dataclass(frozen=True)
class Tokens:
    """Defaults are what SmolLM2 gets with the packaged prompts."""

    prompts: int = 247
    generated: int = 96
    sequence: int = 134  # prompt and answer, on average
    measured: int = 32
    fitted: int = 82


def blocks_of(args: Any) -> list[Component]:
    head = args.hidden // args.heads
    kv = head * args.kv_heads
    shapes = {
        "attn_q": (args.hidden, args.hidden),
        "attn_k": (kv, args.hidden),
        "attn_v": (kv, args.hidden),
        "attn_output": (args.hidden, args.hidden),
        "ffn_gate": (args.ffn, args.hidden),
        "ffn_up": (args.ffn, args.hidden),
        "ffn_down": (args.hidden, args.ffn),
    }
    return [Component(f"blk.0.{n}", *s) for n, s in shapes.items()]


def component_seconds(c: Component, t: Tokens, m: Machine) -> dict[str, float]:
    """The sensitivity of one block matrix: {"quantizer", "products", "steps"} in seconds, the
    first and on a CPU all of them being spread over the cores later."""
    choices = candidate_treatments(c, CANDIDATE_TYPES, sparse=False)
    types = [x.type for x in choices if takes_feedback(x)]
    passes = 1 + DESCENT_SWEEPS + 1 / ROW_STEP
    quantizer = sum(m.quantize_ns[k] for k in types) * 1e-9 * passes * c.weights
    rows, n = c.rows, c.row_length
    kinds = len({activation_kind(x.type) for x in choices})
    measured, fitted = t.measured * t.sequence, t.fitted * t.sequence
    # In a pass along the columns each block sees the others (half of them, the first time), and
    # each group of rows likewise.
    flop = len(types) * 2.0 * (0.5 + DESCENT_SWEEPS) * (rows * n * n + rows * rows * n)
    flop += 2.0 * fitted * n * n + 2.0 * min(32, t.fitted) * t.sequence * rows * rows  # moments
    flop += 4.0 * n**3 + 4.0 * rows**3  # their factors, in float64
    flop += SIGN_DRAWS * 2.0 * measured * c.weights * (1 + kinds)  # gradients times inputs
    flop += SIGN_DRAWS * 2.0 * t.measured * c.weights * len(choices)  # and times the changes
    steps = 0.0
    for size in {ggml_types.block_size(k) for k in types}:
        steps += ROW_GROUPS * n / size * (1 + DESCENT_SWEEPS)
    return {
        "quantizer": quantizer,
        "products": flop / m.gflops / 1e9,
        "steps": steps * LAUNCHES_A_STEP * m.launch_us * 1e-6,
    }


def stages(args: Any, t: Tokens, m: Machine) -> dict[str, float]:
    """Seconds of the long stages."""
    layer = blocks_of(args)
    block_weights = args.layers * sum(c.weights for c in layer)
    head = args.vocab * args.hidden
    rate = m.gflops * 1e9
    decoded = t.prompts * (t.sequence * block_weights + t.generated * head)
    passes = t.measured * (1 + SIGN_DRAWS) + t.fitted * 2
    parts = [component_seconds(c, t, m) for c in layer]
    total = {k: args.layers * sum(p[k] for p in parts) for k in parts[0]}
    if m.gpu:
        sensitivity = total["quantizer"] / m.cores + total["products"] + total["steps"]
    else:  # --gflops is of all cores together
        sensitivity = (total["quantizer"] + total["steps"]) / m.cores + total["products"]
    counted = {
        "Greedy reference": 2 * decoded / rate,
        "Gradients": 2 * passes * t.sequence * block_weights / rate,
        "Sensitivity": sensitivity,
    }
    if args.recover:
        # Forward, backward for inputs and weights, and forward again where activations are not
        # kept; the heads of both models, and the way back through the student's.
        each = 8 * block_weights + 6 * head
        counted["Recovery"] = args.recover * DistillSettings(1).batch_tokens * each / rate
    return {k: v * FACTORS[k] for k, v in counted.items()}


def distillation_bytes(args: Any, quantized: bool) -> int:
    block_weights = args.layers * sum(c.weights for c in blocks_of(args))
    return needed_bytes(block_weights, args.vocab * args.hidden, quantized)


def best_of(work: Callable[[], object], least_s: float) -> float:
    """Seconds a call, the least of several."""
    work()
    best, end = float("inf"), time.perf_counter() + least_s
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def quantize_ns() -> dict[str, float]:
    """ns a weight on one core, with an importance vector, normally distributed weights."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((64, 2048)).astype(np.float32)
    importance = rng.uniform(0.1, 2, 2048).astype(np.float32)
    out = {}
    for kind in CANDIDATE_TYPES:
        if takes_feedback(Treatment(kind)):

            def work(kind: str = kind) -> None:
                data = ggml.quantize(kind, weights, importance, threads=1)
                ggml.dequantize(kind, data, 2048, threads=1)

            out[kind] = best_of(work, 0.3) / weights.size * 1e9
    return out


def product_gflops(device: torch.device) -> float:
    a, b = torch.randn((1024, 2048), device=device), torch.randn((2048, 2048), device=device)

    def work() -> float:
        return float((a @ b)[0, 0])

    return 2 * 1024 * 2048 * 2048 / best_of(work, 1.0) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("layers", 30), ("hidden", 576), ("ffn", 1536), ("heads", 9), ("kv-heads", 3),
        ("vocab", 49152), ("cores", os.cpu_count() or 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gflops", type=float, help="float32 products; default: measured here")
    parser.add_argument("--launch-us", type=float, default=5.0, help="time of a small operation")
    parser.add_argument("--recover", type=int, default=0, help="steps of one recovery")
    parser.add_argument("--gpu", action="store_true", help="products on a GPU, beside the cores")
    args = parser.parse_args()
    console = Console()
    gflops = args.gflops or product_gflops(torch.device("cuda" if args.gpu else "cpu"))
    machine = Machine(gflops, args.cores, args.launch_us, args.gpu, quantize_ns())
    tokens = Tokens()

    table = Table("GGML type", "ns a weight and pass")
    for kind, ns in machine.quantize_ns.items():
        table.add_row(kind, f"{ns:.1f}")
    console.print(table)
    console.print(f"Products: {gflops:,.0f} GFLOP/s; {machine.cores} cores; one core's quantizer.")
    table = Table("Component", "quantizer, s", "products, s", "small steps, s")
    for c in blocks_of(args):
        s = component_seconds(c, tokens, machine)
        table.add_row(
            c.name.removeprefix("blk.0."),
            *(f"{s[k]:.2f}" for k in ("quantizer", "products", "steps")),
        )
    console.print(table)
    table = Table("Stage", "predicted, s")
    found = stages(args, tokens, machine)
    for name, seconds in found.items():
        table.add_row(name, f"{seconds:,.0f}")
    table.add_row("together", f"{sum(found.values()):,.0f}")
    console.print(table)
    weights = args.layers * sum(c.weights for c in blocks_of(args))
    a = tokens.measured * tokens.sequence
    console.print(
        f"Sensitivity: {found['Sensitivity'] / (7 * args.layers):.2f} s a component, "
        f"{found['Sensitivity'] / weights * 1e9:.0f} ns a weight; gradients: "
        f"{found['Gradients'] / (a + tokens.fitted * tokens.sequence) * 1e3:.1f} ms a calibration "
        "token."
    )
    if args.recover:
        console.print(
            f"Recovery takes {distillation_bytes(args, False) / 1e9:.0f} GB, with grids other than F16 "
            f"{distillation_bytes(args, True) / 1e9:.0f} GB, besides activations."
        )


if __name__ == "__main__":
    main()
