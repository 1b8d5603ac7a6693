"""How far a student is from the original: the loss it is trained with, and SDT and FDT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edge_dtm.core.metrics import (
    divergent_mask,
    first_divergent_tokens,
    perplexity,
    share_of_divergent_tokens,
)
from edge_dtm.formats.reference import Reference
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.sequences import batches_by_length, padded, reference_sequences

CHUNK_LOGITS = 2**23  # logits at a time, 32 MiB each for teacher, student and difference


@torch.no_grad()
def divergence_and_gradient(
    student: torch.Tensor, student_head: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Mean of KL(teacher || student) over positions, in nats, and its gradient at the student's
    hidden states.

    student: float32 (positions, hidden) final hidden states; student_head: (vocab, hidden), does
    not learn; teacher and head: the original's. The gradient at the student's logits is softmax
    (student) - softmax(teacher); computed here, a chunk of positions at a time, so that no more
    than CHUNK_LOGITS logits are ever held.
    """
    count, chunk = len(student), max(1, CHUNK_LOGITS // len(head))
    gradient, total = torch.empty_like(student), 0.0
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        ours = (student[part] @ student_head.T).log_softmax(-1)
        theirs = (teacher[part] @ head.T).log_softmax(-1)
        shares = theirs.exp()
        total += float((shares * theirs.sub_(ours)).sum(-1, dtype=torch.float64).sum())
        gradient[part] = ours.exp_().sub_(shares) @ student_head
    return total / count, gradient / count


@dataclass(frozen=True)
class Check:
    """SDT (a share), mean FDT in tokens, perplexity on the original's answers."""

    sdt: float
    fdt: float
    perplexity: float


@torch.no_grad()
def check(model: Any, validation: Reference, batch_tokens: int = 2048) -> Check:
    """Teacher-forced, in float32: what the model would say where the original said its tokens.
    model: load_model's."""
    device, head = next(model.parameters()).device, model.lm_head.weight
    sequences = reference_sequences(validation)
    lengths = [len(s) for s in sequences]

    def parts() -> Iterator[tuple[list[int], torch.Tensor]]:
        order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
        for rows in batches_by_length(lengths, order, batch_tokens):
            ids = padded([sequences[r] for r in rows]).to(device)
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state
            starts = [int(validation.prompt_lengths[r]) - 1 for r in rows]
            at = [states[i, starts[i] : lengths[r]] for i, r in enumerate(rows)]
            yield rows, torch.cat(at).float()

    return _checked(parts(), lambda states: states @ head.T, len(head), validation)


@torch.no_grad()
def check_llama(model: Llama, validation: Reference) -> Check:
    """The same of a model that has one block at a time."""

    def parts() -> Iterator[tuple[list[int], torch.Tensor]]:
        for row, hidden in enumerate(model.final_hidden(reference_sequences(validation))):
            yield [row], hidden[int(validation.prompt_lengths[row]) - 1 :]

    return _checked(parts(), model.logits, model.config.vocab, validation)


def _checked(
    parts: Iterable[tuple[list[int], torch.Tensor]],
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocab: int,
    validation: Reference,
) -> Check:
    """parts: rows, and what the head reads where their tokens were said, (tokens, hidden)."""
    s, n = validation.generated_ids.shape
    argmaxes, log_probability = np.full((s, n), -1, dtype=np.int64), np.zeros((s, n))
    chunk = max(1, CHUNK_LOGITS // vocab)
    for rows, at in parts:
        targets = torch.tensor([t for r in rows for t in validation.generated(r)], device=at.device)
        best, logs = [], []
        for states, target in zip(torch.split(at, chunk), torch.split(targets, chunk), strict=True):
            logits = logits_of(states)
            best.append(logits.argmax(-1).cpu())
            logs.append((logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)).cpu())
        counts = [int(validation.generated_lengths[row]) for row in rows]
        for row, count, ids, log in zip(
            rows,
            counts,
            torch.split(torch.cat(best), counts),
            torch.split(torch.cat(logs), counts),
            strict=True,
        ):
            argmaxes[row, :count] = ids.numpy()
            log_probability[row, :count] = log.numpy()
    mask = divergent_mask(validation.generated_ids, argmaxes, validation.generated_lengths)
    return Check(
        share_of_divergent_tokens(mask, validation.generated_lengths),
        float(first_divergent_tokens(mask, validation.generated_lengths).mean()),
        perplexity(log_probability, validation.generated_lengths),
    )
