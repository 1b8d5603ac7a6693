"""What verify reads of a bundle, checked before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats.record import Record, host_answers
from edge_dtm.formats.reference import Reference
from edge_dtm.llamacpp import probe_model
from edge_dtm.llamacpp.vocabulary import tokenize


@dataclass(frozen=True)
class Inputs:
    """The original's tokens, the host's record of them, and its record of the small F16 model."""

    reference: Reference
    host: Record
    probe: Record


def is_gguf(path: Path) -> bool:
    """Whether path is a file that is named as a GGUF or begins as one."""
    if path.is_dir():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


def load_inputs(bundle: bundles.Bundle) -> Inputs:
    """EdgeDtmError when the files of the bundle do not belong together."""
    reference, host = host_answers(bundle)
    probe = Record.load(bundle.path(bundles.PROBE_RECORD))
    expected = probe_model.sequences()
    known = ((probe.top_ids >= 0) & (probe.top_ids < probe_model.SHAPE.vocab)).all()
    if probe.ids.shape != expected.generated_ids.shape or not known:
        raise EdgeDtmError(f"{bundle.source}: its probe record is not ours; make it again")
    return Inputs(reference, host, probe)


def check_tokens(model: Path, reference: Reference) -> None:
    """EdgeDtmError unless llama.cpp makes the reference's prompt ids from its texts."""
    tokenized = tokenize(model, [str(text) for text in reference.texts])
    wrong = [row for row, ids in enumerate(tokenized) if ids != reference.prompt(row)]
    if wrong:
        row = wrong[0]
        pairs = list(zip_longest(tokenized[row], reference.prompt(row)))
        at = next(i for i, (device, original) in enumerate(pairs) if device != original)
        raise EdgeDtmError(
            f"wrong tokenizer: llama.cpp makes other token ids from {len(wrong)} of "
            f"{len(reference)} prompts than the original's tokenizer (first: prompt {row + 1}, "
            f"token {at + 1}: {pairs[at][0]} instead of {pairs[at][1]}): make the bundle again, or "
            "take the llama-cpp-python that the host had"
        )


def check_host_ids(host: Record, n_vocab: int) -> None:
    """EdgeDtmError when the host's top ids are not in the model's vocabulary."""
    counted = np.arange(host.ids.shape[1])[None, :] < host.lengths[:, None]
    ids = host.top_ids[counted]
    if ids.size and (ids.min() < 0 or ids.max() >= n_vocab):
        raise EdgeDtmError("the host record has ids outside the vocabulary; make the bundle again")
