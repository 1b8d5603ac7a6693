"""Replays a bundle's reference in llama.cpp: the device's record, and its distance to another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_dtm.core.files import Advance, StageProgress
from edge_dtm.core.metrics import compare, top_kl
from edge_dtm.formats.record import Mode, Record
from edge_dtm.formats.reference import Reference
from edge_dtm.formats.verdict import KernelsCompared
from edge_dtm.llamacpp.runner import LlamaRunner
from edge_dtm.llamacpp.schedule import replay_tokens


@dataclass(frozen=True)
class Replayed:
    """The device's record, and kl, host || device in nats, (S, N); zeros in mode "generate"."""

    record: Record
    kl: npt.NDArray[np.float64]


def replay(
    llama: LlamaRunner,
    reference: Reference,
    host: Record,
    mode: Mode,
    progress: StageProgress | None,
) -> Replayed:
    """Feed or generate the sequences of reference; host: the host's record of the same ones."""
    advance = stage_counter(progress, "replay", replay_tokens(reference))
    if mode == "generate":
        record = llama.greedy(reference, advance)
        return Replayed(record, np.zeros(record.ids.shape))
    return teacher_forced(llama, reference, host, advance)


def teacher_forced(
    llama: LlamaRunner,
    reference: Reference,
    other: Record,
    advance: Advance,
) -> Replayed:
    """This run's record, and the KL, other || this run, at each position."""
    logits_of_top = np.zeros_like(other.top_logits)

    def observe(row: int, position: int, logits: npt.NDArray[np.float32]) -> None:
        logits_of_top[row, position] = logits[other.top_ids[row, position]]

    record = llama.teacher_forced(reference, advance, observe)
    return Replayed(record, top_kl(other.top_logits, logits_of_top))


def compare_repacking(
    llama: LlamaRunner, reference: Reference, record: Record, progress: StageProgress | None
) -> KernelsCompared:
    """Replay once more; record: what the other layout of the weights answered."""
    advance = stage_counter(progress, "replay without repacking", replay_tokens(reference))
    other = teacher_forced(llama, reference, record, advance)
    lengths = reference.generated_lengths
    counted = np.arange(other.kl.shape[1])[None, :] < lengths[:, None]
    differing = compare(record.ids, other.record.ids, lengths).divergent_tokens
    return KernelsCompared(int(lengths.sum()), differing, float(other.kl[counted].mean()))


def stage_counter(progress: StageProgress | None, stage: str, total: int) -> Advance:
    """A function that adds an amount to a stage's progress, if there is one to tell."""
    done = 0

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        if progress is not None:
            progress(stage, done, total)

    return advance
