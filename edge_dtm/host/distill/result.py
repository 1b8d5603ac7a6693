"""What distillation leaves: the best model that was checked, and how it got there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import write_whole
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


Point = dict[str, float]  # of the curve: step, loss, sdt, fdt, perplexity, tokens


@dataclass(frozen=True)
class Distilled:
    """The best that was checked.

    values: of every trained component float32 (rows, row_length), Hugging Face layout; blocks:
    the bytes that decode to exactly these, uint8 (rows, row_bytes), Hugging Face's row order. At
    best_step 0 nothing beat the start: values are the start's and there are no blocks, since the
    start's may have been made in another way (error feedback) and are at hand. vectors: norm
    gains by full GGUF name. steps: those done. tokens_per_s: training only, padding not counted.
    """

    best_step: int
    steps: int
    curve: list[Point]
    types: dict[str, str]
    values: dict[str, FloatArray] = field(repr=False)
    blocks: dict[str, ByteArray] = field(repr=False)
    vectors: dict[str, FloatArray] = field(repr=False)
    tokens_per_s: float
    peak_rss_bytes: int

    def save(self, folder: Path) -> None:
        """`distilled.safetensors` and, last, `distilled.json`."""
        tensors = {f"vector.{n}": torch.from_numpy(v) for n, v in self.vectors.items()}
        tensors |= {f"blocks.{n}": torch.from_numpy(b) for n, b in self.blocks.items()}
        tensors |= {
            f"values.{n}": torch.from_numpy(v)
            for n, v in self.values.items()
            if n not in self.blocks
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "distilled.safetensors", tensors, {})
        names = ("best_step", "steps", "curve", "types", "tokens_per_s", "peak_rss_bytes")
        head = {name: getattr(self, name) for name in names}
        head["curve"] = [plain_point(p) for p in self.curve]
        head["row_lengths"] = {n: v.shape[1] for n, v in self.values.items()}
        write_whole(folder / "distilled.json", json.dumps(head).encode())

    @classmethod
    def load(cls, folder: Path) -> Distilled:
        """EdgeDtmError when the folder holds no whole result."""
        try:
            head = json.loads((folder / "distilled.json").read_text(encoding="utf-8"))
            tensors, _ = load_tensors(folder / "distilled.safetensors")
            kinds: dict[str, dict[str, npt.NDArray[Any]]] = {"vector": {}, "blocks": {}}
            kinds["values"] = {}
            for key, tensor in tensors.items():
                kind, _, name = key.partition(".")
                kinds[kind][name] = tensor.numpy()
            types, lengths = head["types"], head.pop("row_lengths")
            head["curve"] = [point_from_json(p) for p in head["curve"]]
            for name, data in kinds["blocks"].items():
                kinds["values"][name] = ggml.dequantize(types[name], data, lengths[name])
            return cls(
                values=kinds["values"], blocks=kinds["blocks"], vectors=kinds["vector"], **head
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EdgeDtmError(
                f"{folder} holds no readable distillation ({error}): run edge-dtm compress again with "
                "--no-resume"
            ) from None


def plain_point(point: Point) -> dict[str, float | None]:
    """JSON has no NaN; the step before the first has no loss."""
    return {key: value if math.isfinite(value) else None for key, value in point.items()}


def point_from_json(data: Mapping[str, float | None]) -> Point:
    return {key: math.nan if value is None else value for key, value in data.items()}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], meta: dict[str, str]) -> None:
    """safetensors with text beside the tensors, under a temporary name until complete."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata=meta)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise EdgeDtmError(f"{path} could not be written ({error}): free some space") from None


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """ValueError or OSError when it is no whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from None
