"""`compress --dry-run`: what a run would take and make, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import default_threads
from edge_dtm.data import packaged_records
from edge_dtm.formats.plan import uniform
from edge_dtm.formats.record import RunSettings
from edge_dtm.host.checkpoint.checkpoint import components_of
from edge_dtm.host.checkpoint.model import choose_device
from edge_dtm.host.checkpoint.open import open_config
from edge_dtm.host.estimate import Stage, estimate, measure_speed
from edge_dtm.host.prepare import budget_of, check_sizes, check_types
from edge_dtm.host.room import check_room, duration, free_room, largest_plan_bytes, run_sizes
from edge_dtm.host.settings import Settings
from edge_dtm.host.trajectory.reference import text_size

CHARACTERS_A_TOKEN = 4
FIXED_BYTES_A_TOKEN = 40  # of the tokenizer in a GGUF: the tokens, merges, scores and kinds


def dry_run(settings: Settings, console: Console) -> None:
    """Print the budget, the file, and for each stage time, memory and disk. From config.json, or a
    GGUF's head, alone. EdgeDtmError when the run could not be done here."""
    goal, source = settings.goal, settings.source
    device, config = choose_device(settings.method.device), open_config(source.model)
    components = components_of(config)
    fixed_bytes = FIXED_BYTES_A_TOKEN * config.vocab + 8 * config.hidden * config.layers
    f16_bytes = uniform(components, "F16", fixed_bytes).size_bytes
    check_types(components, goal.types)
    budget = budget_of(goal, config, f16_bytes, RunSettings(threads=default_threads()))
    console.print(budget.text, highlight=False, soft_wrap=True)
    check_sizes(components, fixed_bytes, goal, budget)
    plan_bytes = largest_plan_bytes(components, fixed_bytes, goal.types, budget.max_bytes)
    text = text_size(_prompt_lengths(source.prompts), source)
    sizes = run_sizes(settings, config, text, plan_bytes, device)
    stages = estimate(sizes, measure_speed(device))
    crew = sizes.crew
    console.print(
        f"model.gguf: at most {plan_bytes:,} bytes (F16: {f16_bytes:,}).\n"
        f"Text: {text.sequences} sequences, {text.tokens:,} tokens at most; {text.calibration:,} of "
        f"them calibrate, {text.held_out:,} are held out. Damping of the longest rows: "
        f"{sizes.widest_damping:.2f}.\n"
        f"Where: {device}; jobs in {crew.processes} processes of {crew.threads} threads.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_table(stages, sizes.on_gpu))
    check_room(stages, free_room(settings.out, device), settings.out)


def _prompt_lengths(path: Path | None) -> list[int]:
    """Tokens of each prompt, by the length of its text."""
    if path is None:
        records = packaged_records()
        texts = [r.get("prompt") or r["messages"][-1]["content"] for r in records]
    else:
        try:
            texts = [line for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise EdgeDtmError(f"{path} cannot be read as UTF-8 text ({error})") from None
    return [1 + len(text) // CHARACTERS_A_TOKEN for text in texts]


def _table(stages: Sequence[Stage], on_gpu: bool) -> Table:
    table = Table("stage", box=None, header_style="")
    for name in ("time", "memory", *(["GPU memory"] if on_gpu else []), "disk"):
        table.add_column(name, justify="right")
    for s in stages:
        sizes = [s.memory_bytes, *([s.gpu_bytes] if on_gpu else []), s.disk_bytes]
        table.add_row(s.name, duration(s.seconds), *map(_gb, sizes))
    peaks = [max(s.memory_bytes for s in stages)]
    peaks += [max(s.gpu_bytes for s in stages)] if on_gpu else []
    peaks.append(max(s.disk_bytes for s in stages))
    table.add_row("all", duration(sum(s.seconds for s in stages)), *map(_gb, peaks))
    return table


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
