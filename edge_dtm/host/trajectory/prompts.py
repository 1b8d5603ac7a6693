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
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.tokenizer import Tokenizer
from edge_dtm.host.trajectory.decode import BATCH_SEQUENCES, Decoding

START_TOKENS, SAMPLED_TOKENS = 4, 24  # of a prompt that is sampled: taken, then drawn


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
            record = json.loads(line) if as_json else {"prompt": line}
            prompts.append(_prompt(record, tokenizer))
        except (ValueError, EdgeDtmError) as error:
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
    prompts = []
    for record in packaged_records():
        if "messages" in record and not tokenizer.chat_template:
            record = {"prompt": record["messages"][-1]["content"]}
        prompts.append(_prompt(record, tokenizer))
    return list(dict.fromkeys(prompts))


def _prompt(record: Any, tokenizer: Tokenizer) -> Prompt:
    """ValueError or EdgeDtmError when the record is no prompt for this tokenizer."""
    fields = record if isinstance(record, dict) else {}
    text, messages = fields.get("prompt"), fields.get("messages")
    if isinstance(text, str):
        if any("\ud800" <= c <= "\udfff" for c in text):  # JSON can spell these out
            raise ValueError("has half of a surrogate pair, which is no text")
        ids = tokenizer.encode(text)
    elif isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        ids, text = tokenizer.encode_chat(messages)
    else:
        raise ValueError("needs `prompt` (text) or `messages` (role and content of each)")
    if not ids:
        raise ValueError("is empty")
    return Prompt(tuple(ids), text)


@torch.no_grad()
def sample_prefixes(
    model: Llama, tokenizer: Tokenizer, starts: Sequence[Prompt], count: int, seed: int
) -> list[Prompt]:
    """Prompts in the model's own words: a few tokens of a start, then sampled at temperature 1.

    The sampled ids are turned into text and encoded again, so that a device that only has the
    text gets the very same ids.
    """
    if not starts:
        return []
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(starts), size=count, replace=count > len(starts))
    texts_ids = [list(starts[i].ids[:START_TOKENS]) for i in chosen]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for start in range(0, count, BATCH_SEQUENCES):
        batch = texts_ids[start : start + BATCH_SEQUENCES]
        decoding = Decoding(model, batch, SAMPLED_TOKENS)
        for _ in range(SAMPLED_TOKENS):
            logits = decoding.logits.cpu()
            logits[:, list(tokenizer.eos_ids)] = -torch.inf
            step = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            for ids, token in zip(batch, step.tolist(), strict=True):
                ids.append(token)
            decoding.step(step.to(model.device))
    # A cut inside a multi-byte character decodes to a replacement sign; leave those out.
    texts = [t for t in map(tokenizer.decode, texts_ids) if not {"�", "\0"} & set(t)]
    prompts = dict.fromkeys(Prompt(tuple(tokenizer.encode(text)), text) for text in texts)
    return [prompt for prompt in prompts if prompt.ids]
