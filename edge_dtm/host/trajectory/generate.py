"""Prompts in, the original model's greedy tokens and top logits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.reference import CALIBRATION, HELD_OUT, PADDING, TOP_K, Reference
from edge_dtm.host.trajectory.prompts import Prompt

BATCH_SEQUENCES = 64


def check_lengths(prompts: Sequence[Prompt], tokens: int, context_length: int) -> None:
    """EdgeDtmError listing prompts that do not fit the model's context with N tokens behind."""
    long = [i for i, p in enumerate(prompts) if len(p.ids) + tokens > context_length]
    if long:
        raise EdgeDtmError(
            f"{len(long)} prompts do not fit the context of {context_length} tokens with {tokens} "
            f"generated (first: number {long[0] + 1} with {len(prompts[long[0]].ids)} tokens): "
            "shorten them or lower --tokens"
        )


def split_rows(count: int, held_out: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 (count,): held_out rows drawn by seed, the rest for calibration."""
    split = np.full(count, CALIBRATION, dtype=np.uint8)
    split[np.random.default_rng([seed, 1]).permutation(count)[:held_out]] = HELD_OUT
    return split


def generate_reference(
    model: Any,
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
    # Equal lengths side by side need the least padding, which is the least disturbance.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    width = max(len(p.ids) for p in prompts)
    s, n = len(prompts), tokens
    prompt_ids = np.full((s, width), PADDING, dtype=np.int32)
    arrays: dict[str, Any] = {
        "generated_ids": np.full((s, n), PADDING, dtype=np.int32),
        "generated_lengths": np.zeros(s, dtype=np.int32),
        "top_ids": np.full((s, n, TOP_K), PADDING, dtype=np.int32),
        "top_logits": np.zeros((s, n, TOP_K), dtype=np.float32),
        "log_normalizers": np.zeros((s, n), dtype=np.float32),
    }
    for start in range(0, s, BATCH_SEQUENCES):
        rows = order[start : start + BATCH_SEQUENCES]
        file = parts / f"{start:06d}.npz"
        if file.is_file():
            with np.load(file, allow_pickle=False) as data:
                done = {k: data[k] for k in arrays}
        else:
            done = _decode(model, [prompts[i].ids for i in rows], n, eos_ids, progress)
            temporary = file.with_suffix(".tmp.npz")
            np.savez(temporary, allow_pickle=False, **done)
            temporary.replace(file)
        for key, value in done.items():
            arrays[key][rows] = value
    for i, p in enumerate(prompts):
        prompt_ids[i, : len(p.ids)] = p.ids
    return Reference(
        prompt_ids=prompt_ids,
        prompt_lengths=np.array([len(p.ids) for p in prompts], dtype=np.int32),
        split=split,
        texts=np.array([p.text for p in prompts]),
        provenance=dict(provenance),
        **arrays,
    )


@torch.no_grad()
def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    eos_ids: Sequence[int],
    progress: Callable[[int], None] | None,
) -> dict[str, np.ndarray[Any, Any]]:
    device = next(model.parameters()).device
    count, width = len(prompts), max(map(len, prompts))
    ids = torch.zeros((count, width), dtype=torch.long)
    mask = torch.zeros((count, width), dtype=torch.long)
    for row, p in enumerate(prompts):
        ids[row, width - len(p) :] = torch.tensor(p)
        mask[row, width - len(p) :] = 1
    step, mask = ids.to(device), mask.to(device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    stop = torch.tensor(sorted(eos_ids), dtype=torch.long)
    out_ids = np.full((count, tokens), PADDING, dtype=np.int32)
    top_ids = np.full((count, tokens, TOP_K), PADDING, dtype=np.int32)
    top_logits = np.zeros((count, tokens, TOP_K), dtype=np.float32)
    normalizers = np.zeros((count, tokens), dtype=np.float32)
    lengths = np.full(count, tokens, dtype=np.int32)
    alive = torch.ones(count, dtype=torch.bool)
    past = None
    for t in range(tokens):
        out = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=position,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
        )
        past = out.past_key_values
        logits = out.logits[:, -1].float()
        values, indices = logits.topk(TOP_K)
        chosen = indices[:, 0]
        keep = alive.numpy()
        out_ids[keep, t] = chosen.cpu().numpy()[keep]
        top_ids[keep, t] = indices.cpu().numpy()[keep]
        top_logits[keep, t] = values.cpu().numpy()[keep]
        normalizers[keep, t] = logits.logsumexp(-1).cpu().numpy()[keep]
        if progress:
            progress(int(keep.sum()))
        ended = alive & torch.isin(chosen.cpu(), stop)
        lengths[ended.numpy()] = t + 1
        alive &= ~ended
        if not alive.any():
            break
        step = chosen[:, None]
        mask = torch.cat([mask, torch.ones((count, 1), dtype=mask.dtype, device=device)], dim=1)
        position = position[:, -1:] + 1
    return {
        "generated_ids": out_ids,
        "generated_lengths": lengths,
        "top_ids": top_ids,
        "top_logits": top_logits,
        "log_normalizers": normalizers,
    }


@torch.no_grad()
def signed_margins(model: Any, reference: Reference) -> np.ndarray[Any, np.dtype[np.float32]]:
    """By how much the model prefers the reference's token to the best other, in logits, float32
    (sequences, tokens), 0 beyond a row's length. Negative where it diverges already."""
    device = next(model.parameters()).device
    out = np.zeros(reference.generated_ids.shape, dtype=np.float32)
    for row in range(len(reference)):
        first, count = int(reference.prompt_lengths[row]) - 1, int(reference.generated_lengths[row])
        ids = torch.tensor([(reference.prompt(row) + reference.generated(row))[:-1]], device=device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = model.lm_head(hidden[first : first + count]).float()
        wanted = torch.tensor(reference.generated(row), device=device)[:, None]
        own = logits.gather(1, wanted)[:, 0]
        best_other = logits.scatter(1, wanted, -torch.inf).max(-1).values
        out[row, :count] = (own - best_other).cpu().numpy()
    return out
