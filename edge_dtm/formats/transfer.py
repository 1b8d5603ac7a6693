"""How many bytes travel: what is left of blocks and files after zstd as `pack` uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from edge_dtm.formats.archive import COMPRESSION_LEVEL

SAMPLE_BYTES = 2**20  # enough for a ratio within a per cent; zstd takes a second for 50 of these
_READ_BYTES = 2**22


def packed_bytes(path: Path) -> int:
    """Bytes of a file after zstd at pack's level."""
    total = 0
    compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL)
    with path.open("rb") as file:
        for chunk in compressor.read_to_iter(file, read_size=_READ_BYTES):
            total += len(chunk)
    return total


def sample_step(rows: int, row_bytes: int) -> int:
    """Every how-many-th row is enough to tell how a matrix packs."""
    return max(1, rows * row_bytes // SAMPLE_BYTES)


def packed_estimate(some_rows: npt.NDArray[np.uint8], rows: int) -> int:
    """About what a matrix has after zstd, from some of its rows. some_rows: uint8 (some, bytes)."""
    data: Any = np.ascontiguousarray(some_rows).data
    packed = len(zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(data))
    return round(packed * rows / len(some_rows))
