"""The head of a GGUF file, read with bounds and little memory; and what the model will need of it.

gguf's own reader takes 160 MB and seconds for a vocabulary of 49,152 tokens, and trusts the file.
This one walks over the vocabulary and refuses what the file has no room for.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import Room, room
from edge_dtm.formats import ggml_types
from edge_dtm.formats.record import RunSettings

Value = int | float | bool | str

MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MORE_MEMORY = "stop other programs, raise the limit, or compress with a smaller --max-bytes"
# llama.cpp's graph besides the logits, and what Python and its libraries take on the way.
GRAPH_BYTES = 48 * 2**20
_STRING, _ARRAY = 8, 9
# enum gguf_type, as struct spells it.
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """shape as ggml has it: (row_length, rows, ...). type: a GGML type name. Bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset_bytes: int
    size_bytes: int

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.size_bytes

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def component(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Header:
    """values: metadata by key, without arrays."""

    path: Path
    file_bytes: int
    values: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    def integer(self, key: str) -> int | None:
        """A number of this architecture, such as `block_count`; None without it.

        EdgeDtmError when it is no whole number of 0 or more.
        """
        name = f"{self.architecture}.{key}"
        value = self.values.get(name)
        if value is not None and not (isinstance(value, int) and value >= 0):
            raise EdgeDtmError(
                f"{self.path}: {name!r} is no whole number of 0 or more: copy or make it again"
            )
        return value


def read_header(path: Path) -> Header:
    """EdgeDtmError, in one line, when path is no whole GGUF file of version 3 in little endian."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except OSError as error:
        raise EdgeDtmError(f"cannot read {path}: {error.strerror or error}") from None


def check_gguf(path: Path) -> None:
    """EdgeDtmError, in one line, unless path is a whole GGUF file of a Llama model.

    llama.cpp may abort the process on a broken file, so this looks first. Only the head is read:
    nothing of the weights is in memory afterwards.
    """
    name = read_header(path).architecture
    if name != "llama":
        raise EdgeDtmError(f"{path} has the architecture {name!r}; edge-dtm reads llama only")


def kv_bytes_per_token(header: Header, kv_type: str) -> int:
    """Bytes of the KV cache of one token over all layers, in the GGML type kv_type.

    layers x 2 (K and V) x KV heads x head size x bytes of the type. EdgeDtmError when one of them
    is no number.
    """
    layers, heads = header.integer("block_count") or 0, header.integer("attention.head_count") or 1
    kv_heads, size = (header.integer(f"attention.{key}") for key in ("head_count_kv", "key_length"))
    if size is None:
        size = (header.integer("embedding_length") or 0) // heads
    row_length = (heads if kv_heads is None else kv_heads) * size
    return 2 * layers * ggml_types.row_bytes(kv_type, row_length)


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
    needed, available = need(path, settings, context_tokens), room()
    if needed.total_bytes > available.free_bytes:
        raise EdgeDtmError(
            f"too little memory: {path.name} {needed.beside(available)}: {MORE_MEMORY}"
        )


class _Reader:
    """Reads on from where the file stands. EdgeDtmError when it is not what it should be."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size, self.at = path.stat().st_size, 0

    def header(self) -> Header:
        if self.file.read(4) != b"GGUF":
            raise EdgeDtmError(f"{self.path} is no GGUF file: it does not start with GGUF")
        if self.file.read(4) != (3).to_bytes(4, "little"):
            raise EdgeDtmError(
                f"{self.path} is not GGUF version 3 in little endian: convert the model again"
            )
        self.at = 8
        n_tensors, n_values = self._number("<Q"), self._number("<Q")
        # The least that a tensor and a value take; so no count can keep the loops going for long.
        self._need(n_tensors * 24 + n_values * 13)
        values: dict[str, Value] = {}
        for _ in range(n_values):
            key, value = self._string(), self._value(self._number("<I"))
            if key in values:
                raise self._broken(f"the key {key[:80]!r} is there twice")
            if value is not None:
                values[key] = value
        tensors = {t.name: t for t in (self._tensor() for _ in range(n_tensors))}
        if len(tensors) != n_tensors:
            raise self._broken("two tensors have one name")
        if not tensors:
            raise EdgeDtmError(f"{self.path} holds no tensors")
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self._broken(f"its alignment is {str(alignment)[:40]}")
        start = -(-self.at // alignment) * alignment
        end = start + max(t.end_bytes for t in tensors.values())
        if end > self.size:
            raise EdgeDtmError(
                f"{self.path} is truncated: its tensors need {end} bytes, it has {self.size}; "
                "copy it again"
            )
        placed = (replace(t, offset_bytes=start + t.offset_bytes) for t in tensors.values())
        return Header(self.path, self.size, values, tuple(placed))

    def _broken(self, reason: str) -> EdgeDtmError:
        return EdgeDtmError(
            f"{self.path} is truncated or no GGUF file ({reason}): copy or make it again"
        )

    def _tensor(self) -> TensorInfo:
        """Its offset is from the start of the data."""
        name, n_dims = self._string(), self._number("<I")
        label = f"the tensor {name[:80]!r}"
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise self._broken(f"{label} has {n_dims} dimensions")
        shape = tuple(self._number("<Q") for _ in range(n_dims))
        number, offset = self._number("<I"), self._number("<Q")
        try:
            ggml_type = ggml_types.by_number(number)
        except EdgeDtmError as error:
            raise self._broken(f"{label}: {error}") from None
        if min(shape) < 1 or shape[0] % ggml_type.block_size:
            raise self._broken(f"{label} has a shape that {ggml_type.name} cannot have")
        size = prod(shape) // ggml_type.block_size * ggml_type.block_bytes
        return TensorInfo(name, shape, ggml_type.name, offset, size)

    def _value(self, kind: int) -> Value | None:
        """None for an array, which is passed over."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(self._code(kind))
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            self._need(count * 8)
            for _ in range(count):
                self._skip(self._number("<Q"))
        else:
            self._skip(count * struct.calcsize(self._code(kind)))
        return None

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise self._broken(f"a value has the unknown type {kind}")
        return f"<{_NUMBERS[kind]}"

    def _string(self) -> str:
        return self._read(self._number("<Q")).decode("utf-8", "replace")

    def _number(self, code: str) -> int:
        # bool and float are numbers too; only metadata has them, and takes what comes.
        (value,) = struct.unpack(code, self._read(struct.calcsize(code)))
        return value  # type: ignore[no-any-return]

    def _need(self, count: int) -> None:
        if count > self.size - self.at:
            left = self.size - self.at
            raise self._broken(f"at byte {self.at} it needs {count} more, it has {left}")

    def _skip(self, count: int) -> None:
        self._need(count)
        self.file.seek(count, 1)
        self.at += count

    def _read(self, count: int) -> bytes:
        self._need(count)
        self.at += count
        return self.file.read(count)
