"""The scales of equalization: found on the calibration rows, kept on disk, checked with a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.reference import Reference, load_npz, save_npz
from edge_dtm.host.blocks.calibration import Calibration
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, ModelConfig
from edge_dtm.host.quantize.equalize import (
    Scales,
    consumers,
    rounding_harm,
    site_scales,
    sites,
)

FloatArray = npt.NDArray[np.float32]

STRENGTHS = (0.0, 0.2, 0.35, 0.5)
ROW_STEP, TOKEN_STEP = 4, 4  # every fourth is enough to tell four strengths apart


def find_scales(
    calibration: Calibration,
    checkpoint: Checkpoint,
    progress: Callable[[int], None] | None = None,
) -> dict[str, FloatArray]:
    """The scales of every site, each of the strength that lowers the harm of rounding most; a
    site where none does keeps its ones. progress: called with sites done."""
    config = checkpoint.config
    out = {}
    for name in sites(config):
        fed = consumers(name)
        weights = [checkpoint.hf_tensor(c + ".weight")[::ROW_STEP] for c in fed]
        rows = [_output_squares(calibration, c)[::ROW_STEP] for c in fed]
        x = torch.from_numpy(calibration.inputs(name)[::TOKEN_STEP])
        x2, b2 = calibration.input_squares(name), calibration.gradient_squares(name)
        best: tuple[float, FloatArray] | None = None
        for strength in STRENGTHS:
            s = site_scales(name, x2, b2, config, strength)
            harm = rounding_harm(x, x2, b2, weights, rows, s, ROW_STEP)
            if best is None or harm < best[0]:
                best = (harm, s)
        assert best is not None
        out[name] = best[1]
        if progress:
            progress(1)
    return out


def _output_squares(calibration: Calibration, name: str) -> npt.NDArray[np.float64]:
    if name == "output":
        # Which rows of a head meet in a margin is not recorded; all alike is near enough here.
        return np.ones(calibration.vocab)
    return calibration.output_squares(name)


def save_scales(path: Path, scales: Scales) -> None:
    save_npz(path, dict(scales), {"kind": "scales"})


def load_scales(path: Path, config: ModelConfig) -> dict[str, FloatArray]:
    """EdgeDtmError when the file is not what save_scales wrote for such a model."""
    return load_npz(path, sites(config), "scales")[0]


@torch.no_grad()
def top_logits(model: Any, reference: Reference) -> FloatArray:
    """The model's logits of the reference's top ids, float32 (sequences, tokens, TOP_K)."""
    device = next(model.parameters()).device
    out = np.zeros(reference.top_logits.shape, dtype=np.float32)
    for row in range(len(reference)):
        first, count = int(reference.prompt_lengths[row]) - 1, int(reference.generated_lengths[row])
        ids = torch.tensor([(reference.prompt(row) + reference.generated(row))[:-1]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, first : first + count].float()
        top = torch.from_numpy(reference.top_ids[row, :count].astype(np.int64)).to(device)
        out[row, :count] = logits.gather(1, top).cpu().numpy()
    return out


def logit_difference(model: Any, reference: Reference, original: FloatArray | None = None) -> float:
    """Largest difference of the model's logits from the reference's top logits, relative to the
    largest of these. original: in place of the reference's, of its shape."""
    wanted = reference.top_logits if original is None else original
    logits = top_logits(model, reference)
    worst, largest = 0.0, 0.0
    for row in range(len(reference)):
        count = int(reference.generated_lengths[row])
        # Not max(): that passes over NaN.
        worst = float(np.maximum(worst, np.abs(logits[row, :count] - wanted[row, :count]).max()))
        largest = max(largest, float(np.abs(wanted[row, :count]).max()))
    return worst / max(largest, 1e-30)
