"""The reference pack: prompts, the original model's greedy tokens and its top logits.

One `.npz` without pickle. Rows are sequences; ids beyond a row's length are PADDING.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_dtm.core import strict_json
from edge_dtm.core.errors import EdgeDtmError

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
)

# Of all arrays that are read from one file, unpacked: ten times a reference of 10,000 sequences of
# 200 tokens, and less than what a board with 1 GB can give.
ARRAYS_LIMIT_BYTES = 2**29
# Of a zip's table of contents, about a hundred bytes a member; zipfile reads it whole.
_CONTENTS_LIMIT_BYTES = 2**20
_END = b"PK\x05\x06"  # of a zip's last record, PKWARE's APPNOTE 4.3.16
_END64 = b"PK\x06\x07"  # of the record before it that has the sizes above 32 bits, 4.3.15
_END_BYTES, _END64_BYTES = 22, 20
_SHOWN = 60  # characters of a value from a file in a message


# Of the arrays in a file.
_TYPES: dict[str, npt.DTypeLike] = {
    "prompt_ids": np.int32,
    "prompt_lengths": np.int32,
    "generated_ids": np.int32,
    "generated_lengths": np.int32,
    "top_ids": np.int32,
    "top_logits": np.float32,
    "log_normalizers": np.float32,
    "split": np.uint8,
    "texts": str,
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
        expected = {
            "prompt_ids": (s, self.prompt_ids.shape[1]),
            "prompt_lengths": (s,),
            "generated_lengths": (s,),
            "top_ids": (s, n, TOP_K),
            "top_logits": (s, n, TOP_K),
            "log_normalizers": (s, n),
            "split": (s,),
            "texts": (s,),
        }
        wrong = [k for k, shape in expected.items() if getattr(self, k).shape != shape]
        if wrong:
            raise ValueError(f"shapes do not fit {s} sequences of {n} tokens: {', '.join(wrong)}")
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
        arrays = {
            f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "provenance"
        }
        return Reference(**arrays, provenance=self.provenance)

    def part(self, split: int) -> Reference:
        return self.rows(self.split == split)

    def save(self, path: Path) -> None:
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "provenance"}
        save_npz(path, arrays, {"kind": "reference", **self.provenance})

    @classmethod
    def load(cls, path: Path) -> Reference:
        """EdgeDtmError when the file is no whole reference of this schema."""
        names = [f.name for f in fields(cls) if f.name != "provenance"]
        arrays, provenance = load_npz(path, names, "reference")
        try:
            check_arrays(arrays, _TYPES)
            return cls(**arrays, provenance=provenance)
        except (ValueError, IndexError) as error:
            raise EdgeDtmError(f"{path}: {error}; make it again with edge-dtm compress") from None


def check_arrays(
    arrays: Mapping[str, npt.NDArray[Any]], types: Mapping[str, npt.DTypeLike]
) -> None:
    """ValueError unless each array has its type, numbers are finite and characters are some.

    types: of each array that is looked at; str stands for text of any length.
    """
    wrong = [
        name
        for name, wanted in types.items()
        if arrays[name].dtype != wanted and not (wanted is str and arrays[name].dtype.kind == "U")
    ]
    if wrong:
        raise ValueError(f"wrong types of {', '.join(wrong)}")
    for name in types:
        array = arrays[name]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        if array.dtype.kind == "U" and array.size:
            codes = np.frombuffer(array.tobytes(), dtype=np.uint32)
            # numpy takes any 32 bits for a character, Python and UTF-8 do not.
            if ((codes > sys.maxunicode) | ((codes >= 0xD800) & (codes <= 0xDFFF))).any():
                raise ValueError(f"{name} holds what is no character")


def save_npz(path: Path, arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Write arrays and a JSON head without pickle, under a temporary name until complete."""
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps({"schema_version": SCHEMA_VERSION, **meta}, sort_keys=True, allow_nan=False)
    head = np.frombuffer(text.encode(), dtype=np.uint8)
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, meta=head, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_npz(
    path: Path, names: list[str], kind: str
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what save_npz wrote. EdgeDtmError, in one line, for anything that is not that.

    Only the named arrays are read, ARRAYS_LIMIT_BYTES of them at most. numpy's own reader is
    not used, because it believes a shape and unpacks a member before anything is compared.
    """
    try:
        with path.open("rb") as file:
            _check_contents(file)
            with zipfile.ZipFile(file) as members:
                _check_members(members, ["meta"])
                meta = strict_json.loads(_array(members, "meta").tobytes())
                if not isinstance(meta, dict):
                    raise ValueError("its head is no object")
                version, found = meta.get("schema_version"), meta.get("kind")
                if type(version) is not int or version != SCHEMA_VERSION or found != kind:
                    raise EdgeDtmError(
                        f"{path} holds a {_shown(found)} of schema {_shown(version)}, not a {kind} "
                        f"of schema {SCHEMA_VERSION}"
                    )
                _check_members(members, names)
                return {name: _array(members, name) for name in names}, meta
    except FileNotFoundError:
        raise EdgeDtmError(f"{path} does not exist") from None
    except MemoryError:
        raise EdgeDtmError(f"{path} does not fit into memory: stop other programs") from None
    except DAMAGED as error:
        raise EdgeDtmError(f"{path} is no readable {kind} file ({error}): make it again") from None


def _shown(value: object) -> str:
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


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


def _check_members(members: zipfile.ZipFile, names: list[str]) -> None:
    """ValueError when one is packed in an unusual way or all are too large; KeyError without one."""
    infos = [members.getinfo(f"{name}.npy") for name in names]
    # Others ask for memory by themselves: LZMA's dictionary may be 4 GiB.
    if any(i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for i in infos):
        raise ValueError("a member is packed in a way that edge-dtm does not use")
    size = sum(i.file_size for i in infos)
    if size > ARRAYS_LIMIT_BYTES:
        raise ValueError(f"it unpacks to {size} bytes, the limit is {ARRAYS_LIMIT_BYTES}")


def _array(members: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """One array of a member whose size is within the limit. ValueError when it is not whole."""
    info = members.getinfo(f"{name}.npy")
    with members.open(info) as member:
        # With a size zipfile unpacks no more than that, and compares the checksum at its end.
        data = member.read(info.file_size)
    if len(data) != info.file_size:
        raise ValueError(f"{name} is cut off")
    stream = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # whatever ast, tokenize and numpy.dtype raise at made-up text
        raise ValueError(f"the head of {name} cannot be read") from None
    # Python's True and False are whole numbers too, but no sizes.
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} has an impossible shape")
    start = stream.tell()
    if dtype.kind not in "biufU" or not dtype.isnative or not dtype.itemsize:
        raise ValueError(f"{name} has a type that edge-dtm does not use")
    if math.prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError(f"the shape of {name} does not fit its {len(data) - start} bytes")
    flat = np.frombuffer(data, dtype=dtype, offset=start)
    # A copy, which can be written to.
    return flat.reshape(shape, order="F" if by_columns else "C").copy()


def load_imatrix(path: Path) -> tuple[dict[str, npt.NDArray[np.float32]], int]:
    """Component -> mean square of its inputs, float32 (row_length,), and the number of tokens."""
    _, meta = load_npz(path, [], "imatrix")
    names, tokens = meta.get("names"), meta.get("tokens")
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or not isinstance(tokens, int)
    ):
        raise EdgeDtmError(f"{path} is no readable imatrix file (its head is wrong): make it again")
    arrays, _ = load_npz(path, names, "imatrix")
    return arrays, tokens
