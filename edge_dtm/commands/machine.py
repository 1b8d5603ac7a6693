"""Commands about this machine: doctor, bench, and the profiles of devices."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_dtm.commands.common import (
    PATH,
    THREADS,
    json_option,
    load_profile,
    require_writable,
    write_json,
)
from edge_dtm.core.errors import EdgeDtmError

if TYPE_CHECKING:
    from edge_dtm.device.performance import Performance
    from edge_dtm.formats.profile import DeviceProfile

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}


@click.command()
@click.argument("bundle_or_gguf", required=False, type=PATH)
@click.option(
    "--n-ctx",
    type=click.IntRange(1),
    default=2048,
    help="Length of the context, in tokens, that must fit into memory.",
)
@json_option("the findings")
def doctor(bundle_or_gguf: Path | None, n_ctx: int, json_file: Path | None) -> None:
    """Find what is wrong or slow on this machine, with a command to fix each.

    Checks whether llama.cpp uses what the CPU can do, decodes a small model, and looks at threads,
    frequency, memory and swap. With a bundle or a GGUF file, also checks its types and the memory it
    needs. Exit status 1 if anything is an error.
    """
    from rich.console import Console
    from rich.markup import escape

    from edge_dtm.device.cpu import read_cpu
    from edge_dtm.device.doctor import errors, examine, to_json

    require_writable(bundle_or_gguf, json_file)
    findings = examine(bundle_or_gguf, n_ctx)
    console = Console()
    for finding in findings:
        colour = _COLOURS[finding.level]
        label = f"[{colour}]{finding.level:7}[/{colour}]"
        text = f"{label} [bold]{escape(finding.what)}[/bold]\n        {escape(finding.why)}"
        if finding.command:
            text += f"\n        [bold]$[/bold] {escape(finding.command)}"
        # Never wrapped, so that a command can be copied.
        console.print(text, highlight=False, soft_wrap=True)
    write_json(json_file, to_json(findings, read_cpu()))
    if wrong := errors(findings):
        raise EdgeDtmError(f"{'; '.join(f.what for f in wrong)}: see above what mends it")


@click.command()
@click.argument("source", metavar="BUNDLE_OR_GGUF", type=PATH)
@THREADS
@click.option(
    "--threads-sweep",
    is_flag=True,
    help="Try every number of threads up to --threads; measure with the fastest.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, 3600, min_open=True),
    default=10.0,
    help="How long to decode, about.",
)
@click.option(
    "--profile",
    type=load_profile,
    metavar="PROFILE",
    help="Device profile to compare with [default: the bundle's].",
)
@json_option("the figures")
def bench(
    source: Path,
    threads: int | None,
    threads_sweep: bool,
    seconds: float,
    profile: DeviceProfile | None,
    json_file: Path | None,
) -> None:
    """Measure speed, memory, energy and temperature of a model on this machine.

    Compares the speed with the estimate of the device profile. Energy, temperature and throttling
    need sensors; without one, the output says why the figure is missing."""
    from edge_dtm.core.machine import default_threads
    from edge_dtm.device import performance
    from edge_dtm.device.first_decode import first_decode_in_child
    from edge_dtm.device.inputs import is_gguf
    from edge_dtm.formats import bundle as bundles
    from edge_dtm.formats.archive import open_bundle
    from edge_dtm.formats.profile import packaged_profile
    from edge_dtm.formats.record import RunSettings
    from edge_dtm.llamacpp.gguf_header import check_gguf, require_memory

    require_writable(source, json_file)
    most = threads or default_threads()
    # One sequence, as in use.
    settings = RunSettings(threads=most, parallel_sequences=1)
    with ExitStack() as stack:
        model = source
        if not is_gguf(source):
            bundle = stack.enter_context(open_bundle(source))
            bundle.check()
            model = bundle.path(bundles.MODEL)
            profile = profile or packaged_profile(bundle.manifest.provenance.get("profile"))
        check_gguf(model)
        first_decode_in_child()
        require_memory(model, settings, performance.CONTEXT_TOKENS)
        sweep = range(1, most + 1) if threads_sweep else ()
        measured = performance.measure(model, settings, seconds, sweep)
    estimate = None
    if profile is not None:
        estimate = performance.estimated_tokens_per_s(measured, profile)
    sentences = performance.in_words(measured, profile)
    data = measured.to_json() | {
        "profile": profile and profile.name,
        "estimated_decode_tokens_per_s": estimate,
        "sentences": sentences,
    }
    _print_performance(measured, profile, estimate)
    for sentence in sentences:
        click.echo(sentence)
    write_json(json_file, data)


def _print_performance(
    p: Performance, profile: DeviceProfile | None, estimate: float | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    from edge_dtm.report.numbers import plural

    zone = max(p.temperatures_c_after, key=p.temperatures_c_after.__getitem__, default="")
    before, after = (t.get(zone) for t in (p.temperatures_c_before, p.temperatures_c_after))
    start = "" if before is None else f"{before:.0f} to "
    rows = (
        ("decode, tokens/s", p.decode_tokens_per_s, ".1f"),
        ("prefill, tokens/s", p.prefill_tokens_per_s, ".1f"),
        (f"first token of a prompt of {p.prompt_tokens}, s", p.time_to_first_token_s, ".2f"),
        ("decoded token, ms, p50", p.decode_ms_p50, ".1f"),
        ("decoded token, ms, p95", p.decode_ms_p95, ".1f"),
        ("peak memory of the process, MB", p.peak_rss_bytes / 1e6, ".0f"),
        (f"energy, J/token ({p.power_sensor})", p.energy_j_per_token, ".3g"),
        ("power while decoding, W", p.mean_power_w, ".2f"),
        (f"temperature, °C ({zone})", None if after is None else f"{start}{after:.0f}", ""),
        ("clock, share of its maximum", p.clock_share, ".0%"),
        (f"estimated decode, tokens/s ({profile and profile.name})", estimate, ".1f"),
    )
    table = Table("", title=f"{p.model_bytes / 1e6:.1f} MB, {p.threads} threads")
    table.add_column("measured", justify="right")
    for label, value, form in rows:
        if value is not None:
            table.add_row(label, format(value, form))
    for s in p.sweep:
        speeds = f"{s.decode_tokens_per_s:.1f}, {s.prefill_tokens_per_s:.1f}"
        table.add_row(f"decode, prefill, tokens/s, {plural(s.threads, 'thread')}", speeds)
    Console().print(table)


@click.group()
def profiles() -> None:
    """Device profiles: memory and speed of a device."""


@profiles.command("list")
def profiles_list() -> None:
    """List the packaged profiles."""
    from edge_dtm.formats.profile import list_profiles

    for p in list_profiles():
        click.echo(f"{p.name:18} {p.ram_bytes / 1e9:5.1f} GB RAM  {p.description}")


@profiles.command("show")
@click.argument("profile", metavar="NAME", type=load_profile)
def profiles_show(profile: DeviceProfile) -> None:
    """Show every number of a profile with its source."""
    for field in fields(profile):
        if field.name != "sources":
            click.echo(f"{field.name} = {getattr(profile, field.name)}")
        if field.name in profile.sources:
            click.echo(f"    {profile.sources[field.name]}")


@profiles.command("detect")
@click.option("-o", "--output", type=PATH, help="File to write [default: NAME.toml].")
@click.option("--name", help="Name of the profile [default: from the board or the CPU].")
def profiles_detect(output: Path | None, name: str | None) -> None:
    """Measure this machine and write its profile, for `compress --profile FILE.toml`.

    Decodes random models in llama.cpp to measure the memory bandwidth. That takes about a minute
    and at least 256 MB in the temporary folder. Run nothing else meanwhile.
    """
    from edge_dtm.core.files import write_whole
    from edge_dtm.core.machine import board
    from edge_dtm.core.progress import Stages
    from edge_dtm.device.cpu import read_cpu
    from edge_dtm.device.detect import check_name, default_name, detect, to_toml

    root = Path("/")
    name = check_name(name or default_name(board(root), read_cpu(root)))
    path = output or Path(f"{name}.toml")
    if path.suffix != ".toml":
        raise EdgeDtmError(f"{path} is no name for a profile: let it end in .toml")
    if os.path.lexists(path):
        raise EdgeDtmError(f"{path} exists already: give another name with -o, or remove it")
    require_writable(None, path)
    with Stages().several() as progress:
        profile = detect(name, root, progress)
    write_whole(path, to_toml(profile).encode())
    click.echo(
        f"{path}: {profile.description}; {profile.effective_bandwidth_bytes_per_s / 1e9:.2f}e9 "
        f"bytes/s while decoding, threads: {profile.threads}, "
        f"{(profile.ram_bytes - profile.reserve_bytes) / 1e9:.1f} GB for a model"
    )
