"""Facts of each GGML type."""

from __future__ import annotations

import gguf

from edge_dtm.core.errors import EdgeDtmError


def ggml_type(type_name: str) -> gguf.GGMLQuantizationType:
    """The gguf enum member of a GGML type name such as `Q8_0`; EdgeDtmError when unknown."""
    try:
        return gguf.GGMLQuantizationType[type_name]
    except KeyError:
        raise EdgeDtmError(
            f"{type_name!r} is not a GGML type; see `edge-dtm compress --help`"
        ) from None


def block_size(type_name: str) -> int:
    """Weights in one block of the type; a row's length must be a multiple of it."""
    return int(gguf.GGML_QUANT_SIZES[ggml_type(type_name)][0])


def row_bytes(type_name: str, row_length: int) -> int:
    """Bytes of one row. EdgeDtmError when the row length is no multiple of the block size."""
    block, size = gguf.GGML_QUANT_SIZES[ggml_type(type_name)]
    if row_length % block:
        raise EdgeDtmError(f"{type_name} needs rows that divide by {block}, not {row_length}")
    return int(row_length // block * size)
