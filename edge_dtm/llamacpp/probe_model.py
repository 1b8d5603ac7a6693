"""A small F16 Llama that every machine makes for itself: the strict test of the kernels.

Quantized types leave room for a healthy difference between machines, since each kernel rounds the
activations its own way; F16 leaves next to none. So the host notes what this model says, and a
device whose answer differs by more than a rounding error has broken kernels (or attention, or
norms), whatever the large model does.

Its weights come from raw PCG64 words, whose stream numpy promises to keep; nothing is shipped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_dtm.core.metrics import top_kl
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import HELD_OUT, TOP_K, Reference
from edge_dtm.llamacpp.llama_gguf import LlamaShape, finish, llama_writer
from edge_dtm.llamacpp.runner import LlamaRunner

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, VOCAB = 128, 2, 4, 2, 256, 256
SEQUENCES, PROMPT_TOKENS, TOKENS = 4, 8, 24
SHAPE = LlamaShape(HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, VOCAB, PROMPT_TOKENS + TOKENS)
SEED = 20251103


def write(path: Path) -> None:
    """Write the model as a GGUF of about 0.7 MB."""
    words = np.random.PCG64(SEED)

    def uniform(*shape: int) -> npt.NDArray[np.float64]:
        """Uniform in -1 to 1, from the upper 53 bits of each word."""
        raw = words.random_raw(int(np.prod(shape))) >> np.uint64(11)
        return (raw.astype(np.float64) / 2.0**52 - 1).reshape(shape)

    writer = llama_writer(path, SHAPE, "edge-dtm probe")

    def matrix(name: str, rows: int, columns: int) -> None:
        # The standard deviation of a uniform in -1 to 1 is 1 / sqrt(3).
        weights = uniform(rows, columns) * np.sqrt(3 / columns)
        writer.add_tensor(f"{name}.weight", weights.astype(np.float16))

    def norm(name: str, gain: float) -> None:
        writer.add_tensor(f"{name}.weight", np.full(HIDDEN, gain, dtype=np.float32))

    matrix("token_embd", VOCAB, HIDDEN)
    matrix("output", VOCAB, HIDDEN)
    norm("output_norm", 3)
    for layer in range(LAYERS):
        norm(f"blk.{layer}.attn_norm", 1)
        norm(f"blk.{layer}.ffn_norm", 1)
        for name, (rows, columns) in SHAPE.matrices().items():
            matrix(f"blk.{layer}.{name}", rows, columns)
    finish(writer)


def sequences() -> Reference:
    """The fixed token ids that the model is fed; nobody generated them."""
    words = np.random.PCG64(SEED + 1).random_raw(SEQUENCES * (PROMPT_TOKENS + TOKENS))
    ids = (words % VOCAB).astype(np.int32).reshape(SEQUENCES, -1)
    shape = (SEQUENCES, TOKENS)
    return Reference(
        prompt_ids=ids[:, :PROMPT_TOKENS],
        prompt_lengths=np.full(SEQUENCES, PROMPT_TOKENS, dtype=np.int32),
        generated_ids=ids[:, PROMPT_TOKENS:],
        generated_lengths=np.full(SEQUENCES, TOKENS, dtype=np.int32),
        top_ids=np.zeros((*shape, TOP_K), dtype=np.int32),
        top_logits=np.zeros((*shape, TOP_K), dtype=np.float32),
        log_normalizers=np.zeros(shape, dtype=np.float32),
        split=np.full(SEQUENCES, HELD_OUT, dtype=np.uint8),
        texts=np.full(SEQUENCES, ""),
        provenance={},
    )


def record(path: Path, settings: RunSettings) -> Record:
    """What the model says on this machine; path: where its GGUF may be written."""
    write(path)
    with LlamaRunner(path, settings, PROMPT_TOKENS + TOKENS) as llama:
        return llama.teacher_forced(sequences())


def kl(host: Record, path: Path, settings: RunSettings) -> float:
    """Mean KL, host || this machine, in nats, over the model's positions."""
    write(path)
    there = np.zeros_like(host.top_logits)

    def observe(row: int, position: int, logits: npt.NDArray[np.float32]) -> None:
        there[row, position] = logits[host.top_ids[row, position]]

    with LlamaRunner(path, settings, PROMPT_TOKENS + TOKENS) as llama:
        llama.teacher_forced(sequences(), observe=observe)
    return float(top_kl(host.top_logits, there).mean())
