"""Recovery as a stage of the pipeline: what goes into the training, and how it comes out again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.progress import Stages
from edge_dtm.formats.plan import Component, Plan, Treatment
from edge_dtm.formats.reference import HELD_OUT, PACKAGED, Reference
from edge_dtm.host.blocks.shipped import Shipped
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.edited import EditedCheckpoint, write_edited
from edge_dtm.host.distill.distill import Recovered, Trained
from edge_dtm.host.distill.teacher import TeacherText, reference_sequences, sample_texts
from edge_dtm.host.trajectory.prompts import Prompt
from edge_dtm.llamacpp import ggml

ByteArray = npt.NDArray[np.uint8]
SAMPLED_TEXTS = 512  # about 8 minutes of sampling for SmolLM2 on two cores
SAMPLED_TOKENS = 128
FEWEST_TEXTS = 32


def texts_for(steps: int, batch_tokens: int) -> int:
    """How many texts to sample for so many steps: no more than are read once."""
    return int(np.clip(steps * batch_tokens // SAMPLED_TOKENS, FEWEST_TEXTS, SAMPLED_TEXTS))


def teacher_text(
    folder: Path,
    model: Any,
    checkpoint: Checkpoint,
    reference: Reference,
    fitted: npt.NDArray[np.integer[Any]],
    count: int,
    seed: int,
    stages: Stages,
) -> TeacherText:
    """The original's greedy answers to the fitted rows and `count` texts sampled from it, with what
    it says to them. model: the original. folder: keeps all of it.

    Starts of sampled texts are the first tokens of prompts that are not held out.
    """
    usable = np.flatnonzero((reference.split != HELD_OUT) & (reference.split != PACKAGED))
    starts = [Prompt(tuple(reference.prompt(r)), str(reference.texts[r])) for r in usable.tolist()]
    with stages("Sampling texts to recover with", count * SAMPLED_TOKENS) as advance:
        sampled = sample_texts(
            model,
            starts,
            count,
            SAMPLED_TOKENS,
            seed,
            checkpoint.tokenizer.eos_ids,
            parts=folder / "sampled",
            progress=advance,
        )
    text = TeacherText(
        folder, reference_sequences(reference.rows(fitted)) + sampled, checkpoint.config.hidden
    )
    with stages("The original's answers to them", text.tokens) as advance:
        text.capture(model, advance)
    return text


def start_values(
    checkpoint: Checkpoint, plan: Plan, shipped: Shipped | RecoveredBlocks
) -> dict[str, Trained]:
    """Every component as the plan ships it, rows as Hugging Face orders them."""
    out = {}
    for c, t in zip(plan.components, plan.treatments, strict=True):
        values = ggml.dequantize(t.type, np.asarray(shipped.blocks(c, t)), c.row_length)
        importance = shipped.importance(c.name) if t.type not in ("F16", "Q8_0") else None
        out[c.name] = Trained(t, importance, checkpoint.hf_rows(c.name, values))
    return out


def plain_values(checkpoint: Checkpoint, components: Sequence[Component]) -> dict[str, Trained]:
    """Every component as it is, to be trained without grid or zeros."""
    return {
        c.name: Trained(Treatment("F32"), None, checkpoint.hf_tensor(c.name + ".weight"))
        for c in components
    }


def with_values(checkpoint: Checkpoint, result: Recovered, file: Path) -> EditedCheckpoint:
    """The checkpoint with all that was trained, for a model that is treated further."""
    tensors = {n + ".weight": v for n, v in result.values.items() if n.startswith("blk.")}
    write_edited(file, {**tensors, **_vectors(checkpoint, result)})
    return EditedCheckpoint(checkpoint, file)


def with_vectors(checkpoint: Checkpoint, result: Recovered, file: Path) -> EditedCheckpoint:
    """The checkpoint with the trained norm gains; its matrices are exported from their blocks."""
    write_edited(file, _vectors(checkpoint, result))
    return EditedCheckpoint(checkpoint, file)


def _vectors(checkpoint: Checkpoint, result: Recovered) -> dict[str, npt.NDArray[np.float32]]:
    """Without the norms that torch's module has and the model has not: of removed attentions."""
    known = {name for name, _ in checkpoint.vectors()}
    return {name: v for name, v in result.vectors.items() if name in known}


class RecoveredBlocks:
    """What recovery trained, in the place of the blocks that it began with."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, result: Recovered, before: Shipped
    ) -> None:
        self.folder, self.checkpoint, self.result, self.before = folder, checkpoint, result, before

    def importance(self, name: str) -> npt.NDArray[np.float32] | None:
        return self.before.importance(name)

    def blocks(self, component: Component, treatment: Treatment) -> ByteArray:
        """uint8 (rows, row_bytes), rows as GGUF orders them."""
        data = self.result.blocks.get(component.name)
        if data is None:
            return self.before.blocks(component, treatment)
        rows: ByteArray = self.checkpoint.gguf_rows(component.name, data)
        return rows


def same_head(checkpoint: Checkpoint) -> torch.Tensor:
    """The head's weight, float32 (vocab, hidden)."""
    name = "token_embd" if checkpoint.config.tied else "output"
    return torch.from_numpy(np.array(checkpoint.hf_tensor(name + ".weight")))
