"""The reference pack: prompts, the original model's greedy tokens and its top logits.

One `.npz` without pickle. Rows are sequences; ids beyond a row's length are PADDING.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.errors import EdgeDtmError

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
            return cls(**arrays, provenance=provenance)
        except ValueError as error:
            raise EdgeDtmError(f"{path}: {error}; make it again with edge-dtm compress") from None


def save_npz(path: Path, arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Write arrays and a JSON head without pickle, under a temporary name until complete."""
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps({"schema_version": SCHEMA_VERSION, **meta}, sort_keys=True)
    head = np.frombuffer(text.encode(), dtype=np.uint8)
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, meta=head, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_npz(
    path: Path, names: list[str], kind: str
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what save_npz wrote. EdgeDtmError, in one line, for anything that is not that."""
    try:
        with np.load(path, allow_pickle=False) as data:
            meta = json.loads(data["meta"].tobytes().decode())
            if meta.get("schema_version") != SCHEMA_VERSION or meta.get("kind") != kind:
                raise EdgeDtmError(
                    f"{path} holds a {meta.get('kind')} of schema {meta.get('schema_version')}, "
                    f"not a {kind} of schema {SCHEMA_VERSION}"
                )
            return {name: data[name] for name in names}, meta
    except FileNotFoundError:
        raise EdgeDtmError(f"{path} does not exist") from None
    except DAMAGED as error:
        raise EdgeDtmError(f"{path} is no readable {kind} file ({error}): make it again") from None


def load_imatrix(path: Path) -> tuple[dict[str, npt.NDArray[np.float32]], int]:
    """Component -> mean square of its inputs, float32 (row_length,), and the number of tokens."""
    _, meta = load_npz(path, [], "imatrix")
    arrays, _ = load_npz(path, meta["names"], "imatrix")
    return arrays, int(meta["tokens"])
