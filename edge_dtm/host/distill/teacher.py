"""What distillation trains on: texts of the original's own, and what the original says to them.

Of the original only its final hidden states are kept. Its logits are the head times these, so
that while the student trains the original need not be in memory, and a token takes 2 x hidden
bytes instead of 4 x vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import write_whole
from edge_dtm.formats.reference import DAMAGED, Reference
from edge_dtm.host.trajectory.prompts import Prompt

FloatArray = npt.NDArray[np.float32]
BATCH_SEQUENCES = 64
BATCH_TOKENS = 4096  # padding included; bounds the memory of a forward pass
START_TOKENS = 4  # of a start, as prompts.sample_prefixes takes
_LARGEST = 32768.0  # what the largest hidden state is scaled to at most; float16 ends at 65504


def reference_sequences(reference: Reference) -> list[list[int]]:
    """Prompt and answer of every row as training sequences, without the last id: nothing was
    generated behind it."""
    return [
        (reference.prompt(row) + reference.generated(row))[:-1] for row in range(len(reference))
    ]


def batches_by_length(lengths: Sequence[int], order: Iterable[int], tokens: int) -> list[list[int]]:
    """Cut sequences, taken in `order` (of rising length), into batches of at most `tokens`,
    padding included; a longer sequence is a batch of its own."""
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[index] <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def padded(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 (sequences, longest). Padding stands to the right, where causal attention never looks
    back from; its id is 0."""
    out = torch.zeros((len(sequences), max(map(len, sequences))), dtype=torch.long)
    for row, ids in enumerate(sequences):
        out[row, : len(ids)] = torch.tensor(ids)
    return out


