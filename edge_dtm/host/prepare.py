"""The start of `compress`: all that can fail early fails here, before the long part."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import default_threads
from edge_dtm.core.progress import Stages
from edge_dtm.core.work import Work
from edge_dtm.formats import bundle
from edge_dtm.formats.ggml_types import SPARSE_TYPES
from edge_dtm.formats.imatrix import check_imatrix, read_imatrix
from edge_dtm.formats.plan import Component, Treatment, least_bytes_with_zeros
from edge_dtm.formats.record import RunSettings
from edge_dtm.formats.reference import Reference
from edge_dtm.host import export
from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.checkpoint.model import choose_device
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.checkpoint.weights import WeightsCheck
from edge_dtm.host.estimate import estimate, measure_speed
from edge_dtm.host.measure import is_f16_file
from edge_dtm.host.room import check_room, duration, free_room, largest_plan_bytes, run_sizes
from edge_dtm.host.settings import Goal, Settings
from edge_dtm.host.trajectory.generate import check_lengths
from edge_dtm.host.trajectory.prompts import packaged_prompts, read_prompts
from edge_dtm.host.trajectory.reference import REFERENCE, reference_inputs, text_size
from edge_dtm.host.values import Base, Budget, Run
from edge_dtm.search.budget import byte_budget

UNLIMITED_BYTES = 2**62
COMPUTE_BUFFER_BYTES = 64 * 2**20  # llama.cpp's graph buffers, besides the logits of one batch


def open_run(settings: Settings, stages: Stages) -> tuple[Run, Base]:
    """The settings, checked against the model and this machine. EdgeDtmError on anything that
    cannot be done."""
    source, goal = settings.source, settings.goal
    device = choose_device(settings.method.device)
    checkpoint = open_checkpoint(source.model)
    if checkpoint.on_grid:
        stages.note(
            f"warning: {source.model.name} is already quantized ({checkpoint.on_grid}): its "
            "weights lie on that grid, which flatters types of the same grid; start from the "
            "unquantized checkpoint where you can"
        )
    components, fixed_bytes = checkpoint.components(), export.fixed_bytes(checkpoint)
    check_types(components, goal.types)
    imatrix = None
    if source.imatrix is not None:
        imatrix = read_imatrix(source.imatrix)
        check_imatrix(imatrix, components)
    _check_folder(settings.out)
    tokenizer = checkpoint.tokenizer
    prompts = (
        read_prompts(source.prompts, tokenizer) if source.prompts else packaged_prompts(tokenizer)
    )
    check_lengths(prompts, source.tokens, checkpoint.config.context_length)
    f16_bytes = export.f16_plan(checkpoint, fixed_bytes).size_bytes
    run_settings = RunSettings(threads=default_threads())
    budget = budget_of(goal, checkpoint.config, f16_bytes, run_settings)
    stages.note(budget.text)
    check_sizes(components, fixed_bytes, goal, budget)
    plan_bytes = largest_plan_bytes(components, fixed_bytes, goal.types, budget.max_bytes)
    text = text_size([len(p.ids) for p in prompts], source)
    sizes = run_sizes(
        settings, checkpoint.config, text, plan_bytes, device, not is_f16_file(checkpoint)
    )
    expected = estimate(sizes, measure_speed(device))
    check_room(expected, free_room(settings.out, device), settings.out)
    work = _work_folder(settings, stages)
    stages.note(f"About {duration(sum(s.seconds for s in expected))}, if nothing is there yet.")
    weights = WeightsCheck(checkpoint)
    weights.start()
    inputs = reference_inputs(weights.fingerprint, source, prompts)
    key = _key(work.path_of(REFERENCE, inputs))
    run = Run(
        settings=settings,
        stages=stages,
        work=work,
        device=device,
        run_settings=run_settings,
        checkpoint=checkpoint,
        weights=weights,
        key=key,
        f16_bytes=f16_bytes,
        budget=budget,
        prompts=tuple(prompts),
        imatrix=imatrix,
    )
    return run, Base(checkpoint, key, fixed_bytes)


def reopen_run(
    settings: Settings, stages: Stages, threads: int | None = None
) -> tuple[Run, Base, Reference]:
    """The run whose work folder is in settings.out, and its reference, for the benchmarks.

    Seed, tokens and prompts are the earlier run's, whatever settings say of them; there is no
    budget. EdgeDtmError when there is no work folder of this model.
    """
    if not settings.source.model.exists():
        raise EdgeDtmError(
            f"{settings.source.model} does not exist: give the model the bundle was made from"
        )
    checkpoint = open_checkpoint(settings.source.model)
    weights = WeightsCheck(checkpoint)
    work = Work(settings.out / "work", stages.note)
    references = [
        (path, reference)
        for path in work.folder.glob(f"{REFERENCE.name}-*{REFERENCE.suffix}")
        if (reference := Reference.load(path)).provenance.get("model_fingerprint")
        == weights.fingerprint
    ]
    if not references:
        raise EdgeDtmError(
            f"{work.folder} holds no reference of {settings.source.model.name}: run edge-dtm "
            "compress first, with the same model, and keep its work folder"
        )
    if len(references) > 1:
        stages.note(f"{len(references)} references of this model in the work folder: newest taken")
    path, reference = max(references, key=lambda entry: entry[0].stat().st_mtime)
    source = replace(
        settings.source,
        tokens=int(reference.provenance["tokens"]),
        seed=int(reference.provenance["seed"]),
    )
    fixed_bytes = export.fixed_bytes(checkpoint)
    key = _key(path)
    run = Run(
        settings=replace(settings, source=source),
        stages=stages,
        work=work,
        device=choose_device(settings.method.device),
        run_settings=RunSettings(threads=threads or default_threads()),
        checkpoint=checkpoint,
        weights=weights,
        key=key,
        f16_bytes=export.f16_plan(checkpoint, fixed_bytes).size_bytes,
        budget=Budget(UNLIMITED_BYTES, "Budget: none."),
    )
    return run, Base(checkpoint, key, fixed_bytes), reference


def _key(path: Path) -> str:
    """What names the run, from the name of its reference."""
    return path.name.removeprefix(f"{REFERENCE.name}-").removesuffix(REFERENCE.suffix)


def check_types(components: Sequence[Component], types: Sequence[str]) -> None:
    unfit = [c.name for c in components if not any(c.fits(t) for t in types)]
    if unfit:
        raise EdgeDtmError(
            f"none of --types {','.join(types)} divides the rows of {len(unfit)} components "
            f"({', '.join(unfit[:3])}, ...): add a type with blocks of 32, for example Q8_0"
        )


def budget_of(goal: Goal, config: ModelConfig, f16_bytes: int, run_settings: RunSettings) -> Budget:
    """The profile's, which --max-bytes overrides."""
    if goal.unlimited:
        return Budget(UNLIMITED_BYTES, "Budget: none, the experiment decides the size.")
    if goal.max_bytes is not None:
        return Budget(goal.max_bytes, f"Budget: {goal.max_bytes:,} bytes, as asked for.")
    budget = byte_budget(
        goal.profile,
        kv_bytes_per_token=config.kv_bytes_per_token,
        compute_buffer_bytes=COMPUTE_BUFFER_BYTES + run_settings.batch_tokens * config.vocab * 4,
        f16_file_bytes=f16_bytes,
        n_ctx=min(goal.profile.n_ctx, config.context_length),
    )
    return Budget(budget.bytes, budget.explain())


