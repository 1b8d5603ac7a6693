"""Commands of the device: verify a bundle, measure any GGUF."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_dtm.commands.common import (
    PATH,
    THREADS,
    TRUSTED_KEYS,
    grouped,
    json_option,
    require_writable,
    write_json,
)
from edge_dtm.core.errors import EdgeDtmError

if TYPE_CHECKING:
    from edge_dtm.device.verify import Options

EXIT_VERIFIED_AND_FAILED = 3


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--mode",
    type=click.Choice(["teacher-forced", "generate"]),
    default="teacher-forced",
    callback=lambda ctx, parameter, mode: mode.replace("-", "_"),
    help="teacher-forced: read the original's text; generate: decode one token a call.",
)
@THREADS
@click.option("--max-sequences", type=click.IntRange(1), help="Replay only the first N sequences.")
@click.option(
    "--max-sdt", type=click.FloatRange(0, 1), help="Replace the bundle's threshold (0.02 is 2 %)."
)
@click.option(
    "--min-fdt", type=click.FloatRange(0), help="Replace the bundle's threshold, in tokens."
)
@click.option(
    "--kernels",
    type=click.Choice(["check", "compare", "skip"]),
    default="check",
    help="check: compare single products with numpy's, and a small F16 model with the host's; "
    "compare: also replay without repacked weights; skip: neither.",
)
@TRUSTED_KEYS
@json_option("the verdict")
@click.option(
    "--record", type=PATH, help="Also write this device's answers, for `report --record`."
)
@grouped(options="edge_dtm.device.verify:Options")
def verify(bundle: Path, json_file: Path | None, record: Path | None, options: Options) -> None:
    """Replay the original's answers on this device: PASS (exit status 0) or FAIL (3).

    BUNDLE is a folder or a packed file."""
    from edge_dtm.core.machine import return_freed_buffers
    from edge_dtm.core.progress import Stages
    from edge_dtm.device.verify import verify as run
    from edge_dtm.report.verdict_table import print_verdict

    require_writable(bundle, json_file, record)
    return_freed_buffers()
    with Stages().several() as progress:
        verdict, answers = run(bundle, options, progress)
    print_verdict(verdict)
    write_json(json_file, verdict.to_json())
    if record is not None:
        answers.save(record)
    if not verdict.passed:
        sys.exit(EXIT_VERIFIED_AND_FAILED)


@click.command()
@click.argument("gguf_file", metavar="MODEL.gguf", type=PATH)
@click.option(
    "--reference",
    type=PATH,
    required=True,
    help="A bundle's folder, or a reference.npz (then near-ties are not counted).",
)
@THREADS
@json_option("the result")
def measure(gguf_file: Path, reference: Path, threads: int | None, json_file: Path | None) -> None:
    """Measure FDT and SDT of any GGUF against a reference, teacher-forced in llama.cpp."""
    from edge_dtm.core.machine import default_threads
    from edge_dtm.core.metrics import compare, divergent_mask, first_divergent_tokens, perplexity
    from edge_dtm.core.progress import Stages
    from edge_dtm.formats import bundle as bundles
    from edge_dtm.formats.record import RunSettings
    from edge_dtm.formats.reference import HELD_OUT, Reference
    from edge_dtm.llamacpp.gguf_header import check_gguf
    from edge_dtm.llamacpp.runner import LlamaRunner
    from edge_dtm.llamacpp.schedule import context_needed, replay_tokens
    from edge_dtm.report.summary import interval

    require_writable(reference, json_file)
    check_gguf(gguf_file)
    path = reference / bundles.REFERENCE if reference.is_dir() else reference
    held_out = Reference.load(path).part(HELD_OUT)
    if not len(held_out):
        raise EdgeDtmError(
            f"{path} has no held-out sequences: give the reference.npz of a bundle, or its folder"
        )
    near_tie = None
    if (reference / bundles.MANIFEST).is_file():
        manifest = bundles.Manifest.parse(bundles.read_head(reference)[0], str(reference))
        near_tie = manifest.noise_floor(reference).get("near_tie_margin")
    settings = RunSettings(threads=threads or default_threads())
    with (
        Stages()("Replaying", replay_tokens(held_out)) as advance,
        LlamaRunner(gguf_file, settings, context_needed(held_out)) as runner,
    ):
        record = runner.teacher_forced(held_out, advance)
    ids, lengths = held_out.generated_ids, held_out.generated_lengths
    result = compare(ids, record.ids, lengths, held_out.margins, near_tie or 0.0)
    first = first_divergent_tokens(divergent_mask(ids, record.ids, lengths), lengths)
    data = {
        **result.to_json(),
        "name": gguf_file.name,
        "perplexity": perplexity(record.reference_log_probabilities, lengths),
        "prefill_tokens_per_s": record.prefill_tokens_per_s,
        "size_bytes": gguf_file.stat().st_size,
        "first_divergent_tokens": first.tolist(),
        "lengths": lengths.tolist(),
    }
    click.echo(f"SDT {interval(data['sdt'], True)}")
    click.echo(f"mean FDT {interval(data['fdt'], False)} of at most {result.largest_fdt:.1f}")
    click.echo(f"{result.identical_share:.1%} of {result.sequences} sequences without divergence")
    if near_tie is None:
        data |= {"near_tie_share": None, "near_tie_margin": None}
    else:
        click.echo(f"near-ties (≤ {near_tie:.2g}) {result.near_tie_share:.2%}")
    click.echo(f"perplexity on the original's text {data['perplexity']:.4f}")
    write_json(json_file, data)
