"""Removal as a stage: what goes, the smaller model that is left, and the proof that llama.cpp runs
it as torch does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_dtm.core.digest import digest_of
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import write_whole
from edge_dtm.formats import ggml_types
from edge_dtm.formats.plan import Plan, Treatment
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import HELD_OUT, Reference
from edge_dtm.host import export, removal
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.edited import EditedCheckpoint
from edge_dtm.host.distill.retrain import plain_values
from edge_dtm.host.distill.stage import recover_base
from edge_dtm.search.structure import UnitOptions, remove_share, removed_share, worth_removing

if TYPE_CHECKING:
    from edge_dtm.host.compress import Pipeline

REMOVE_IF_WORTH = 0.0  # as the wanted share: the search decides
HALF_MARGIN = 0.05  # logits; half-precision weights and KV cache move margins by less


def neuron_block(types: Sequence[str], config_ffn: int) -> int:
    """Neurons are kept in multiples of this, so that every type that fits the whole `ffn_down`
    fits what is left of it."""
    return max([32, *(b for t in types if config_ffn % (b := ggml_types.block_size(t)) == 0)])


def unit_options(
    checkpoint: Checkpoint, units: Sequence[removal.Unit], types: Sequence[str]
) -> list[UnitOptions]:
    """The units as the search sees them: with the options that leave rows of `attn_output` which
    one of the types divides. (What is left of `ffn_down` they all do, see `neuron_block`.)"""
    c = checkpoint.config
    width = c.heads // c.kv_heads * c.head_dim
    by_name = {c.name: c for c in checkpoint.components()}
    parts = {
        "attn": ("attn_q", "attn_k", "attn_v", "attn_output"),
        "ffn": ("ffn_gate", "ffn_up", "ffn_down"),
    }
    out = []
    for u in units:
        names = tuple(f"blk.{u.layer}.{p}" for p in parts[u.part])
        left = [
            o
            for o in u.options
            if u.part == "ffn" or any(o.kept * width % ggml_types.block_size(t) == 0 for t in types)
        ]
        out.append(
            UnitOptions(
                f"{u.layer}.{u.part}",
                names,
                sum(by_name[n].weights for n in names),
                len(u.order),
                tuple(o.kept for o in left),
                tuple(o.cost for o in left),
            )
        )
    return out


def remove(run: Pipeline, reference: Reference) -> None:
    """With --remove: KV groups and neurons go, and the base becomes a smaller dense model."""
    s, checkpoint = run.s, run.checkpoint
    if s.remove is None:
        return
    said = [run.key, s.remove, s.types]
    if s.remove == REMOVE_IF_WORTH:  # then costs and budget decide too
        said += [run.max_bytes, run.method(s)]
    file = run.work / f"removed-{digest_of(said)}.json"
    if not file.is_file():
        units, chosen, options = _chosen(run, reference)
        state: dict[str, Any] = {
            "chosen": chosen,
            "removed_share": removed_share(options, chosen),
            "parts": len(options),
        }
        if chosen:
            reduced = _made(run, units, chosen, file.with_suffix(".safetensors"), reference)
            state["kept_kv_heads"] = reduced.config.kept_kv_heads
            state["kept_ffn"] = reduced.config.kept_ffn
        write_whole(file, json.dumps(state).encode())
    state = json.loads(file.read_text())
    run.story["removal"] = {"removed_share": state["removed_share"], "kept": state["chosen"]}
    if not state["chosen"]:
        run.stages.note("Removal: at this size it buys nothing that cheaper types do not; none.")
        run.rebase(checkpoint)
        return
    heads, neurons = (
        None if state[k] is None else tuple(state[k]) for k in ("kept_kv_heads", "kept_ffn")
    )
    config = replace(checkpoint.config, kept_kv_heads=heads, kept_ffn=neurons)
    reduced = EditedCheckpoint(checkpoint, file.with_suffix(".safetensors"), config)
    left = export.f16_plan(reduced, export.fixed_bytes(reduced)).size_bytes
    measured = run.judge(Record.load(_record(run, reduced)), reference.part(HELD_OUT))
    run.stages.note(
        f"Removal: {state['removed_share']:.1%} of the block matrices go, in "
        f"{len(state['chosen'])} of {state['parts']} parts; {left:,} of {run.f16_bytes:,} bytes are "
        f"left in F16, with an SDT of {measured.divergence.sdt.value:.2%}"
    )
    run.story["removal"] |= {
        "f16_bytes": left,
        "measured": {**measured.divergence.to_json(), "perplexity": measured.perplexity},
    }
    run.rebase(reduced)
    if s.recover_steps:
        untouched = Plan(
            run.components, tuple(Treatment("F32") for _ in run.components), run.fixed_bytes
        )
        recover_base(
            run, untouched, plain_values(run.base, run.components), reference, "after removal"
        )


def measured_units(run: Pipeline, reference: Reference) -> list[removal.Unit]:
    """The units of the checkpoint with their costs, from the work folder or measured now."""
    checkpoint = run.checkpoint
    activations, calibration = run.captures(reference)
    run.capture(activations, calibration)
    with run.stages("Costs of removal", 2 * checkpoint.config.layers) as advance:
        return removal.measure_units(
            checkpoint,
            activations,
            calibration,
            run.torch_device,
            neuron_block(run.s.types, checkpoint.config.ffn),
            run.work / f"units-{run.key}.jsonl",
            advance,
        )


def _chosen(
    run: Pipeline, reference: Reference
) -> tuple[list[removal.Unit], dict[str, int], list[UnitOptions]]:
    """The units, what is kept of those that lose something, and the options of all."""
    s, units = run.s, measured_units(run, reference)
    options = unit_options(run.checkpoint, units, s.types)
    assert s.remove is not None
    if s.remove != REMOVE_IF_WORTH:
        return units, remove_share(options, s.remove), options
    keep = run.keep_activations, run.keep_calibration
    run.keep_activations = run.keep_calibration = True
    table, _ = run.costs(reference)
    run.keep_activations, run.keep_calibration = keep
    allowed = table.restricted(s.types, s.sparse)
    return units, worth_removing(options, allowed, run.max_bytes), options


def _made(
    run: Pipeline,
    units: Sequence[removal.Unit],
    chosen: Mapping[str, int],
    file: Path,
    reference: Reference,
) -> Checkpoint:
    """The smaller checkpoint, proved."""
    kept = {(int(n.split(".")[0]), n.split(".")[1]): k for n, k in chosen.items()}
    run.forget_model()
    activations, calibration = run.captures(reference)
    reduced = removal.reduce(run.checkpoint, units, kept, calibration, {}, file, run.torch_device)
    _check(run, reduced, units, kept, reference)
    if not run.keep_activations:
        activations.remove()
        calibration.remove()
    return reduced


def _record(run: Pipeline, reduced: Checkpoint) -> Path:
    return run.work / f"removed-{digest_of([run.key, reduced.check()])}.npz"


def _check(
    run: Pipeline,
    reduced: Checkpoint,
    units: Sequence[removal.Unit],
    kept: removal.Kept,
    reference: Reference,
) -> None:
    """llama.cpp runs the smaller model as torch runs the whole one with zeros in its place: the
    same argmax at every held-out position, near-ties apart. EdgeDtmError when not."""
    saved = _record(run, reduced)
    held_out = reference.part(HELD_OUT)
    if not saved.is_file():
        plan = export.f16_plan(reduced, export.fixed_bytes(reduced))
        path = run.work / "removed.gguf"
        with run.stages(
            "Exporting the smaller model", sum(c.weights for c in plan.components)
        ) as advance:
            export.export_gguf(reduced, plan, path, {}, advance)
        found = run.measure(path, reference, "The smaller model in llama.cpp")
        path.unlink()
        with run.stages("The masked model in torch", 1):
            masked = removal.masked(run.checkpoint, reduced, units, kept, run.torch_device)
            differing = removal.disagreements(masked, held_out, found.record.ids)
        wide = [d for d in differing if not d.margin <= HALF_MARGIN]
        total = found.divergence.tokens
        if wide:
            raise EdgeDtmError(
                f"llama.cpp and torch disagree on the smaller model at {len(wide)} of {total:,} "
                f"positions, with margins up to {max(d.margin for d in wide):.3f}: please report "
                "this"
            )
        largest = max((d.margin for d in differing), default=0.0)
        run.stages.note(
            f"The smaller model in llama.cpp has the masked model's argmax at "
            f"{total - len(differing):,} of {total:,} positions"
            + (f"; largest margin at the others {largest:.4f}" if differing else "")
        )
        found.record.save(saved)
