"""Prompts in, the original model's greedy tokens and top logits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.reference import PADDING, TOP_K, Reference
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.sequences import reference_sequences
from edge_dtm.host.trajectory.decode import Decoding, sequences_at_once
from edge_dtm.host.trajectory.prompts import Prompt


def check_lengths(prompts: Sequence[Prompt], tokens: int, context_length: int) -> None:
    """EdgeDtmError listing prompts that do not fit the model's context with N tokens behind."""
    long = [i for i, p in enumerate(prompts) if len(p.ids) + tokens > context_length]
    if long:
        raise EdgeDtmError(
            f"{len(long)} prompts do not fit the context of {context_length} tokens with {tokens} "
            f"generated (first: number {long[0] + 1} with {len(prompts[long[0]].ids)} tokens): "
            "shorten them or lower --tokens"
        )


def generate_reference(
    model: Llama,
    prompts: Sequence[Prompt],
    *,
    tokens: int,
    eos_ids: Sequence[int],
    split: np.ndarray[Any, np.dtype[np.uint8]],
    provenance: Mapping[str, Any],
    parts: Path,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """Greedy decoding of every prompt up to EOS (which counts) or `tokens`.

    Each batch is saved in the folder `parts` when done and taken from there when it is there
    already, so a killed run goes on with the next one. progress: called with tokens generated.
    """
    parts.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(p.ids) for p in prompts], dtype=np.int32)
    prompt_ids = np.full((len(prompts), lengths.max()), PADDING, dtype=np.int32)
    for row, p in zip(prompt_ids, prompts, strict=True):
        row[: len(p.ids)] = p.ids
    arrays = _empty(len(prompts), tokens)
    # Equal lengths side by side need the least padding, which is the least disturbance.
    order = np.argsort(lengths, kind="stable")
    at_once = sequences_at_once(model.config, int(lengths.max()) + tokens)
    for start in range(0, len(prompts), at_once):
        rows = order[start : start + at_once]
        file = parts / f"{start:06d}.npz"
        if not file.is_file():
            batch = _decode(model, [prompts[i].ids for i in rows], tokens, eos_ids, progress)
            temporary = file.with_suffix(".tmp.npz")
            np.savez(temporary, allow_pickle=False, **batch)
            temporary.replace(file)
        with np.load(file, allow_pickle=False) as batch:
            for key, array in arrays.items():
                array[rows] = batch[key]
    return Reference(
        prompt_ids=prompt_ids,
        prompt_lengths=lengths,
        split=split,
        texts=np.array([p.text for p in prompts]),
        provenance=dict(provenance),
        **arrays,
    )


def _empty(count: int, tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    """What a Reference holds of `count` answers, none of which has begun."""
    return {
        "generated_ids": np.full((count, tokens), PADDING, dtype=np.int32),
        "generated_lengths": np.full(count, tokens, dtype=np.int32),
        "top_ids": np.full((count, tokens, TOP_K), PADDING, dtype=np.int32),
        "top_logits": np.zeros((count, tokens, TOP_K), dtype=np.float32),
        "log_normalizers": np.zeros((count, tokens), dtype=np.float32),
    }


@torch.no_grad()
def _decode(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    eos_ids: Sequence[int],
    progress: Callable[[int], None] | None,
) -> dict[str, np.ndarray[Any, Any]]:
    arrays = _empty(len(prompts), tokens)
    alive = np.ones(len(prompts), dtype=bool)
    decoding = Decoding(model, prompts, tokens)
    for t in range(tokens):
        top = decoding.logits.topk(TOP_K)
        chosen = top.indices[:, 0]
        for key, value in (
            ("generated_ids", chosen),
            ("top_ids", top.indices),
            ("top_logits", top.values),
            ("log_normalizers", decoding.logits.logsumexp(-1)),
        ):
            arrays[key][alive, t] = value.cpu().numpy()[alive]
        if progress:
            progress(int(alive.sum()))
        ended = alive & np.isin(arrays["generated_ids"][:, t], eos_ids)
        arrays["generated_lengths"][ended] = t + 1
        alive &= ~ended
        if not alive.any() or t + 1 == tokens:
            break
        decoding.step(chosen)
    return arrays


@torch.no_grad()
def signed_margins(model: Llama, reference: Reference) -> np.ndarray[Any, np.dtype[np.float32]]:
    """By how much the model prefers the reference's token to the best other, in logits, float32
    (sequences, tokens), 0 beyond a row's length. Negative where it diverges already."""
    out = np.zeros(reference.generated_ids.shape, dtype=np.float32)
    for row, hidden in enumerate(model.final_hidden(reference_sequences(reference))):
        first, count = int(reference.prompt_lengths[row]) - 1, int(reference.generated_lengths[row])
        logits = model.logits(hidden[first : first + count])
        chosen = torch.tensor(reference.generated(row), device=model.device)[:, None]
        own = logits.gather(1, chosen)[:, 0]
        best_other = logits.scatter(1, chosen, -torch.inf).max(-1).values
        out[row, :count] = (own - best_other).cpu().numpy()
    return out
