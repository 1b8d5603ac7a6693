"""Whether the equalized model computes what the base computes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.reference import Reference
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.sequences import reference_sequences
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.host.values import Base, Run

FloatArray = npt.NDArray[np.float32]
CHECKED_SEQUENCES = 4
SAME_LOGITS = 1e-3  # relative to the largest: float32 rounding through all layers stays below


def check_equalized(run: Run, base: Base, equalized: Checkpoint, reference: Reference) -> None:
    """EdgeDtmError when the logits of a few sequences are not the base's."""
    some = reference.rows(calibration_rows(reference)[0][:CHECKED_SEQUENCES])
    original = some.top_logits
    if base.checkpoint is not run.checkpoint:
        original = top_logits(Llama(base.checkpoint, run.device), some)
    with run.stages("Checking the equalized model", 1):
        moved = logit_difference(top_logits(Llama(equalized, run.device), some), some, original)
    if not moved <= SAME_LOGITS:
        raise EdgeDtmError(
            f"equalization moved the logits by {moved:.1e} of the largest, more than rounding does "
            f"({SAME_LOGITS:.0e}): use --no-equalize, and please report this"
        )


@torch.no_grad()
def top_logits(model: Llama, reference: Reference) -> FloatArray:
    """The model's logits of the reference's top ids, float32 (sequences, tokens, TOP_K)."""
    out = np.zeros(reference.top_logits.shape, dtype=np.float32)
    for row, hidden in enumerate(model.final_hidden(reference_sequences(reference))):
        first, count = int(reference.prompt_lengths[row]) - 1, int(reference.generated_lengths[row])
        logits = model.logits(hidden[first : first + count])
        top = torch.from_numpy(reference.top_ids[row, :count].astype(np.int64)).to(model.device)
        out[row, :count] = logits.gather(1, top).cpu().numpy()
    return out


def logit_difference(logits: FloatArray, reference: Reference, original: FloatArray) -> float:
    """Largest difference from `original`'s top logits, relative to the largest of these; both
    float32 (sequences, tokens, TOP_K)."""
    worst, largest = 0.0, 0.0
    for row, count in enumerate(reference.generated_lengths.tolist()):
        wanted = original[row, :count]
        # Not max(): that passes over NaN.
        worst = float(np.maximum(worst, np.abs(logits[row, :count] - wanted).max()))
        largest = max(largest, float(np.abs(wanted).max()))
    return worst / max(largest, 1e-30)
