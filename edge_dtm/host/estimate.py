"""What a run of `compress` will take, from the model's shape alone: memory, disk and time a stage.

Products dominate the time, so it is counted in floating-point operations and divided by what a short
product reaches on this machine. The factors that remain were fitted to runs (docs/time.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edge_dtm.formats.plan import Component
from edge_dtm.host.blocks.cost_records import WHOLE_BLOCKS
from edge_dtm.host.blocks.costs import ROW_SHARE
from edge_dtm.host.blocks.gather import PROCESS_BYTES, fitted_bytes, keeps_fitted, shapes
from edge_dtm.host.blocks.text import FITTED_DRAWS, MEASURED_DRAWS, OUTPUT_SEQUENCES
from edge_dtm.host.blocks.workers import Crew
from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.checkpoint.llama import BATCH_TOKENS
from edge_dtm.host.quantize.hessian import damping_for
from edge_dtm.host.trajectory.decode import CACHE_BYTES, sequences_at_once
from edge_dtm.host.trajectory.reference import TextSize

ENCODE_S_A_WEIGHT = 140e-9  # ggml's encoder and decoder, a type and a rounding, on one core
ROUNDINGS = 3  # plain, with error feedback, and again in the descent
DISK_BYTES_PER_S = 300e6
LLAMA_CPP_BYTES = 10**9
REFERENCE, FLOOR, FORWARD = "Greedy reference", "Noise floor in llama.cpp", "Sweep forward"
BLOCKS, QUANTIZE, PLAN = "Blocks", "Quantizing the plan", "Plan in llama.cpp"
DISTILL = "Distillation"
LLAMA_CPP_SHARE = 0.5  # of torch's speed, in float16 and with quantized weights


@dataclass(frozen=True)
class Stage:
    """One stage's share of a run. memory_bytes: of the CPU; gpu_bytes: 0 on a CPU; disk_bytes: of
    the work folder while it runs."""

    name: str
    seconds: float
    memory_bytes: float
    gpu_bytes: float
    disk_bytes: float


@dataclass(frozen=True)
class Speed:
    """What the machine reaches: float32 operations a second in products, bytes a second in copies."""

    flops: float
    bytes_per_s: float


def measure_speed(device: torch.device, seconds: float = 0.15) -> Speed:
    """By a few products of (512, 2048) with (2048, 2048) and copies of 64 MB."""

    def rate(run: object, amount: float) -> float:
        assert callable(run)
        run()
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or not count:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            count += 1
        return count * amount / spent

    a, b = torch.ones(512, 2048, device=device), torch.ones(2048, 2048, device=device)
    source = torch.ones(2**24, device=device)
    target = torch.empty_like(source)
    return Speed(
        rate(lambda: a @ b, 2.0 * 512 * 2048 * 2048), rate(lambda: target.copy_(source), 2.0**27)
    )


@dataclass(frozen=True)
class Sizes:
    """What an estimate goes by. task_bytes: of one job. types: that the plan may have. plan_bytes: of
    the file. keeps_float32: whether all weights stay in memory."""

    config: ModelConfig
    components: Sequence[Component]
    text: TextSize
    crew: Crew
    task_bytes: int
    types: int
    plan_bytes: int
    on_gpu: bool
    keeps_float32: bool = True
    export_f16: bool = True
    distillation_bytes: int = 0

    @property
    def block_weights(self) -> int:
        return sum(c.weights for c in self.components if c.in_block)

    @property
    def head_weights(self) -> int:
        return self.config.vocab * self.config.hidden

    @property
    def f16_bytes(self) -> int:
        return 2 * sum(c.weights for c in self.components)

    @property
    def keeps(self) -> bool:
        return keeps_fitted(self.config)

    @property
    def resident_bytes(self) -> int:
        """Of the weights in float32 at a time: all of a small model, one block of a large one."""
        if self.keeps_float32:
            return 4 * (self.block_weights + self.head_weights)
        return 4 * self.block_weights // self.config.layers

    @property
    def widest_damping(self) -> float:
        """Of the Hessians of the longest rows, see damping_for."""
        return damping_for(self.text.fitted, max(c.row_length for c in self.components))


def estimate(s: Sizes, speed: Speed) -> tuple[Stage, ...]:
    """The stages of a run in their order."""
    seconds, torch_bytes, own_bytes, disk = _seconds(s, speed), _torch(s), _beside(s), _disk(s)
    return tuple(
        Stage(
            name,
            seconds[name],
            own_bytes.get(name, PROCESS_BYTES)
            if s.on_gpu
            else max(own_bytes.get(name, 0), torch_bytes.get(name, 0)),
            torch_bytes.get(name, 0) if s.on_gpu else 0,
            disk.get(name, 0),
        )
        for name in seconds
    )


def _seconds(s: Sizes, speed: Speed) -> dict[str, float]:
    """By stage, in their order. That of distillation is not known."""
    work, types = _operations(s), s.types
    encode = ROUNDINGS * ENCODE_S_A_WEIGHT * s.block_weights / s.crew.processes / s.crew.threads
    replay = work["replay"] / (LLAMA_CPP_SHARE * speed.flops)
    export = s.f16_bytes / DISK_BYTES_PER_S if s.export_f16 else 0
    out = {
        REFERENCE: work["reference"] / speed.flops + _decode_bytes(s) / speed.bytes_per_s,
        FLOOR: export + replay,
        FORWARD: work["forward"] / speed.flops,
        BLOCKS: work["blocks"] / speed.flops + encode * _measured_share(s) * types,
        QUANTIZE: work["quantize"] / speed.flops + encode,
        PLAN: 2 * s.plan_bytes / DISK_BYTES_PER_S + replay,
    }
    return out | ({DISTILL: 0.0} if s.distillation_bytes else {})


def _torch(s: Sizes) -> dict[str, float]:
    """Bytes by stage where torch computes; on the CPU jobs begin when what was gathered is on disk."""
    own = PROCESS_BYTES + s.resident_bytes
    batch = 4 * BATCH_TOKENS * sum(rows + length for rows, length in shapes(s.config).values())
    logits = 12 * s.config.vocab * sequences_at_once(s.config, s.text.longest)
    gather = (
        own + (1 + 2 * MEASURED_DRAWS) * batch + fitted_bytes(s.config) + 2 * _measured_bytes(s)
    )
    if s.on_gpu:
        gather = max(gather, own + s.task_bytes)
    return {
        REFERENCE: own + min(CACHE_BYTES, _cache_bytes(s)) + logits,
        FORWARD: own + batch,
        BLOCKS: gather,
        QUANTIZE: gather,
        DISTILL: s.distillation_bytes,
    }


def _beside(s: Sizes) -> dict[str, float]:
    """Bytes by stage that the host takes besides: jobs in processes, llama.cpp, whose file is mapped
    and, quantized, rearranged for the kernels."""
    jobs = PROCESS_BYTES + (0 if s.on_gpu else s.crew.processes * s.task_bytes)
    llama = {FLOOR: LLAMA_CPP_BYTES, PLAN: LLAMA_CPP_BYTES + s.plan_bytes}
    return {BLOCKS: jobs, QUANTIZE: jobs, **llama}


def _disk(s: Sizes) -> dict[str, float]:
    """Bytes by stage of the work folder."""
    text, boundaries = s.text, (s.config.layers + 1) * 4 * s.config.hidden
    hidden = boundaries * text.calibration
    gradients = boundaries * (text.calibration + text.measured)
    fitted = fitted_bytes(s.config) * (s.config.layers if s.keeps else 1)
    blocks = fitted + _measured_bytes(s)
    swept = hidden + (0 if s.keeps else gradients)
    return {
        FLOOR: s.f16_bytes if s.export_f16 else 0,
        FORWARD: hidden,
        BLOCKS: swept + blocks,
        QUANTIZE: (0 if s.keeps else swept) + blocks + s.plan_bytes,
        PLAN: 2 * s.plan_bytes + (fitted if s.keeps else 0),
        DISTILL: 14 * s.f16_bytes if s.distillation_bytes else 0,
    }


def _operations(s: Sizes) -> dict[str, float]:
    """Floating-point operations of the products, by stage."""
    text, weights, all_shapes = s.text, 2 * s.block_weights, shapes(s.config).values()
    near = min(text.fitted, OUTPUT_SEQUENCES * text.longest)
    hessians = sum(2.0 * length**2 * text.fitted for _, length in all_shapes)
    moments = sum(2.0 * rows**2 * near for rows, _ in all_shapes)
    factors = sum(2 / 3 * length**3 for _, length in all_shapes)
    output_factors = sum(2 / 3 * rows**3 for rows, _ in all_shapes)
    # One sweep that passes errors on (half of the products), one descent; on both sides.
    rounding = sum(3.0 * rows * length * (rows + length) for rows, length in all_shapes)
    gather = (1 + FITTED_DRAWS) * text.fitted * weights + s.config.layers * hessians
    layers, share = s.config.layers, _measured_share(s)
    small = share if not s.keeps else 1.0
    return {
        "reference": weights * text.tokens + 2.0 * s.head_weights * text.generated,
        "forward": float(weights * text.calibration),
        "blocks": gather
        + (1 + MEASURED_DRAWS) * text.measured * weights
        + layers * (small * moments + factors + share * s.types * rounding),
        "quantize": (0 if s.keeps else gather + layers * moments)
        + layers * (factors + output_factors + rounding),
        "replay": weights * text.held_out + 2.0 * s.head_weights * text.held_out,
    }


def _measured_share(s: Sizes) -> float:
    """Of all rows, those whose costs are measured."""
    whole = min(WHOLE_BLOCKS, s.config.layers) / s.config.layers
    return whole + (1 - whole) * ROW_SHARE


def _measured_bytes(s: Sizes) -> int:
    """Of what a block's costs are measured on."""
    each = sum(
        length + MEASURED_DRAWS * (length + rows * ROW_SHARE)
        for rows, length in shapes(s.config).values()
    )
    return int(4 * s.text.measured * each)


def _cache_bytes(s: Sizes) -> int:
    c = s.config
    at_once = sequences_at_once(c, s.text.longest)
    return 4 * at_once * s.text.longest * c.layers * c.kv_heads * c.head_dim * 2


def _decode_bytes(s: Sizes) -> float:
    """Moved while decoding: every weight, a token of a batch; read in 16 bits, written and read again
    in 32 where not all of them stay."""
    steps = s.text.generated / max(1, s.text.sequences)
    batches = -(-s.text.sequences // sequences_at_once(s.config, s.text.longest))
    return steps * batches * (s.block_weights + s.head_weights) * (4.0 if s.keeps_float32 else 10.0)
