"""What goes into a distillation, and how its result becomes a checkpoint or a file again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.ggml_types import facts
from edge_dtm.formats.plan import Component, Plan, Treatment
from edge_dtm.formats.reference import HELD_OUT, PACKAGED, Reference
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.derived import EditedCheckpoint, write_edited
from edge_dtm.host.checkpoint.model import load_model
from edge_dtm.host.distill.result import Distilled
from edge_dtm.host.distill.teacher import TeacherText, reference_sequences, sample_texts
from edge_dtm.host.distill.trained import Trained
from edge_dtm.host.trajectory.prompts import Prompt
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.host.values import Encoded, Run
from edge_dtm.llamacpp import ggml

ByteArray = npt.NDArray[np.uint8]
SAMPLED_TEXTS = 512  # about 8 minutes of sampling for SmolLM2 on two cores
SAMPLED_TOKENS = 128
FEWEST_TEXTS = 32


def texts_for(steps: int, batch_tokens: int) -> int:
    """How many texts to sample for so many steps: no more than are read once."""
    return int(np.clip(steps * batch_tokens // SAMPLED_TOKENS, FEWEST_TEXTS, SAMPLED_TEXTS))


def teacher_text(run: Run, reference: Reference, count: int) -> TeacherText:
    """The original's greedy answers to the fitted rows and `count` texts sampled from it, with its
    hidden states there, kept in the work folder.

    Starts of sampled texts are the first tokens of prompts that are not held out.
    """
    folder = run.work.path("text", [run.key, count])
    model = load_model(run.checkpoint, run.device)
    usable = np.flatnonzero((reference.split != HELD_OUT) & (reference.split != PACKAGED))
    starts = [Prompt(tuple(reference.prompt(r)), str(reference.texts[r])) for r in usable.tolist()]
    with run.stages("Sampling texts to distill on", count * SAMPLED_TOKENS) as advance:
        sampled = sample_texts(
            model,
            starts,
            count,
            SAMPLED_TOKENS,
            run.settings.source.seed,
            run.checkpoint.tokenizer.eos_ids,
            parts=folder / "sampled",
            progress=advance,
        )
    answers = reference_sequences(reference.rows(calibration_rows(reference)[1]))
    text = TeacherText(folder, answers + sampled, run.checkpoint.config.hidden)
    with run.stages("The original's hidden states on them", text.tokens) as advance:
        text.capture(model, advance)
    return text


def start_values(checkpoint: Checkpoint, plan: Plan, encoded: Encoded) -> dict[str, Trained]:
    """Every component as the plan ships it, rows as Hugging Face orders them."""
    out = {}
    for c, t in zip(plan.components, plan.treatments, strict=True):
        values = ggml.dequantize(t.type, np.asarray(encoded.encoded(c, t)), c.row_length)
        importance = encoded.importance(c.name) if facts(t.type).importance != "ignored" else None
        out[c.name] = Trained(t, importance, checkpoint.hf_rows(c.name, values))
    return out


def with_values(checkpoint: Checkpoint, result: Distilled, file: Path) -> EditedCheckpoint:
    """The checkpoint with all that was trained, for a model that is treated further."""
    tensors = {n + ".weight": v for n, v in result.values.items() if n.startswith("blk.")}
    write_edited(file, {**tensors, **result.vectors})
    return EditedCheckpoint(checkpoint, file)


def with_vectors(checkpoint: Checkpoint, result: Distilled, file: Path) -> EditedCheckpoint:
    """The checkpoint with the trained norm gains; its matrices are exported from their blocks."""
    write_edited(file, result.vectors)
    return EditedCheckpoint(checkpoint, file)


@dataclass(frozen=True)
class DistilledStore:
    """What distillation trained, in place of the bytes that it began with.

    key: of the distillation. checkpoint: has the order of rows.
    """

    key: str
    checkpoint: Checkpoint
    result: Distilled
    before: Encoded

    def importance(self, name: str) -> npt.NDArray[np.float32] | None:
        return self.before.importance(name)

    def encoded(self, component: Component, treatment: Treatment) -> ByteArray:
        """uint8 (rows, row_bytes), rows as GGUF orders them."""
        data = self.result.blocks.get(component.name)
        if data is None:
            return self.before.encoded(component, treatment)
        rows: ByteArray = self.checkpoint.gguf_rows(component.name, data)
        return rows


def head_weight(checkpoint: Checkpoint) -> torch.Tensor:
    """The head's weight, float32 (vocab, hidden)."""
    name = "token_embd" if checkpoint.config.tied else "output"
    return torch.from_numpy(np.array(checkpoint.hf_tensor(name + ".weight")))
