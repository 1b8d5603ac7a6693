"""How far a student is from the original: the loss it is trained with, and SDT and FDT."""

from __future__ import annotations

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
from edge_dtm.host.distill.teacher import batches_by_length, padded

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
    """Teacher-forced, in float32: what the model would say where the original said its tokens."""
    device = next(model.parameters()).device
    head = model.lm_head.weight
    s, n = validation.generated_ids.shape
    argmaxes, log_probability = np.full((s, n), -1, dtype=np.int64), np.zeros((s, n))
    lengths = (validation.prompt_lengths + validation.generated_lengths - 1).tolist()
    order = sorted(range(s), key=lambda row: (lengths[row], row))
    for rows in batches_by_length(lengths, order, batch_tokens):
        texts = [(validation.prompt(r) + validation.generated(r))[:-1] for r in rows]
        hidden = model.model(input_ids=padded(texts).to(device), use_cache=False).last_hidden_state
        at = torch.cat(
            [hidden[i, validation.prompt_lengths[r] - 1 : lengths[r]] for i, r in enumerate(rows)]
        ).float()
        targets = torch.tensor([t for r in rows for t in validation.generated(r)], device=device)
        best, logs = [], []
        chunk = max(1, CHUNK_LOGITS // len(head))
        for states, target in zip(torch.split(at, chunk), torch.split(targets, chunk), strict=True):
            logits = states @ head.T
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
