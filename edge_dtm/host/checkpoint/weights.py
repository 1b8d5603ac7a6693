"""A checkpoint's weights as bytes in files: headers checked and a fingerprint taken at once, all of
them hashed and searched for NaN beside other work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from threading import Thread

import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.ggml_types import row_bytes
from edge_dtm.host.checkpoint.checkpoint import ROPE_FACTORS, Checkpoint, Stored
from edge_dtm.llamacpp import ggml

SAMPLES, SAMPLE_BYTES = 4, 512  # of every tensor, for the fingerprint
PIECE_BYTES = 2**22  # read at a time
# Type -> an integer of its width, and its exponent, all ones in NaN and infinity.
EXPONENTS = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F80_0000),
}


def check_headers(checkpoint: Checkpoint) -> None:
    """EdgeDtmError listing tensors that are missing or have a wrong shape or an unknown type."""
    shapes, stored = checkpoint.shapes(), checkpoint.stored
    missing = [name for name in shapes if name not in {*stored, ROPE_FACTORS}]
    if missing:
        raise EdgeDtmError(
            f"{checkpoint.path} lacks {len(missing)} tensors ({', '.join(missing[:4])}): "
            "get the whole checkpoint again"
        )
    bad = []
    for name, shape in shapes.items():
        if (tensor := stored.get(name)) is None:
            continue
        if tensor.shape != shape:
            bad.append(f"{name} has shape {tensor.shape}, not {shape}")
        if tensor.type not in checkpoint.types:
            bad.append(f"{name} has type {tensor.type}, which is not supported (F16 is)")
    if bad:
        raise _bad_tensors(checkpoint, bad)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Names the weights by configuration, headers, file sizes and short pieces of every tensor, in
    hex. Takes under a second for 13 GB; a change between the pieces goes unnoticed."""
    tensors = sorted(checkpoint.stored.items())
    files = sorted({tensor.file for _, tensor in tensors})
    head = {
        "config": asdict(checkpoint.config),
        "tensors": [[n, t.file.name, t.type, t.shape, t.offset] for n, t in tensors],
        "bytes": {file.name: file.stat().st_size for file in files},
    }
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for path in files:
        with path.open("rb", buffering=0) as file:
            for _, tensor in tensors:
                if tensor.file == path:
                    last = max(tensor.size_bytes - SAMPLE_BYTES, 0)
                    for i in range(SAMPLES):
                        file.seek(tensor.offset + last * i // (SAMPLES - 1))
                        digest.update(file.read(min(SAMPLE_BYTES, tensor.size_bytes)))
    return digest.hexdigest()


def hash_weights(checkpoint: Checkpoint) -> str:
    """SHA-256 of the configuration without its name and of all tensors in their own types, in hex:
    the same however they are spread over files.

    EdgeDtmError listing tensors with NaN or infinite weights.
    """
    config = asdict(replace(checkpoint.config, name=""))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    bad: list[str] = []
    for name in checkpoint.shapes():
        if name == ROPE_FACTORS:  # in the configuration
            continue
        tensor, infinite = checkpoint.stored[name], 0
        digest.update(f"{name} {tensor.type} {tensor.shape}\n".encode())
        for piece in _pieces(tensor):
            if not bad:
                digest.update(piece)
            infinite += _not_finite(tensor, piece)
        if infinite:
            bad.append(f"{name} has {infinite} NaN or infinite weights")
    if bad:
        raise _bad_tensors(checkpoint, bad)
    return digest.hexdigest()


def _bad_tensors(checkpoint: Checkpoint, bad: list[str]) -> EdgeDtmError:
    return EdgeDtmError(
        f"{checkpoint.path} has {len(bad)} bad tensors: {'; '.join(bad[:4])}: get it again"
    )


def _pieces(tensor: Stored) -> Iterator[bytes]:
    """Whole rows."""
    row = tensor.size_bytes // int(np.prod(tensor.shape[:-1]))
    size = max(PIECE_BYTES // row, 1) * row
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.size_bytes, size):
            wanted = min(size, tensor.size_bytes - start)
            piece = file.read(wanted)
            if len(piece) != wanted:
                raise EdgeDtmError(f"{tensor.file} ends early: get it again")
            yield piece


def _not_finite(tensor: Stored, piece: bytes) -> int:
    """How many weights are NaN or, in float32, infinite."""
    data, kind = np.frombuffer(piece, np.uint8), tensor.type
    if kind == "F64":
        return int(np.count_nonzero(~(np.abs(data.view(np.float64)) <= np.finfo(np.float32).max)))
    if kind not in EXPONENTS:
        row_length = tensor.shape[-1]
        rows = data.reshape(-1, row_bytes(kind, row_length))
        data, kind = ggml.dequantize(kind, rows, row_length, threads=1).view(np.uint8), "F32"
    word, exponent = EXPONENTS[kind]
    return int(np.count_nonzero((data.view(word) & word(exponent)) == exponent))


class WeightsCheck:
    """`hash_weights` in a thread of its own, which ends with the process. fingerprint: as above."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.fingerprint = fingerprint(checkpoint)
        self._checkpoint = checkpoint
        self._hash: Future[str] = Future()
        self._thread = Thread(target=self._work, name="weights", daemon=True)

    def start(self) -> None:
        """Begin; later calls do nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def look(self) -> None:
        """Raises what `sha256` would, if that is known already."""
        if self._hash.done():
            self._hash.result()

    def failure(self) -> BaseException | None:
        """Waits for the end, and returns what `sha256` would raise."""
        self.start()
        return self._hash.exception()

    def sha256(self) -> str:
        """Waits for the end. Raises as `hash_weights` does."""
        self.start()
        return self._hash.result()

    def _work(self) -> None:
        try:
            self._hash.set_result(hash_weights(self._checkpoint))
        except BaseException as error:
            self._hash.set_exception(error)
