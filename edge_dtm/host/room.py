"""Whether this machine has what a run needs, known before the run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import room
from edge_dtm.formats.plan import Component, Treatment
from edge_dtm.host.blocks.gather import task_bytes
from edge_dtm.host.blocks.workers import crew
from edge_dtm.host.checkpoint.checkpoint import ModelConfig, components_of
from edge_dtm.host.checkpoint.llama import keeps_float32
from edge_dtm.host.distill.trained import distillation_bytes
from edge_dtm.host.estimate import Sizes, Stage
from edge_dtm.host.settings import Settings
from edge_dtm.host.trajectory.reference import TextSize

NAMES = {"memory": "memory", "gpu": "GPU memory", "disk": "disk"}
REMEDIES = {
    "memory": "close other programs, use fewer --workers, --prompts or --tokens, or a larger machine",
    "gpu": "use --device cpu or a larger GPU, or fewer --prompts or --tokens",
    "disk": "free some space, or choose another folder than {folder}",
}


def run_sizes(
    settings: Settings,
    config: ModelConfig,
    text: TextSize,
    plan_bytes: int,
    device: torch.device,
    export_f16: bool = True,
) -> Sizes:
    """EdgeDtmError when --workers do not fit."""
    components = components_of(config)
    weights = sum(c.weights for c in components)
    each, method, types = task_bytes(config, text.measured), settings.method, settings.goal.types
    distilled = 0
    if method.distill_steps:
        blocks = sum(c.weights for c in components if c.in_block)
        edge, quantized = config.vocab * config.hidden, any(t != "F16" for t in types)
        distilled = distillation_bytes(blocks, edge, quantized)
    return Sizes(
        config=config,
        components=components,
        text=text,
        crew=crew(weights, each, method.workers, device),
        task_bytes=each,
        types=len(types),
        plan_bytes=plan_bytes,
        on_gpu=device.type == "cuda",
        keeps_float32=keeps_float32(weights, device),
        export_f16=export_f16,
        distillation_bytes=distilled,
    )


def free_room(out: Path, device: torch.device) -> dict[str, float]:
    """Bytes that are free now, by `memory`, `gpu` and `disk`; what an earlier run left in the work
    folder is room for this one."""
    there = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free: dict[str, float] = {
        "memory": room().free_bytes,
        "disk": shutil.disk_usage(there).free
        + sum(f.stat().st_size for f in (out / "work").rglob("*") if f.is_file()),
    }
    if device.type == "cuda":
        free["gpu"] = torch.cuda.mem_get_info(device)[0]
    return free


def largest_plan_bytes(
    components: Sequence[Component], fixed_bytes: int, types: Sequence[str], max_bytes: int
) -> int:
    """Of the file that the budget gives: never larger than with the largest type everywhere."""
    largest = fixed_bytes + sum(
        max(c.size_bytes(Treatment(t)) for t in types if c.fits(t)) for c in components
    )
    return min(max_bytes, largest)


def check_room(stages: Sequence[Stage], free: Mapping[str, float], folder: object) -> None:
    """EdgeDtmError listing every stage for which memory, GPU memory or disk is too small. free: bytes
    by `memory`, `gpu`, `disk`. folder: of the run, for the message."""
    short = []
    for stage in stages:
        for kind, needed in (
            ("memory", stage.memory_bytes),
            ("gpu", stage.gpu_bytes),
            ("disk", stage.disk_bytes),
        ):
            if needed > free.get(kind, float("inf")):
                short.append((kind, f"{stage.name} {needed / 1e9:.1f} GB of {NAMES[kind]}"))
    if not short:
        return
    kinds = dict.fromkeys(kind for kind, _ in short)
    have = ", ".join(f"{free[k] / 1e9:.1f} GB of {NAMES[k]}" for k in kinds)
    remedies = "; ".join(REMEDIES[k].format(folder=folder) for k in kinds)
    raise EdgeDtmError(f"{'; '.join(text for _, text in short)} needed, {have} free: {remedies}")


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
