"""How fast and how large a bundle runs here."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_dtm.commands.common import PATH, require_folder_of, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from edge_dtm.device.performance import Performance
    from edge_dtm.formats.profile import DeviceProfile


@click.command()
@click.argument("source", metavar="BUNDLE_OR_GGUF", type=PATH)
@click.option("--threads", type=click.IntRange(1), help="CPU threads [default: all cores].")
@click.option(
    "--threads-sweep",
    is_flag=True,
    help="Try every number of threads up to --threads; measure with the fastest.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, 3600, min_open=True),
    default=10.0,
    show_default=True,
    help="How long to decode, about.",
)
@click.option(
    "--profile", "profile_name", help="Device profile to compare with [default: the bundle's]."
)
@click.option("--json", "json_file", type=PATH, help="Also write the figures as JSON.")
def bench(
    source: Path,
    threads: int | None,
    threads_sweep: bool,
    seconds: float,
    profile_name: str | None,
    json_file: Path | None,
) -> None:
    """Measure speed, memory, energy and temperature of a model on this machine.

    Compares the speed with the estimate of the device profile. Energy, temperature and throttling
    need sensors; without one, the output says why the figure is missing."""
    from rich.console import Console

    from edge_dtm.core.machine import default_threads
    from edge_dtm.device.first_decode import first_decode_in_child
    from edge_dtm.device.performance import (
        CONTEXT_TOKENS,
        estimated_tokens_per_s,
        in_words,
        measure,
    )
    from edge_dtm.formats import bundle as bundles
    from edge_dtm.formats.archive import open_bundle
    from edge_dtm.formats.profile import load_profile, packaged_profile
    from edge_dtm.formats.record import RunSettings
    from edge_dtm.llamacpp.gguf_header import check_gguf
    from edge_dtm.llamacpp.memory import require_memory

    if json_file is not None:
        require_folder_of(json_file, source)
    profile = None if profile_name is None else load_profile(profile_name)
    most = threads or default_threads()
    # One sequence, as in use.
    settings = RunSettings(threads=most, parallel_sequences=1)
    with ExitStack() as stack:
        if _is_gguf(source):
            model = source
        else:
            bundle = stack.enter_context(open_bundle(source))
            bundle.check()
            model = bundle.path(bundles.MODEL)
            profile = profile or packaged_profile(bundle.manifest.provenance.get("profile"))
        check_gguf(model)
        first_decode_in_child(settings)
        require_memory(model, settings, CONTEXT_TOKENS)
        performance = measure(model, settings, seconds, range(1, most + 1) if threads_sweep else ())
    sentences = in_words(performance, profile)
    console = Console()
    _print(performance, profile, console)
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)
    if json_file is not None:
        estimate = None if profile is None else estimated_tokens_per_s(performance, profile)
        data = performance.to_json() | {
            "profile": None if profile is None else profile.name,
            "estimated_decode_tokens_per_s": estimate,
            "sentences": sentences,
        }
        write_json(json_file, data)


def _is_gguf(path: Path) -> bool:
    if path.is_dir():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _print(performance: Performance, profile: DeviceProfile | None, console: Console) -> None:
    from rich.table import Table

    from edge_dtm.device.performance import estimated_tokens_per_s

    table = Table(
        "",
        "measured",
        title=f"{performance.model_bytes / 1e6:.1f} MB, {performance.threads} threads",
    )
    table.columns[1].justify = "right"
    rows = {
        "decode, tokens/s": f"{performance.decode_tokens_per_s:.1f}",
        "prefill, tokens/s": f"{performance.prefill_tokens_per_s:.1f}",
        f"first token of a prompt of {performance.prompt_tokens}, s": f"{performance.time_to_first_token_s:.2f}",
        "decoded token, ms, p50": f"{performance.decode_ms_p50:.1f}",
        "decoded token, ms, p95": f"{performance.decode_ms_p95:.1f}",
        "peak memory of the process, MB": f"{performance.peak_rss_bytes / 1e6:.0f}",
    }
    if performance.energy_j_per_token is not None and performance.mean_power_w is not None:
        rows[f"energy, J/token ({performance.power_sensor})"] = (
            f"{performance.energy_j_per_token:.3g}"
        )
        rows["power while decoding, W"] = f"{performance.mean_power_w:.2f}"
    if performance.temperatures_c_after:
        hottest = max(
            performance.temperatures_c_after,
            key=lambda zone: performance.temperatures_c_after[zone],
        )
        before = performance.temperatures_c_before.get(hottest)
        start = "" if before is None else f"{before:.0f} to "
        rows[f"temperature, °C ({hottest})"] = (
            f"{start}{performance.temperatures_c_after[hottest]:.0f}"
        )
    if performance.clock_share is not None:
        rows["clock, share of its maximum"] = f"{performance.clock_share:.0%}"
    if profile is not None:
        rows[f"estimated decode, tokens/s ({profile.name})"] = (
            f"{estimated_tokens_per_s(performance, profile):.1f}"
        )
    for label, value in rows.items():
        table.add_row(label, value)
    console.print(table)
    if performance.sweep:
        sweep = Table("threads", "prefill, tokens/s", "decode, tokens/s")
        for column in sweep.columns:
            column.justify = "right"
        for speed in performance.sweep:
            sweep.add_row(
                str(speed.threads),
                f"{speed.prefill_tokens_per_s:.1f}",
                f"{speed.decode_tokens_per_s:.1f}",
            )
        console.print(sweep)


COMMANDS = (bench,)
