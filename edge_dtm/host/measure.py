"""What llama.cpp answers with a GGUF: the noise floor, and plans exported and replayed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import digest_of
from edge_dtm.core.metrics import compare, divergent_mask, perplexity
from edge_dtm.core.work import Kind
from edge_dtm.formats.plan import Plan
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import HELD_OUT, PACKAGED, Reference
from edge_dtm.host import export
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.gguf_checkpoint import GgufCheckpoint
from edge_dtm.host.checkpoint.pre_tokenizer import PROBE_TEXTS, tokenization_mismatches
from edge_dtm.host.values import Encoded, Measurement, NoiseFloor, Run
from edge_dtm.llamacpp.runner import LlamaRunner
from edge_dtm.llamacpp.schedule import context_needed, replay_tokens

RECORD: Kind[Record] = Kind("record", ".npz", Record.load, lambda record, path: record.save(path))
NEAR_TIE_PERCENTILE = 95


def model_path(run: Run) -> Path:
    """Where the plan's GGUF lies until the bundle is finished."""
    return run.work.folder / "model.gguf"


def noise_floor(run: Run, reference: Reference) -> NoiseFloor:
    """SDT and FDT of the uncompressed F16 model in llama.cpp: nothing can be below that."""
    held_out = reference.part(HELD_OUT)

    def make(_: Path) -> Record:
        if is_f16_file(run.checkpoint):
            return replay(run, run.checkpoint.path, held_out, "Noise floor in llama.cpp")
        fixed_bytes = export.fixed_bytes(run.checkpoint)
        plan = export.f16_plan(run.checkpoint, fixed_bytes)
        path = run.work.folder / "f16.gguf"
        with run.stages("Exporting F16", sum(c.weights for c in plan.components)) as advance:
            export.export_gguf(run.checkpoint, plan, path, {}, advance)
        record = replay(run, path, held_out, "Noise floor in llama.cpp")
        path.unlink()
        return record

    inputs = ["noise floor", run.key, run.run_settings.to_json()]
    record = run.work.load_or_make(RECORD, inputs, make)
    mask = divergent_mask(held_out.generated_ids, record.ids, held_out.generated_lengths)
    ties = held_out.margins[mask]
    margin = float(np.percentile(ties, NEAR_TIE_PERCENTILE)) if ties.size else 0.0
    return NoiseFloor(against(held_out, record, margin), margin)


def is_f16_file(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a GGUF whose tensors are what exporting it in F16 makes of them."""
    return isinstance(checkpoint, GgufCheckpoint) and all(
        checkpoint.stored[name].type == ("F32" if len(shape) == 1 else "F16")
        for name, shape in checkpoint.shapes().items()
    )


def replay(run: Run, path: Path, part: Reference, title: str) -> Record:
    """Feed the reference's tokens through llama.cpp."""
    with (
        run.stages(title, replay_tokens(part)) as advance,
        LlamaRunner(path, run.run_settings, context_needed(part)) as runner,
    ):
        return runner.teacher_forced(part, advance)


def against(part: Reference, record: Record, near_tie_margin: float) -> Measurement:
    """What a record of these sequences amounts to. near_tie_margin: logits."""
    lengths = part.generated_lengths
    return Measurement(
        record,
        compare(part.generated_ids, record.ids, lengths, part.margins, near_tie_margin),
        perplexity(record.reference_log_probabilities, lengths),
    )


def export_and_measure(
    run: Run,
    plan: Plan,
    encoded: Encoded,
    vectors: Checkpoint,
    reference: Reference,
    floor: NoiseFloor,
) -> Measurement:
    """The plan as `model_path`, and its measurement on the held-out part.

    vectors: the checkpoint whose norm gains and biases go into the file.
    """
    key = export_plan(run, plan, encoded, vectors)
    path = model_path(run)
    texts = [*PROBE_TEXTS, *(str(t) for t in reference.texts)]
    wrong = tokenization_mismatches(run.checkpoint.tokenizer, path, texts)
    if wrong:
        raise EdgeDtmError(
            f"llama.cpp tokenizes {len(wrong)} of {len(texts)} strings otherwise than the "
            f"checkpoint's tokenizer, first: {wrong[0]}; this tokenizer is not supported"
        )
    held_out = reference.part(HELD_OUT)
    record = run.work.load_or_make(
        RECORD,
        ["held out", run.key, key, run.run_settings.to_json()],
        lambda _: replay(run, path, held_out, "Plan in llama.cpp"),
    )
    return against(held_out, record, floor.near_tie_margin)


def on_packaged_prompts(run: Run, reference: Reference, floor: NoiseFloor) -> Measurement | None:
    """With prompts of the user's own: the same file on the packaged prompts, none of which were
    calibrated on, to show what the plan gave up outside the user's domain."""
    packaged = reference.part(PACKAGED)
    if not len(packaged):
        return None
    record = run.work.load_or_make(
        RECORD,
        ["packaged", run.key, _mark(run).read_text(), run.run_settings.to_json()],
        lambda _: replay(run, model_path(run), packaged, "Packaged prompts in llama.cpp"),
    )
    return against(packaged, record, floor.near_tie_margin)


def _mark(run: Run) -> Path:
    """Says what `model_path` was made of."""
    return run.work.folder / "model.json"


def export_plan(run: Run, plan: Plan, encoded: Encoded, vectors: Checkpoint) -> str:
    """Write `model_path`, unless an earlier run left the very same. Returns the key of what is in
    it."""
    path, mark = model_path(run), _mark(run)
    key = digest_of([plan.hash, encoded.key])
    if not mark.is_file() or mark.read_text() != key or not _holds(path, plan):
        mark.unlink(missing_ok=True)
        weights = sum(c.weights for c in plan.components)
        with run.stages("Exporting the plan", weights) as advance:
            export.export_gguf(vectors, plan, path, encoded.encoded, advance)
        mark.write_text(key)
    return key


def _holds(path: Path, plan: Plan) -> bool:
    """Whether a file left by an earlier run is the plan's, by its own words and its tensors."""
    try:
        field = gguf.GGUFReader(path).get_field(export.KEY_PLAN)
        if field is None or field.contents() != plan.hash:
            return False
        export.compare_with_plan(path, plan)
    except (EdgeDtmError, ValueError, OSError, IndexError, KeyError):
        return False
    return True
