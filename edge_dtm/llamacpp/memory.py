"""What a model needs in memory, and what this process may still take; asked before loading. And
that buffers which are no longer used count no more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import Room, room
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp.gguf_header import kv_bytes_per_token, read_header

# llama.cpp's graph besides the logits, and what Python and its libraries take on the way.
GRAPH_BYTES = 48 * 2**20


@dataclass(frozen=True)
class Need:
    """Bytes: of the file, which has to stay in memory whole; of the KV cache; of the rest."""

    file_bytes: int
    kv_bytes: int
    buffer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.file_bytes + self.kv_bytes + self.buffer_bytes

    def beside(self, there: Room) -> str:
        """It and what there is, in words."""
        sizes = (self.total_bytes, self.file_bytes, self.kv_bytes, self.buffer_bytes)
        total, file, kv, buffers, free = (f"{n / 1e6:,.1f} MB" for n in (*sizes, there.free_bytes))
        return (
            f"needs about {total} here (file {file}, KV cache {kv}, buffers {buffers}), "
            f"{there.limit} leaves {free}"
        )


def need(path: Path, settings: RunSettings, context_tokens: int) -> Need:
    """Of a Llama GGUF whose longest sequence has context_tokens.

    KV cache: 2 (K and V) x KV heads x head size x bytes of its type, over layers and cells.
    """
    header = read_header(path)
    kv_bytes = settings.cache_tokens(context_tokens) * kv_bytes_per_token(header, settings.kv_type)
    vocab = next((t.shape[-1] for t in header.tensors if t.name == "token_embd.weight"), 0)
    return Need(path.stat().st_size, kv_bytes, settings.logits_bytes(vocab) + GRAPH_BYTES)


def require_memory(path: Path, settings: RunSettings, context_tokens: int) -> None:
    """EdgeDtmError when the model does not fit into what this process may still take."""
    needed, there = need(path, settings, context_tokens), room()
    if needed.total_bytes > there.free_bytes:
        raise EdgeDtmError(
            f"too little memory: {path.name} {needed.beside(there)}: stop other programs, raise "
            "the limit, or compress with a smaller --max-bytes"
        )
