"""The reference pack: prompts, the original model's greedy tokens and its top logits.

One `.npz` without pickle. Rows are sequences; ids beyond a row's length are PADDING.
"""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_dtm.core import strict_json
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import write_whole
from edge_dtm.core.strict_json import StrictModel, check_version, validated

SCHEMA_VERSION = 1
PADDING = -1
TOP_K = 8
# EXTRA: calibration that is only fitted to, never measured on; PACKAGED: the packaged prompts,
# measured besides the held-out part of the user's own.
CALIBRATION, HELD_OUT, EXTRA, PACKAGED = 0, 1, 2, 3
# What numpy raises on a damaged npz file; a flipped bit in a zip's head reads as an unknown
# compression, encryption or version.
DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    AttributeError,
    TypeError,
    ArithmeticError,
)

# Of all arrays that are read from one file, unpacked: ten times a reference of 10,000 sequences of
# 200 tokens, and less than what a board with 1 GB can give.
ARRAYS_LIMIT_BYTES = 2**29
# Of a zip's table of contents, about a hundred bytes a member; zipfile reads it whole.
_CONTENTS_LIMIT_BYTES = 2**20
_END = b"PK\x05\x06"  # of a zip's last record, PKWARE's APPNOTE 4.3.16
_END64 = b"PK\x06\x07"  # of the record before it that has the sizes above 32 bits, 4.3.15
_END_BYTES, _END64_BYTES = 22, 20

ArrayTable = Mapping[str, tuple[npt.DTypeLike, str]]
"""Name of an array -> its type (str: text of any length) and a letter a dimension."""

_ARRAYS: ArrayTable = {
    "prompt_ids": (np.int32, "SP"),
    "prompt_lengths": (np.int32, "S"),
    "generated_ids": (np.int32, "SN"),
    "generated_lengths": (np.int32, "S"),
    "top_ids": (np.int32, "SNK"),
    "top_logits": (np.float32, "SNK"),
    "log_normalizers": (np.float32, "SN"),
    "split": (np.uint8, "S"),
    "texts": (str, "S"),
}


@dataclass(frozen=True)
class Reference:
    """S sequences of at most P prompt tokens and N generated tokens.

    prompt_ids int32 (S, P), prompt_lengths int32 (S,), generated_ids int32 (S, N),
    generated_lengths int32 (S,), top_ids int32 (S, N, TOP_K), top_logits float32 (S, N, TOP_K)
    falling, log_normalizers float32 (S, N): log of the sum of exp of all logits, split uint8 (S,):
    CALIBRATION, HELD_OUT, EXTRA or PACKAGED, texts str (S,): the prompt as text, special tokens spelled out.
    provenance: model hash, seed, settings, package versions.
    """

    prompt_ids: npt.NDArray[np.int32]
    prompt_lengths: npt.NDArray[np.int32]
    generated_ids: npt.NDArray[np.int32]
    generated_lengths: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32]
    top_logits: npt.NDArray[np.float32]
    log_normalizers: npt.NDArray[np.float32]
    split: npt.NDArray[np.uint8]
    texts: npt.NDArray[np.str_]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        s, n = self.generated_ids.shape
        check_shapes(self, _ARRAYS, S=s, N=n, K=TOP_K, P=self.prompt_ids.shape[1])
        if s and (
            self.prompt_lengths.min() < 1
            or self.prompt_lengths.max() > self.prompt_ids.shape[1]
            or self.generated_lengths.min() < 1
            or self.generated_lengths.max() > n
        ):
            raise ValueError("a length lies outside its row")

    def __len__(self) -> int:
        return len(self.split)

    @property
    def margins(self) -> npt.NDArray[np.float32]:
        """Top-1 minus top-2 logit of the original at each generated position, (S, N)."""
        return self.top_logits[:, :, 0] - self.top_logits[:, :, 1]

    def prompt(self, row: int) -> list[int]:
        return [int(i) for i in self.prompt_ids[row, : self.prompt_lengths[row]]]

    def generated(self, row: int) -> list[int]:
        return [int(i) for i in self.generated_ids[row, : self.generated_lengths[row]]]

    def rows(self, index: npt.NDArray[Any]) -> Reference:
        """The reference of some sequences only (an index or boolean array over sequences)."""
        return replace(self, **{name: getattr(self, name)[index] for name in _ARRAYS})

    def part(self, split: int) -> Reference:
        return self.rows(self.split == split)

    def save(self, path: Path) -> None:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        save_npz(path, arrays, {"kind": "reference", **self.provenance})

    @classmethod
    def load(cls, path: Path) -> Reference:
        """EdgeDtmError when the file is no whole reference of this schema."""
        arrays, provenance = load_npz(path, list(_ARRAYS), "reference")
        try:
            check_arrays(arrays, _ARRAYS)
            return cls(**arrays, provenance=provenance)
        except (ValueError, IndexError) as error:
            raise EdgeDtmError(f"{path}: {error}; make it again with edge-dtm compress") from None


