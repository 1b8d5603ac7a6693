"""What distillation trains on: texts of the original's own, and what the original says to them.

Of the original only its final hidden states are kept. Its logits are the head times these, so
that while the student trains the original need not be in memory, and a token takes 2 x hidden
bytes instead of 4 x vocabulary.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_dtm.core.files import write_whole
from edge_dtm.core.work import Kind
from edge_dtm.formats.reference import HELD_OUT, PACKAGED, Reference
from edge_dtm.host.checkpoint.model import load_model
from edge_dtm.host.checkpoint.sequences import batches_by_length, padded, reference_sequences
from edge_dtm.host.distill.result import load_tensors, save_tensors
from edge_dtm.host.trajectory.reference import calibration_rows
from edge_dtm.host.values import Run

SAMPLED_TEXTS = 512  # about 8 minutes of sampling for SmolLM2 on two cores
FEWEST_TEXTS = 32
SAMPLED_TOKENS = 128
START_TOKENS = 4  # of a start, as prompts.sample_prefixes takes
BATCH_SEQUENCES = 64
BATCH_TOKENS = 4096  # padding included; bounds the memory of a forward pass
LARGEST_STATE = 32768.0  # what hidden states are scaled to at most; float16 ends at 65504
Advance = Callable[[int], None]


@dataclass(frozen=True)
class TeacherText:
    """Training sequences of token ids, and of each the original's final hidden states (after the
    final norm, before the head), float16 (tokens, hidden), divided by `scale`, a power of two."""

    sequences: list[list[int]]
    states: list[torch.Tensor]
    scale: float

    @property
    def lengths(self) -> list[int]:
        return [len(s) for s in self.sequences]

    def hidden_states(self, rows: Sequence[int]) -> torch.Tensor:
        """float32 (tokens of these sequences one after another, hidden), for head @ hidden."""
        return torch.cat([self.states[i] for i in rows]).float() * self.scale


TEXT: Kind[TeacherText] = Kind(
    "text",
    ".pt",
    lambda path: TeacherText(**load_tensors(path)),
    lambda text, path: save_tensors(path, vars(text)),
)


def teacher_text(run: Run, reference: Reference, steps: int, batch_tokens: int) -> TeacherText:
    """The original's greedy answers to the fitted rows and texts sampled from it, no more than so
    many steps read once, with its hidden states there, from the work folder or made now.

    Starts of sampled texts are the first tokens of prompts that are not held out.
    """
    count = int(np.clip(steps * batch_tokens // SAMPLED_TOKENS, FEWEST_TEXTS, SAMPLED_TEXTS))
    usable = np.flatnonzero((reference.split != HELD_OUT) & (reference.split != PACKAGED))
    starts = [reference.prompt(r)[:START_TOKENS] for r in usable.tolist()]
    answers = reference_sequences(reference.rows(calibration_rows(reference)[1]))
    seed, eos_ids = run.settings.source.seed, run.checkpoint.tokenizer.eos_ids

    def make(path: Path) -> TeacherText:
        model, parts = load_model(run.checkpoint, run.device), path.with_suffix(".parts")
        with run.stages("Sampling texts to distill on", count * SAMPLED_TOKENS) as advance:
            sampled = sample_texts(
                model, starts, count, SAMPLED_TOKENS, seed, eos_ids, parts=parts, progress=advance
            )
        sequences = answers + sampled
        tokens = sum(map(len, sequences))
        with run.stages("The original's hidden states on them", tokens) as advance:
            return capture(model, sequences, advance)

    inputs = [run.key, count]
    text = run.work.load_or_make(TEXT, inputs, make)
    shutil.rmtree(run.work.path_of(TEXT, inputs).with_suffix(".parts"), ignore_errors=True)
    return text


def sample_texts(
    model: Any,
    starts: Sequence[Sequence[int]],
    count: int,
    tokens: int,
    seed: int,
    eos_ids: Sequence[int],
    *,
    parts: Path,
    progress: Advance,
) -> list[list[int]]:
    """`count` sequences of token ids in the model's own words: a start, then sampled at temperature
    1 up to `tokens` ids in all. A sequence ends before EOS, which is learned at the position before
    it.

    Starts are used equally often, in an order drawn by seed. Each batch is saved in the folder
    `parts` when done and taken from there when it is there already, so a killed run goes on with
    the next one. progress: called with tokens sampled.
    """
    parts.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += rng.permutation(len(starts)).tolist()
    heads = [list(starts[i]) for i in drawn[:count]]
    # Heads of one length a batch need no padding, and with it no attention mask.
    batches: list[list[int]] = []
    for index in sorted(range(count), key=lambda i: (len(heads[i]), i)):
        last = batches[-1] if batches else []
        if last and len(last) < BATCH_SEQUENCES and len(heads[last[0]]) == len(heads[index]):
            last.append(index)
        else:
            batches.append([index])
    texts: list[list[int]] = [[] for _ in range(count)]
    for number, rows in enumerate(batches):
        file = parts / f"{number:06d}.json"
        if not file.is_file():
            part_seed = int(np.random.default_rng([seed, number]).integers(2**62))
            generator = torch.Generator(device="cpu").manual_seed(part_seed)
            part = _sample(model, [heads[i] for i in rows], tokens, generator, eos_ids, progress)
            write_whole(file, json.dumps(part).encode())
        for index, text in zip(rows, json.loads(file.read_bytes()), strict=True):
            texts[index] = text
    return texts


@torch.no_grad()
def _sample(
    model: Any,
    heads: Sequence[Sequence[int]],
    tokens: int,
    generator: torch.Generator,
    eos_ids: Sequence[int],
    progress: Advance,
) -> list[list[int]]:
    """heads: of one length. Drawn on the CPU, so that every device draws the same."""
    device = next(model.parameters()).device
    stop = torch.tensor(sorted(eos_ids), dtype=torch.long)
    texts = [list(h) for h in heads]
    step = torch.tensor(texts, device=device)
    alive = torch.ones(len(texts), dtype=torch.bool)
    past = None
    for _ in range(tokens - len(texts[0])):
        out = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
        shares = out.logits[:, -1].float().cpu().softmax(-1)
        drawn = torch.multinomial(shares, 1, generator=generator)
        alive &= ~torch.isin(drawn[:, 0], stop)
        if not alive.any():
            break
        for row in alive.nonzero()[:, 0].tolist():
            texts[row].append(int(drawn[row, 0]))
        progress(int(alive.sum()))
        step = drawn.to(device)
    return texts


@torch.no_grad()
def capture(model: Any, sequences: list[list[int]], progress: Advance) -> TeacherText:
    """Run the sequences through the original, `load_model`'s. progress: called with tokens done."""
    device = next(model.parameters()).device
    lengths = [len(s) for s in sequences]
    # RMSNorm's outputs are at most sqrt(hidden) times the gain, so nothing can overflow.
    gains = model.model.norm.weight
    bound = math.sqrt(len(gains)) * float(gains.abs().max())
    scale = 2.0 ** math.ceil(math.log2(max(bound, 1e-30) / LARGEST_STATE))
    states = [torch.empty(0) for _ in sequences]
    order = sorted(range(len(sequences)), key=lambda i: (lengths[i], i))
    for rows in batches_by_length(lengths, order, BATCH_TOKENS):
        ids = padded([sequences[i] for i in rows]).to(device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        scaled = (hidden.float() / scale).half().cpu()
        for place, i in enumerate(rows):
            states[i] = scaled[place, : lengths[i]].clone()
        progress(sum(lengths[i] for i in rows))
    return TeacherText(sequences, states, scale)