def sample_texts(
    model: Any,
    starts: Sequence[Prompt],
    count: int,
    tokens: int,
    seed: int,
    eos_ids: Sequence[int],
    *,
    parts: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """`count` sequences of token ids in the model's own words: the first START_TOKENS ids of a
    start, then sampled at temperature 1 up to `tokens` ids in all. A sequence ends before EOS,
    which is learned at the position before it.

    Starts are used equally often, in an order drawn by seed. Each batch is saved in the folder
    `parts` when done and taken from there when it is there already, so a killed run goes on with
    the next one; parts made with other arguments are made anew (the model is not among what is
    compared: one folder a model). progress: called with tokens sampled.
    """
    if not starts or count < 1:
        return []
    rng = np.random.default_rng(seed)
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += rng.permutation(len(starts)).tolist()
    heads = [list(starts[i].ids[:START_TOKENS]) for i in drawn[:count]]
    # Heads of one length a batch need no padding, and with it no attention mask.
    batches: list[list[int]] = []
    for index in sorted(range(count), key=lambda i: (len(heads[i]), i)):
        last = batches[-1] if batches else []
        if last and len(last) < BATCH_SEQUENCES and len(heads[last[0]]) == len(heads[index]):
            last.append(index)
        else:
            batches.append([index])
    asked = [seed, tokens, BATCH_SEQUENCES, sorted(eos_ids), heads]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    if parts is not None:
        parts.mkdir(parents=True, exist_ok=True)
    out: list[list[int]] = [[] for _ in range(count)]
    for number, rows in enumerate(batches):
        file = None if parts is None else parts / f"{number:06d}.json"
        texts = None if file is None else _read_part(file, key)
        if texts is None:
            generator = torch.Generator(device="cpu").manual_seed(
                int(np.random.default_rng([seed, number]).integers(2**62))
            )
            texts = _sample(model, [heads[i] for i in rows], tokens, generator, eos_ids, progress)
            if file is not None:
                write_whole(file, json.dumps({"key": key, "texts": texts}).encode())
        elif progress:
            progress(sum(len(t) - len(heads[i]) for t, i in zip(texts, rows, strict=True)))
        for index, text in zip(rows, texts, strict=True):
            out[index] = text
    return out


def _read_part(file: Path, key: str) -> list[list[int]] | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data["texts"] if isinstance(data, dict) and data.get("key") == key else None


@torch.no_grad()
def _sample(
    model: Any,
    heads: Sequence[Sequence[int]],
    tokens: int,
    generator: torch.Generator,
    eos_ids: Sequence[int],
    progress: Callable[[int], None] | None,
) -> list[list[int]]:
    """heads: of one length. Drawn on the CPU, so that every device draws the same."""
    device = next(model.parameters()).device
    stop = torch.tensor(sorted(eos_ids), dtype=torch.long)
    texts = [list(h)[:tokens] for h in heads]
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
        if progress:
            progress(int(alive.sum()))
        step = drawn.to(device)
    return texts


class TeacherText:
    """Training sequences, and the original's final hidden states (after the final norm, before the
    head) of all their tokens: float16 (tokens, hidden) in `hidden.bin`, divided by a power of two.

    A folder belongs to one original. EdgeDtmError when there is no text.
    """

    def __init__(self, folder: Path, sequences: Sequence[Sequence[int]], hidden: int) -> None:
        """sequences: token ids, each at least one; hidden: width of the original."""
        self.folder, self.hidden = folder, hidden
        self.sequences = [list(map(int, s)) for s in sequences if len(s)]
        if not self.sequences:
            raise EdgeDtmError("there is no text to distill on: give more prompts")
        self.lengths = [len(s) for s in self.sequences]
        self.edges = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.tokens = int(self.edges[-1])
        text = json.dumps([hidden, self.sequences]).encode()
        self.key = hashlib.sha256(text).hexdigest()  # of the text, not of the original
        order = sorted(range(len(self.sequences)), key=lambda i: (self.lengths[i], i))
        self._batches = batches_by_length(self.lengths, order, BATCH_TOKENS)
        self._done = 0  # batches
        self._scale = 1.0
        self._load()

    @property
    def size_bytes(self) -> int:
        return 2 * self.tokens * self.hidden

    @property
    def captured(self) -> bool:
        return self._done == len(self._batches)

    def check_disk(self) -> None:
        """EdgeDtmError when the file would not fit the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if not self._done and free < self.size_bytes * 1.05:
            raise EdgeDtmError(
                f"{self.folder} has {free / 1e9:.1f} GB free, the original's hidden states need "
                f"{self.size_bytes / 1e9:.1f} GB: free some space or distill on less text"
            )

    @property
    def _state(self) -> Path:
        return self.folder / "teacher.json"

    def _load(self) -> None:
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            # Another text's states are of no use; they are overwritten.
            if state["key"] == self.key and (self.folder / "hidden.bin").is_file():
                self._done, self._scale = int(state["done"]), float(state["scale"])
        except FileNotFoundError:
            return
        except (*DAMAGED, TypeError) as error:
            raise EdgeDtmError(
                f"{self._state} is damaged ({error}): run edge-dtm compress again with --no-resume"
            ) from None

    def _file(self, mode: str) -> np.memmap[Any, Any]:
        path, shape = self.folder / "hidden.bin", (self.tokens, self.hidden)
        return np.memmap(path, dtype=np.float16, mode=mode, shape=shape)  # type: ignore[call-overload, no-any-return]

    @torch.no_grad()
    def capture(self, model: Any, progress: Callable[[int], None] | None = None) -> None:
        """Run the sequences not yet captured through the original, `load_model`'s.

        progress: called with tokens done.
        """
        self.check_disk()
        if self.captured:
            if progress:
                progress(self.tokens)
            return
        device = next(model.parameters()).device
        if not self._done:
            # RMSNorm's outputs are at most sqrt(hidden) times the gain, so nothing can overflow.
            bound = math.sqrt(self.hidden) * float(model.model.norm.weight.abs().max())
            self._scale = 2.0 ** math.ceil(math.log2(max(bound, 1e-30) / _LARGEST))
        elif progress:
            progress(sum(self.lengths[i] for rows in self._batches[: self._done] for i in rows))
        try:
            file = self._file("r+" if self._done else "w+")
            for rows in self._batches[self._done :]:
                ids = padded([self.sequences[i] for i in rows]).to(device)
                states = model.model(input_ids=ids, use_cache=False).last_hidden_state
                scaled = (states.float() / self._scale).half().cpu().numpy()
                for place, i in enumerate(rows):
                    file[self.edges[i] : self.edges[i + 1]] = scaled[place, : self.lengths[i]]
                file.flush()
                self._done += 1
                state = {"key": self.key, "done": self._done, "scale": self._scale}
                write_whole(self._state, json.dumps(state).encode())
                if progress:
                    progress(sum(self.lengths[i] for i in rows))
        except OSError as error:
            raise EdgeDtmError(
                f"{self.folder} could not be written ({error.strerror or error}): free some space"
            ) from None

    def hidden_states(self, rows: Sequence[int]) -> torch.Tensor:
        """float32 (tokens of these sequences one after another, hidden), for head @ hidden.

        EdgeDtmError when they are not all captured or the file is gone.
        """
        if not self.captured:
            raise EdgeDtmError(f"{self.folder} is not complete: run edge-dtm compress again")
        try:
            file = self._file("r")
        except (OSError, ValueError) as error:
            raise EdgeDtmError(
                f"{self.folder} has lost the original's hidden states ({error}): run edge-dtm "
                "compress again with --no-resume"
            ) from None
        parts = [np.asarray(file[self.edges[i] : self.edges[i + 1]]) for i in rows]
        return torch.from_numpy(np.concatenate(parts)).float() * self._scale

    def remove(self) -> None:
        # The state first: without it the rest counts for nothing.
        self._state.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._done = 0
