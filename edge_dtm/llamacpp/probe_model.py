"""A small F16 Llama that every machine makes for itself: the strict test of the kernels.

Quantized types leave room for a healthy difference between machines, since each kernel rounds the
activations its own way; F16 leaves next to none. So the host notes what this model says, and a
device whose answer differs by more than a rounding error has broken kernels (or attention, or
norms), whatever the large model does.

Its weights come from raw PCG64 words, whose stream numpy promises to keep; nothing is shipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import HELD_OUT, TOP_K, Reference
from edge_dtm.llamacpp.runner import LlamaRunner

if TYPE_CHECKING:
    import gguf

SEED = 20251103
SEQUENCES, PROMPT_TOKENS, TOKENS = 4, 8, 24


@dataclass(frozen=True)
class LlamaShape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context_tokens: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """By name without `.weight`: (rows, row_length) of a matrix, (length,) of a norm."""
        kv, table = self.hidden // self.heads * self.kv_heads, (self.vocab, self.hidden)
        layer = {
            "attn_norm": (self.hidden,),
            "ffn_norm": (self.hidden,),
            "attn_q": (self.hidden, self.hidden),
            "attn_k": (kv, self.hidden),
            "attn_v": (kv, self.hidden),
            "attn_output": (self.hidden, self.hidden),
            "ffn_gate": (self.ffn, self.hidden),
            "ffn_up": (self.ffn, self.hidden),
            "ffn_down": (self.hidden, self.ffn),
        }
        return {"token_embd": table, "output": table, "output_norm": (self.hidden,)} | {
            f"blk.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()
        }


def llama_writer(path: Path, shape: LlamaShape, name: str | None = None) -> gguf.GGUFWriter:
    """A writer that has the metadata; tensors are still to be added."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    if name is not None:
        writer.add_name(name)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    """Write what the writer was given, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SHAPE = LlamaShape(
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn=256,
    vocab=256,
    context_tokens=PROMPT_TOKENS + TOKENS,
)


def write(path: Path) -> None:
    """Write the model as a GGUF of about 0.7 MB."""
    words = np.random.PCG64(SEED)

    def uniform(*shape: int) -> npt.NDArray[np.float64]:
        """Uniform in -1 to 1, from the upper 53 bits of each word."""
        raw = words.random_raw(int(np.prod(shape))) >> np.uint64(11)
        return (raw.astype(np.float64) / 2.0**52 - 1).reshape(shape)

    writer = llama_writer(path, SHAPE, "edge-dtm probe")
    for name, shape in SHAPE.tensors().items():
        if len(shape) == 2:
            # The standard deviation of a uniform in -1 to 1 is 1 / sqrt(3).
            weights = (uniform(*shape) * np.sqrt(3 / shape[1])).astype(np.float16)
        else:
            weights = np.full(shape, 3 if name == "output_norm" else 1, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", weights)
    finish(writer)


def sequences() -> Reference:
    """The fixed token ids that the model is fed; nobody generated them."""
    words = np.random.PCG64(SEED + 1).random_raw(SEQUENCES * (PROMPT_TOKENS + TOKENS))
    ids = (words % SHAPE.vocab).astype(np.int32).reshape(SEQUENCES, -1)
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
    with LlamaRunner(path, settings, SHAPE.context_tokens) as llama:
        return llama.teacher_forced(sequences())


def kl(host: Record, path: Path, settings: RunSettings) -> float:
    """Mean KL, host || this machine, in nats, over the model's positions."""
    write(path)
    with LlamaRunner(path, settings, SHAPE.context_tokens) as llama:
        _, kl_nats = llama.beside(sequences(), host)
    return float(kl_nats.mean())