def check_sizes(
    components: Sequence[Component], fixed_bytes: int, goal: Goal, budget: Budget
) -> None:
    """EdgeDtmError when no plan keeps the budget, or the zeros asked for do not fit it."""
    smallest = fixed_bytes + sum(
        min(c.size_bytes(Treatment(t)) for t in goal.types if c.fits(t)) for c in components
    )
    if smallest > budget.max_bytes:
        raise EdgeDtmError(
            f"the smallest plan takes {smallest:,} bytes, the budget is {budget.max_bytes:,}: "
            "raise --max-bytes, allow smaller --types or choose a smaller model"
        )
    if not goal.sparsity:
        return
    needed = fixed_bytes + least_bytes_with_zeros(components, goal.types, goal.sparsity)
    holders = " and ".join(SPARSE_TYPES)
    if needed == float("inf"):
        raise EdgeDtmError(
            f"an average of {goal.sparsity:.0%} zeros cannot be reached with --types "
            f"{','.join(goal.types)}: zeros are put into {holders} only; allow one of these or "
            "lower --sparsity"
        )
    if needed > budget.max_bytes:
        raise EdgeDtmError(
            f"an average of {goal.sparsity:.0%} zeros takes about {needed:,.0f} bytes, since zeros "
            f"are put into {holders} only, and the budget is {budget.max_bytes:,}: raise "
            "--max-bytes or lower --sparsity"
        )


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise EdgeDtmError(f"{out} is a file: give a folder to -o")
    known = {
        "work",
        bundle.MANIFEST,
        bundle.SIGNATURE,
        *bundle.LISTED_FILES,
        *bundle.TOLERATED_FILES,
    }
    foreign = sorted(p.name for p in out.iterdir() if p.name not in known) if out.exists() else []
    if foreign:
        raise EdgeDtmError(
            f"{out} holds other files ({', '.join(foreign[:3])}): give a new or a bundle's folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgeDtmError(
            f"{out} cannot be made ({error.strerror}): choose another folder"
        ) from None


def _work_folder(settings: Settings, stages: Stages) -> Work:
    folder = settings.out / "work"
    if not settings.resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return Work(folder, stages.note)