def check_shapes(holder: object, table: ArrayTable, **sizes: int) -> None:
    """ValueError unless the holder's arrays have the shapes of the table; sizes: of its letters."""
    wrong = [
        name
        for name, (_, letters) in table.items()
        if getattr(holder, name).shape != tuple(sizes[letter] for letter in letters)
    ]
    if wrong:
        raise ValueError(f"shapes do not fit {sizes['S']} x {sizes['N']}: {', '.join(wrong)}")


def check_arrays(
    arrays: Mapping[str, npt.NDArray[Any]], table: ArrayTable, may_be_nan: str = ""
) -> None:
    """ValueError unless each array has its type, numbers are finite and characters are some."""
    for name, (wanted, _) in table.items():
        array = arrays[name]
        if array.dtype != wanted and not (wanted is str and array.dtype.kind == "U"):
            raise ValueError(f"wrong types of {name}")
        if array.dtype.kind == "f" and name != may_be_nan and not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        if array.dtype.kind == "U":
            # numpy takes any 32 bits for a character. Python and UTF-8 do not.
            codes = np.frombuffer(array.tobytes(), dtype=np.uint32)
            if ((codes > sys.maxunicode) | ((codes >= 0xD800) & (codes <= 0xDFFF))).any():
                raise ValueError(f"{name} holds what is no character")


def save_npz(path: Path, arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Write arrays and a JSON head without pickle, under a temporary name until complete."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **meta}, sort_keys=True, allow_nan=False)
    head = np.frombuffer(text.encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, meta=head, **arrays)
    write_whole(path, buffer.getvalue())


def load_npz(
    path: Path, names: Sequence[str], kind: str
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what save_npz wrote. EdgeDtmError, in one line, for anything that is not that.

    Only the named arrays are read, ARRAYS_LIMIT_BYTES of them at most. numpy's own reader is
    not used, because it believes a shape and unpacks a member before anything is compared.
    """
    try:
        with path.open("rb") as file:
            _check_contents(file)
            with zipfile.ZipFile(file) as members:
                meta = strict_json.loads(_read_arrays(members, ["meta"])["meta"].tobytes())
                check_version(meta, SCHEMA_VERSION, str(path), kind)
                return _read_arrays(members, names), meta
    except FileNotFoundError:
        raise EdgeDtmError(f"{path} does not exist") from None
    except MemoryError:
        raise EdgeDtmError(f"{path} does not fit into memory: stop other programs") from None
    except DAMAGED as error:
        raise EdgeDtmError(f"{path} is no readable {kind} file ({error}): make it again") from None


def _check_contents(file: BinaryIO) -> None:
    """ValueError unless the zip's table of contents is small; leaves the file at its start."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _END_BYTES - _END64_BYTES, 0))
    tail = file.read()
    file.seek(0)
    end = tail[-_END_BYTES:]
    # numpy writes neither a comment nor sizes above 32 bits; with one, the table could be anywhere.
    if len(end) < _END_BYTES or end[:4] != _END or end[20:] != bytes(2) or tail[:4] == _END64:
        raise ValueError("it is cut off or was not written by edge-dtm")
    if int.from_bytes(end[12:16], "little") > _CONTENTS_LIMIT_BYTES:
        raise ValueError("its table of contents is too long")


def _read_arrays(members: zipfile.ZipFile, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """ValueError when one is not whole or packed in an unusual way, or all are too large."""
    infos = [members.getinfo(f"{name}.npy") for name in names]
    # Others ask for memory by themselves: LZMA's dictionary may be 4 GiB.
    if any(i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for i in infos):
        raise ValueError("a member is packed in a way that edge-dtm does not use")
    size = sum(i.file_size for i in infos)
    if size > ARRAYS_LIMIT_BYTES:
        raise ValueError(f"it unpacks to {size} bytes, the limit is {ARRAYS_LIMIT_BYTES}")
    arrays = {}
    for name, info in zip(names, infos, strict=True):
        with members.open(info) as member:
            try:
                np.lib.format.read_magic(member)
                shape, by_columns, dtype = np.lib.format.read_array_header_1_0(member)
            except Exception:  # whatever ast, tokenize and numpy.dtype raise at made-up text
                raise ValueError(f"the head of {name} cannot be read") from None
            # With a size zipfile unpacks no more than that, and compares the checksum at its end.
            flat = np.frombuffer(bytearray(member.read(info.file_size)), dtype=dtype)
        arrays[name] = flat.reshape(shape, order="F" if by_columns else "C")
    return arrays


class _ImatrixHead(StrictModel, extra="ignore"):
    names: list[str]
    tokens: int


def load_imatrix(path: Path) -> tuple[dict[str, npt.NDArray[np.float32]], int]:
    """Component -> mean square of its inputs, float32 (row_length,), and the number of tokens."""
    _, meta = load_npz(path, [], "imatrix")
    head = validated(_ImatrixHead, meta, str(path), "make it again")
    return load_npz(path, head.names, "imatrix")[0], head.tokens
