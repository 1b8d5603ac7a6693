"""Replays token sequences through llama.cpp and records its argmaxes and top logits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import Advance
from edge_dtm.core.metrics import top_kl
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import TOP_K, Reference
from edge_dtm.llamacpp import llama
from edge_dtm.llamacpp.schedule import Step, calls, chunks, prompt_steps, steps_of

Observer = Callable[[int, int, npt.NDArray[np.float32]], None]


@dataclass(frozen=True)
class Timing:
    """One prompt and what was decoded behind it, one token a call, in seconds."""

    prompt_tokens: int
    prefill_s: float
    decode_s: tuple[float, ...]

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        return len(self.decode_s) / sum(self.decode_s)


class LlamaRunner(AbstractContextManager["LlamaRunner"]):
    """A GGUF model on the CPU, in a context of its own.

    path: the GGUF file; context_tokens: the longest sequence that will be decoded. Use it as a
    context manager or call close(). EdgeDtmError when llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, settings: RunSettings, context_tokens: int) -> None:
        self.path, self.settings, self.context_tokens = path, settings, context_tokens
        self._lib = lib = llama.library()
        with ExitStack() as stack:
            self._context, self._batch = self._load(stack)
            self._memory = lib.llama_get_memory(self._context)
            vocab = lib.llama_model_get_vocab(lib.llama_get_model(self._context))
            self.n_vocab = int(lib.llama_vocab_n_tokens(vocab))
            if self.n_vocab < TOP_K:
                raise EdgeDtmError(f"{self.path}: vocabulary of {self.n_vocab} is below {TOP_K}")
            self._resources = stack.pop_all()

    def _load(self, stack: ExitStack) -> tuple[Any, Any]:
        """The context and the batch; stack: gets what frees them, and the model."""
        lib, settings = self._lib, self.settings
        kv_type = getattr(lib, f"GGML_TYPE_{settings.kv_type}", None)
        if kv_type is None:
            raise EdgeDtmError(f"{settings.kv_type!r} is no GGML type; take F16 as kv_type")
        model = llama.load_model(self.path, repack=settings.repack)
        stack.callback(lib.llama_model_free, model)
        params = lib.llama_context_default_params()
        # In a cache of its own each sequence has the same place as if it ran alone, and with it
        # the same order of summation: the answer does not depend on its neighbours.
        params.kv_unified = False
        params.n_ctx = settings.cache_tokens(self.context_tokens)
        params.n_batch = settings.batch_tokens
        params.n_ubatch = min(settings.micro_batch_tokens, settings.batch_tokens)
        params.n_seq_max = settings.sequences_per_call
        params.n_threads = params.n_threads_batch = settings.threads
        flash_attention = "ENABLED" if settings.flash_attention else "DISABLED"
        params.flash_attn_type = getattr(lib, f"LLAMA_FLASH_ATTN_TYPE_{flash_attention}")
        params.type_k = params.type_v = kv_type
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        llama.last_errors.clear()
        context = lib.llama_init_from_model(model, params)
        if not context:
            raise EdgeDtmError(
                f"{self.path}: llama.cpp made no context of {params.n_ctx} tokens"
                f"{llama.error_text()}; lower the context or change kv_type"
            )
        stack.callback(lib.llama_free, context)
        batch = lib.llama_batch_init(settings.batch_tokens, 0, 1)
        stack.callback(lib.llama_batch_free, batch)
        for i in range(settings.batch_tokens):
            batch.n_seq_id[i] = 1
        return context, batch

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free batch, context and model; a second call does nothing."""
        self._resources.close()

    def teacher_forced(
        self,
        reference: Reference,
        progress: Advance | None = None,
        observe: Observer | None = None,
    ) -> Record:
        """Feed the reference's own tokens and note the argmax at every generated position.

        Short sequences share decode calls (see `calls`). progress: called with the tokens done
        since its last call, replay_tokens() in all, those that were still in the cache included.
        observe: called with row, position and all logits float32 (V,), valid during the call only.
        EdgeDtmError when a sequence does not fit the context or the vocabulary.
        """
        self._check(reference)
        record = Record.empty("teacher_forced", reference, self.settings)
        seconds, count = 0.0, 0
        self._lib.llama_memory_clear(self._memory, False)
        width, most = self.settings.sequences_per_call, self.settings.batch_tokens
        for call in calls(reference, most, width):
            steps = []
            for feed in call:
                if not self._lib.llama_memory_seq_rm(self._memory, feed.slot, feed.cached, -1):
                    raise EdgeDtmError(f"{self.path}: llama.cpp cannot shorten its KV cache")
                steps += steps_of(reference, feed)
            cached = sum(feed.cached for feed in call)
            for chunk in chunks(steps, most):
                seconds += self._decode(chunk)
                count += len(chunk)
                for i, step in enumerate(chunk):
                    if step.target >= 0:
                        logits = self._logits(i)
                        token = int(reference.generated_ids[step.row, step.target])
                        _note(record, step.row, step.target, logits, token)
                        if observe:
                            observe(step.row, step.target, logits)
                if progress:
                    progress(len(chunk) + cached)
                cached = 0
        return replace(record, prefill_tokens_per_s=_rate(count, seconds))

    def beside(
        self, reference: Reference, other: Record, progress: Advance | None = None
    ) -> tuple[Record, npt.NDArray[np.float64]]:
        """teacher_forced, and the KL, other || this run, in nats, at each position (S, N)."""
        logits_of_top = np.zeros_like(other.top_logits)

        def observe(row: int, position: int, logits: npt.NDArray[np.float32]) -> None:
            logits_of_top[row, position] = logits[other.top_ids[row, position]]

        record = self.teacher_forced(reference, progress, observe)
        return record, top_kl(other.top_logits, logits_of_top)

    def greedy(self, reference: Reference, progress: Advance | None = None) -> Record:
        """Decode greedily behind each prompt, one token a call, as often as the reference did.

        EOS does not stop it: the reference's length does, which already ends at its own EOS.
        progress and errors as in teacher_forced.
        """
        self._check(reference)
        record = Record.empty("generate", reference, self.settings)
        seconds, count = [0.0, 0.0], [0, 0]  # prefill, decode
        for row in range(len(reference)):
            self._lib.llama_memory_clear(self._memory, False)
            prompt = reference.prompt(row)
            for chunk in chunks(prompt_steps(prompt), self.settings.batch_tokens):
                seconds[0] += self._decode(chunk)
                count[0] += len(chunk)
                if progress:
                    progress(len(chunk))
            token = _note(record, row, 0, self._logits(len(chunk) - 1))
            for target in range(1, int(reference.generated_lengths[row])):
                seconds[1] += self._decode([Step(token, len(prompt) + target - 1, target=target)])
                count[1] += 1
                token = _note(record, row, target, self._logits(0))
                if progress:
                    progress(1)
        prefill, decode = map(_rate, count, seconds)
        return replace(record, prefill_tokens_per_s=prefill, decode_tokens_per_s=decode)

    def time_decoding(
        self,
        prompt_tokens: int,
        decode_tokens: int,
        during: AbstractContextManager[object] | None = None,
    ) -> Timing:
        """Time a prompt, and tokens decoded behind it one a call, in an empty cache.

        The tokens are arbitrary ids; speed does not depend on them. during: entered while the
        decoding runs, but not the prompt. EdgeDtmError when they do not fit the context.
        """
        if prompt_tokens < 1 or prompt_tokens + decode_tokens > self.context_tokens:
            raise EdgeDtmError(
                f"{prompt_tokens} + {decode_tokens} tokens do not fit the context of "
                f"{self.context_tokens}"
            )
        self._lib.llama_memory_clear(self._memory, False)
        random = np.random.default_rng(0)
        ids = random.integers(0, self.n_vocab, prompt_tokens + decode_tokens).tolist()
        # As in use: logits only behind the last prompt token and behind each decoded one.
        steps = prompt_steps(ids[:prompt_tokens])
        prefill = sum(self._decode(c) for c in chunks(steps, self.settings.batch_tokens))
        behind = range(prompt_tokens, len(ids))
        with during or nullcontext():
            decode = [self._decode([Step(ids[at], at, target=0)]) for at in behind]
        return Timing(prompt_tokens, prefill, tuple(decode))

    def set_threads(self, threads: int) -> None:
        """Use another number of CPU threads from the next call on."""
        self._lib.llama_set_n_threads(self._context, threads, threads)

    def _check(self, reference: Reference) -> None:
        # The last generated token is never fed.
        needed = reference.prompt_lengths.astype(int) + reference.generated_lengths - 1
        long = np.flatnonzero(needed > self.context_tokens)
        if long.size:
            raise EdgeDtmError(
                f"{long.size} sequences do not fit the context of {self.context_tokens} tokens "
                f"(first: number {long[0] + 1} needs {needed[long[0]]}): raise the context"
            )
        known = range(self.n_vocab)
        for row in range(len(reference)):
            if any(i not in known for i in reference.prompt(row) + reference.generated(row)):
                raise EdgeDtmError(
                    f"{self.path}: sequence {row + 1} has token ids outside the vocabulary of "
                    f"{self.n_vocab}: model and reference do not belong together"
                )

    def _decode(self, steps: Sequence[Step]) -> float:
        """Run one call and return its seconds."""
        batch = self._batch
        batch.n_tokens = len(steps)
        for i, step in enumerate(steps):
            batch.token[i] = step.token
            batch.pos[i] = step.position
            batch.seq_id[i][0] = step.slot
            batch.logits[i] = step.target >= 0
        llama.last_errors.clear()
        start = time.perf_counter()
        code = self._lib.llama_decode(self._context, batch)
        # llama_decode may return before the work is done on some backends.
        self._lib.llama_synchronize(self._context)
        seconds = time.perf_counter() - start
        if code:
            raise EdgeDtmError(
                f"{self.path}: llama.cpp failed to decode (code {code}){llama.error_text()}"
            )
        return seconds

    def _logits(self, index: int) -> npt.NDArray[np.float32]:
        """A view of the logits at one place of the last call, valid until the next call."""
        pointer = self._lib.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise EdgeDtmError(f"{self.path}: llama.cpp gave no logits{llama.error_text()}")
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count and seconds > 0 else math.nan


def _note(
    record: Record, row: int, target: int, logits: npt.NDArray[np.float32], token: int | None = None
) -> int:
    """Store one position and return its argmax; token: whose probability is wanted."""
    ids, values, normalizer = summarize(logits)
    record.ids[row, target] = ids[0]
    record.top_ids[row, target] = ids
    record.top_logits[row, target] = values
    record.log_normalizers[row, target] = normalizer
    if token is not None:
        record.reference_log_probabilities[row, target] = float(logits[token]) - normalizer
    return int(ids[0])


def summarize(
    logits: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], float]:
    """(top ids, top logits falling, log normalizer in nats) of logits (V,), V at least TOP_K.

    On ties the lower id comes first, so the first id is np.argmax's. EdgeDtmError when a logit is
    nan or infinite.
    """
    top = float(logits.max())
    normalizer = top + math.log(float(np.exp(logits - np.float32(top)).sum(dtype=np.float64)))
    if not math.isfinite(normalizer):
        raise EdgeDtmError("the model computes logits that are not finite: its weights are broken")
    # The eighth largest of the maxima of some stretches is no larger than the eighth logit, so that
    # what reaches it holds all candidates, ties included, without sorting the vocabulary.
    stretches = max(min(logits.size // 32, 1024), TOP_K)
    maxima = np.maximum.reduceat(logits, np.arange(stretches) * logits.size // stretches)
    bound = np.partition(maxima, stretches - TOP_K)[stretches - TOP_K]
    candidates = np.flatnonzero(logits >= bound)
    order = np.lexsort((candidates, -logits[candidates]))[:TOP_K]
    ids = candidates[order]
    return ids, logits[ids], normalizer
