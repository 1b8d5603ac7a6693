"""Where prompts come from: a file of the user's, the packaged set, the model itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.data import packaged_records
from edge_dtm.host.checkpoint.tokenizer import Tokenizer

SAMPLED_TOKENS = 24


@dataclass(frozen=True)
class Prompt:
    """Token ids and the text that encodes to them (special tokens spelled out, BOS left to the
    tokenizer)."""

    ids: tuple[int, ...]
    text: str


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[Prompt]:
    """Text lines, or JSONL with `prompt` or chat `messages` when the name ends in .jsonl/.json.

    EdgeDtmError listing every bad line.
    """
    try:
        # Not splitlines: JSON strings may hold what that takes for line ends, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeDtmError(f"{path} cannot be read as UTF-8 text ({error})") from None
    as_json = path.suffix in (".jsonl", ".json")
    prompts, bad = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(
                _from_json(json.loads(line), tokenizer) if as_json else _plain(line, tokenizer)
            )
        except (ValueError, KeyError, TypeError, EdgeDtmError) as error:
            bad.append(f"line {number}: {error}")
    if bad:
        raise EdgeDtmError(f"{path} has {len(bad)} bad prompts: {'; '.join(bad[:3])}")
    different = len({p.ids for p in prompts})
    if different < 4:
        raise EdgeDtmError(
            f"{path} has {different} different prompts: at least 4 are needed, "
            "since some are kept out of calibration; a few dozen make a good measurement"
        )
    return list(dict.fromkeys(prompts))


def packaged_prompts(tokenizer: Tokenizer) -> list[Prompt]:
    """The set that comes with edge-dtm; chats as plain text where the model has no template."""
    out = []
    for record in packaged_records():
        if "messages" in record and not tokenizer.chat_template:
            record = {"prompt": record["messages"][-1]["content"]}
        out.append(_from_json(record, tokenizer))
    return list(dict.fromkeys(out))


def _from_json(record: Any, tokenizer: Tokenizer) -> Prompt:
    if not isinstance(record, dict):
        raise ValueError("is no JSON object with `prompt` or `messages`")
    if isinstance(record.get("prompt"), str):
        return _plain(record["prompt"], tokenizer)
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise ValueError("needs `prompt` (text) or `messages` (role and content of each)")
    if not tokenizer.chat_template:
        raise ValueError("has `messages`, but this model has no chat template: use `prompt`")
    ids, text = tokenizer.encode_chat(messages)
    return Prompt(tuple(ids), text)


def _plain(text: str, tokenizer: Tokenizer) -> Prompt:
    if any("\ud800" <= c <= "\udfff" for c in text):  # JSON can spell these out
        raise ValueError("has half of a surrogate pair, which is no text")
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("is empty")
    return Prompt(tuple(ids), text)


@torch.no_grad()
def sample_prefixes(
    model: Any, tokenizer: Tokenizer, starts: Sequence[Prompt], count: int, seed: int
) -> list[Prompt]:
    """Prompts in the model's own words: a few tokens of a start, then sampled at temperature 1.

    The sampled ids are turned into text and encoded again, so that a device that only has the
    text gets the very same ids.
    """
    device = next(model.parameters()).device
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(starts), size=min(count, len(starts)), replace=False)
    heads = [list(starts[i].ids[:4]) for i in chosen]
    width = min(len(h) for h in heads) if heads else 0
    if not width:
        return []
    generator = torch.Generator(device="cpu").manual_seed(seed)
    ids = torch.tensor([h[:width] for h in heads], device=device)
    past = None
    step = ids
    for _ in range(SAMPLED_TOKENS):
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits = out.logits[:, -1].float().cpu()
        logits[:, list(tokenizer.eos_ids)] = -torch.inf
        step = torch.multinomial(logits.softmax(-1), 1, generator=generator).to(device)
        ids = torch.cat([ids, step], dim=1)
    prompts = []
    for row in ids.tolist():
        text = tokenizer.decode(row)
        again = tokenizer.encode(text)
        # A cut inside a multi-byte character decodes to a replacement sign; leave those out.
        if again and "�" not in text and "\0" not in text:
            prompts.append(Prompt(tuple(again), text))
    return list(dict.fromkeys(prompts))
