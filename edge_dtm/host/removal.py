"""Structured removal: which KV groups and FFN neurons a layer can do without, and the model left.

Removing inputs of `attn_output` (a KV group with its query heads) or of `ffn_down` (neurons) is
the whole harm: nothing else changes. The columns that stay make up for it by least squares: with
H the damped second moments of the inputs and K what is kept, W' = W H[:,K] H[K,K]^-1 makes
(W - W') H (W - W')' least. What is left of the harm is measured as all costs are, by the margins'
gradients (sensitivity.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.calibration import Calibration
from edge_dtm.host.blocks.sensitivity import SIGN_DRAWS, SMALL_WEIGHTS, Activations
from edge_dtm.host.blocks.workers import in_workers, worker_count
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray, ModelConfig
from edge_dtm.host.checkpoint.edited import EditedCheckpoint, write_edited
from edge_dtm.host.checkpoint.model import load_model
from edge_dtm.host.quantize.equalize import Scales, input_scale
from edge_dtm.host.quantize.error_feedback import (
    Feedback,
    damping_for,
    effective_tokens,
    one_torch_thread,
    second_moments,
)

Part = Literal["attn", "ffn"]
IntArray = npt.NDArray[np.int64]
Kept = Mapping[tuple[int, str], int]  # (layer, part) -> KV groups or neurons; absent: all

PARTS: tuple[Part, ...] = ("attn", "ffn")
_COMPONENT = {"attn": "attn_output", "ffn": "ffn_down"}
FFN_SHARES = (15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8)
IMPORTANCES = ("gradient", "moments", "corrected")
DEFAULT_IMPORTANCE = "corrected"


@dataclass(frozen=True)
class Option:
    """kept: KV groups or neurons; cost: mean-square margin change of keeping just these, in
    logits squared, the columns that stay corrected."""

    kept: int
    cost: float


@dataclass(frozen=True)
class Unit:
    """One layer's attention or FFN: its KV groups or neurons, the most important first, and how
    many of these may be kept, falling; keeping all of them costs nothing and is no option."""

    layer: int
    part: Part
    order: tuple[int, ...]
    options: tuple[Option, ...]

    @property
    def component(self) -> str:
        """Name of the matrix whose inputs are removed."""
        return f"blk.{self.layer}.{_COMPONENT[self.part]}"

    def kept_indices(self, kept: int) -> IntArray:
        """The first `kept` of the order, ascending. ValueError when there are not that many."""
        if not 0 <= kept <= len(self.order):
            raise ValueError(f"{self.component} cannot keep {kept} of {len(self.order)}")
        return np.sort(np.array(self.order[:kept], dtype=np.int64))

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "part": self.part,
            "order": list(self.order),
            "options": [[o.kept, o.cost] for o in self.options],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Unit:
        """ValueError, KeyError or TypeError when data is not what to_json wrote."""
        part: Part = "attn" if data["part"] == "attn" else "ffn"
        options = tuple(Option(int(kept), float(cost)) for kept, cost in data["options"])
        return cls(int(data["layer"]), part, tuple(int(i) for i in data["order"]), options)


def unit_size(config: ModelConfig, layer: int, part: str) -> int:
    """How many KV groups or neurons the layer has."""
    return config.layer_kv_heads(layer) if part == "attn" else config.layer_ffn(layer)


def kept_counts(config: ModelConfig, layer: int, part: str, block: int) -> list[int]:
    """The options of a unit, falling: of KV groups every number (not none in the first layer, see
    ModelConfig); of neurons multiples of `block` near FFN_SHARES, and one block."""
    n = unit_size(config, layer, part)
    if part == "attn":
        return list(range(n - 1, -1 if layer else 0, -1))
    near = {block * max(1, round(n * share / block)) for share in FFN_SHARES} | {block}
    return sorted((k for k in near if k < n), reverse=True)


def columns_of(indices: IntArray, width: int) -> IntArray:
    """The columns (or rows) of groups of `width` each, in the groups' order."""
    return (indices[:, None] * width + np.arange(width)).reshape(-1)


def _input_width(config: ModelConfig, part: str) -> int:
    """Inputs of the component that go together."""
    return config.heads // config.kv_heads * config.head_dim if part == "attn" else 1


# --- least squares --------------------------------------------------------------------------


def damped_moments(
    calibration: Calibration, scales: Scales, name: str, device: torch.device
) -> torch.Tensor:
    """H of a component's inputs, float32 (row_length, row_length): weighted, damped and with a
    mean diagonal of 1 before that, as for error feedback. scales: of the checkpoint the weights
    are from, as in Activations. EdgeDtmError when not finite."""
    x = torch.from_numpy(np.ascontiguousarray(calibration.inputs(name))).to(device)
    v = torch.from_numpy(calibration.token_weights(name)).to(device)
    scale = input_scale(scales, name)
    if scale is not None:
        x *= torch.from_numpy(scale).to(device)
    damping = damping_for(effective_tokens(v), x.shape[1])
    return Feedback(second_moments(x, v), damping).moments


class Correction:
    """Least squares for all numbers of kept columns at once: they are nested, and so are the
    factors of their moments.

    weights: float32 (rows, row_length); moments: damped, (row_length, row_length); columns: all of
    them, the first to keep first. Damping pulls towards the columns as they were.
    """

    def __init__(self, weights: torch.Tensor, moments: torch.Tensor, columns: IntArray) -> None:
        order = torch.from_numpy(columns).to(weights.device)
        self._weights = weights[:, order].double()
        self._moments = moments[order][:, order].double()
        self._lower = torch.linalg.cholesky(self._moments)

    def __call__(self, count: int) -> torch.Tensor:
        """float32 (rows, count): what the first `count` columns become, in the given order."""
        kept, dropped = self._weights[:, :count], self._weights[:, count:]
        if not count or not dropped.shape[1]:
            return kept.float()
        owed = dropped @ self._moments[count:, :count]
        share = torch.cholesky_solve(owed.T, self._lower[:count, :count]).T
        return (kept + share).float()


# --- which first ----------------------------------------------------------------------------


def saliencies(
    kind: str,
    weights: torch.Tensor,
    moments: torch.Tensor,
    width: int,
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    edges: Sequence[int],
    output_squares: torch.Tensor,
) -> torch.Tensor:
    """How much each group of `width` columns is missed, float64 (groups,).

    weights: float32 (rows, row_length); moments: damped, (row_length, row_length). kind:
    `gradient`, the first-order cost of dropping just this group; `corrected`, the same with the
    other columns corrected; `moments`, tr(W_K S_K^-1 W_K') with S_K the group's block of the
    inverse moments (the optimal brain surgeon's), rows weighted by output_squares, (rows,), the
    mean-square gradients at the outputs. inputs: float32 (tokens, row_length); gradients: float32
    (draws, tokens, rows); edges: where sequences begin and end among the tokens.
    """
    n = weights.shape[1]
    groups = n // width
    if kind == "gradient":
        seen = inputs
    else:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments.double()))
        rows = inverse.view(groups, width, n)
        own = inverse.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).movedim(2, 0)
        if kind == "moments":
            w = (weights * output_squares.sqrt()[:, None]).double().T.reshape(groups, width, -1)
            missed: torch.Tensor = (w * torch.linalg.solve(own, w)).sum((1, 2))
            return missed
        if kind != "corrected":
            raise ValueError(f"{kind!r} is no importance; choose among {', '.join(IMPORTANCES)}")
        # Without K the weights change by -W_K S_K^-1 (H^-1)_K, so inputs act as these do.
        seen = inputs @ torch.linalg.solve(own, rows).reshape(n, n).float().T
    back = gradients @ weights
    total = torch.zeros(groups, dtype=torch.float64, device=weights.device)
    for a, b in pairwise(edges):
        z = (back[:, a:b] * seen[a:b]).sum(1).view(-1, groups, width).sum(-1)
        total += z.double().square().mean(0)
    return total / max(1, len(edges) - 1)


# --- measuring ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Context:
    """What the measurement of every unit needs; goes to the worker processes."""

    checkpoint: Checkpoint
    activations: Activations
    calibration: Calibration
    device: torch.device
    block: int
    importance: str


def margin_cost(
    activations: Activations,
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    error: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> float:
    """Mean-square margin change of an error of the weights, float32 (rows, row_length), and of a
    bias, (rows,), at a component with these inputs, (tokens, row_length), and margin gradients,
    (draws, tokens, rows): as `component_costs`, without what rounding the inputs does."""
    moved = inputs @ error.T
    if bias is not None:
        moved += bias
    each = (gradients * moved).sum(-1).double()
    total = sum(
        float(each[:, a:b].sum(1).square().sum()) for a, b in pairwise(activations.edges.tolist())
    )
    return total / SIGN_DRAWS / int(activations.reference.generated_lengths.sum())


@torch.no_grad()
def _measure(at: _Context, task: tuple[int, Part]) -> Unit:
    (layer, part), config, device = task, at.checkpoint.config, at.device
    name = f"blk.{layer}.{_COMPONENT[part]}"

    def on_device(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.array(array, dtype=np.float32)).to(device)

    w = on_device(at.checkpoint.hf_tensor(name + ".weight"))
    x, g = on_device(at.activations.inputs(name)), on_device(at.activations.gradients(name))
    moments = damped_moments(at.calibration, at.activations.scales, name, device)
    width, edges = _input_width(config, part), at.activations.edges.tolist()
    squares = on_device(at.calibration.output_squares(name))
    scores = saliencies(at.importance, w, moments, width, x, g, edges, squares)
    order = np.argsort(-scores.cpu().numpy(), kind="stable").astype(np.int64)
    columns = columns_of(order, width)
    correct = Correction(w, moments, columns)
    bias = None
    if part == "attn" and f"{name}.bias" in dict(at.checkpoint.vectors()):
        bias = on_device(at.checkpoint.hf_tensor(f"{name}.bias"))
    options = []
    for kept in kept_counts(config, layer, part, at.block):
        error = -w
        error[:, torch.from_numpy(columns[: kept * width]).to(device)] += correct(kept * width)
        # Without any attention its bias goes too.
        gone = -bias if bias is not None and not kept else None
        options.append(Option(kept, margin_cost(at.activations, x, g, error, gone)))
    return Unit(layer, part, tuple(order.tolist()), tuple(options))


def _needed_bytes(at: _Context, n: int) -> int:
    """About what one worker holds for a component of n inputs, half a GB of it libraries."""
    tokens, hidden = int(at.activations.edges[-1]), at.checkpoint.config.hidden
    held = tokens * (2 * (1 + SIGN_DRAWS) * n + (1 + 2 * SIGN_DRAWS) * hidden)
    return 2**29 + 4 * max(held, 2 * at.calibration.tokens * n) + 48 * n * n + 24 * n * hidden


def measure_units(
    checkpoint: Checkpoint,
    activations: Activations,
    calibration: Calibration,
    device: torch.device,
    block: int,
    results: Path,
    progress: Callable[[int], None] | None = None,
    importance: str = DEFAULT_IMPORTANCE,
) -> list[Unit]:
    """All units that have an option, layer by layer, attention before FFN; a line of `results`
    (JSONL) a unit as soon as it is known, and units that are there already are not measured again.

    checkpoint: the one that `activations` describe: the equalized one where activations.scales is
    set, else the original. calibration: always the original's. block: neurons are kept in
    multiples of it. importance: see `saliencies`. progress: called with units done.
    """
    config = checkpoint.config
    tasks = [
        (layer, part)
        for layer in range(config.layers)
        for part in PARTS
        if kept_counts(config, layer, part, block)
    ]
    stamp = {"block": block, "importance": importance}
    known = {
        task: unit
        for task, unit in read_units(results, stamp).items()
        if task in tasks
        and len(unit.order) == unit_size(config, *task)
        and [o.kept for o in unit.options] == kept_counts(config, *task, block)
    }
    missing = [t for t in tasks if t not in known]
    if progress and known:
        progress(len(known))
    context = _Context(checkpoint, activations, calibration, device, block, importance)
    sizes = [unit_size(config, *t) * _input_width(config, t[1]) for t in missing]
    workers = 1  # a GPU takes its work from one process
    if device.type == "cpu" and sum(sizes) * config.hidden > SMALL_WEIGHTS:
        workers = worker_count(len(missing), _needed_bytes(context, max(sizes)))
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        for task, unit in in_workers(_measure, context, missing, workers):
            known[task] = unit
            file.write("\n" * (file.tell() > 0) + json.dumps({**stamp, **unit.to_json()}))
            file.flush()
            if progress:
                progress(1)
    return [known[t] for t in tasks]


def read_units(
    results: Path, stamp: Mapping[str, Any] | None = None
) -> dict[tuple[int, Part], Unit]:
    """What `measure_units` has written. stamp: only lines with these values (block, importance)."""
    known: dict[tuple[int, Part], Unit] = {}
    if results.is_file():
        for line in results.read_text().splitlines():
            try:
                record = json.loads(line)
                unit = Unit.from_json(record)
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the run was killed
            if all(record.get(k) == v for k, v in (stamp or {}).items()):
                known[unit.layer, unit.part] = unit
    return known


# --- the model that is left -----------------------------------------------------------------


class _Places:
    """Where the rows and columns of a reduced model's tensors lie in the whole one's."""

    def __init__(self, config: ModelConfig, units: Sequence[Unit], kept: Kept) -> None:
        self.config = config
        by_place: dict[tuple[int, str], Unit] = {(u.layer, u.part): u for u in units}
        unknown = [k for k in kept if k not in by_place]
        if unknown:
            raise ValueError(f"nothing was measured for {unknown}")
        self.indices = {
            (layer, part): by_place[layer, part].kept_indices(count)
            for (layer, part), count in kept.items()
            if count != len(by_place[layer, part].order)
        }
        self.units = by_place

    def count(self, layer: int, part: str) -> int:
        at = self.indices.get((layer, part))
        return unit_size(self.config, layer, part) if at is None else len(at)

    def of(self, name: str) -> tuple[IntArray | None, IntArray | None]:
        """Rows and columns of a tensor that are kept, ascending; None: all of them."""
        pieces = name.split(".")
        if pieces[0] != "blk" or pieces[2].endswith("_norm"):
            return None, None
        layer, tensor = int(pieces[1]), pieces[2]
        part = tensor.split("_")[0]
        at = self.indices.get((layer, part))
        if at is None:
            return None, None
        if tensor in _COMPONENT.values():  # its inputs go
            columns = columns_of(at, _input_width(self.config, part))
            return None, columns if pieces[3] == "weight" else None
        if tensor in ("attn_k", "attn_v"):
            return columns_of(at, self.config.head_dim), None
        return columns_of(at, _input_width(self.config, part)), None


@torch.no_grad()
def reduce(
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    kept: Kept,
    calibration: Calibration,
    scales: Scales,
    file: Path,
    device: torch.device | None = None,
) -> EditedCheckpoint:
    """The checkpoint with only the first `kept` of each unit's order, in their old order, and
    `attn_output` and `ffn_down` corrected by least squares; what changes is written to `file`.

    checkpoint: the one the units were measured on; scales: Activations.scales of that time, {} for
    the original, an EqualizedCheckpoint's for an equalized one; calibration: the original's in
    both cases. device: for the least squares. ValueError when `kept` asks for what is not there or
    leaves the first layer without attention; EdgeDtmError when the disk is full.
    """
    device = device or torch.device("cpu")
    places = _Places(checkpoint.config, units, kept)
    c = checkpoint.config
    heads = tuple(places.count(layer, "attn") for layer in range(c.layers))
    neurons = tuple(places.count(layer, "ffn") for layer in range(c.layers))
    config = replace(
        c,
        kept_kv_heads=heads if min(heads) < c.kv_heads else None,
        kept_ffn=neurons if min(neurons) < c.ffn else None,
    )
    tensors: dict[str, FloatArray] = {}
    names = [component.name + ".weight" for component in checkpoint.components()]
    for name in (*names, *(n for n, _ in checkpoint.vectors())):
        rows, columns = places.of(name)
        if rows is not None and len(rows):
            tensors[name] = checkpoint.hf_tensor(name)[rows]
        elif columns is not None and len(columns):
            stem = name.removesuffix(".weight")
            layer, part = int(name.split(".")[1]), name.split(".")[2].split("_")[0]
            width, unit = _input_width(c, part), places.units[layer, part]
            order = columns_of(np.array(unit.order, dtype=np.int64), width)
            w = torch.from_numpy(np.ascontiguousarray(checkpoint.hf_tensor(name))).to(device)
            with one_torch_thread():
                moments = damped_moments(calibration, scales, stem, device)
                made = Correction(w, moments, order)(len(columns)).cpu().numpy()
            tensors[name] = np.ascontiguousarray(made[:, np.argsort(order[: len(columns)])])
    counts = {f"{layer}.{part}": len(at) for (layer, part), at in sorted(places.indices.items())}
    write_edited(file, tensors, {"kept": counts})
    return EditedCheckpoint(checkpoint, file, config)


class MaskedCheckpoint(Checkpoint):
    """The reduced model in the shape of the whole one: zeros where it has nothing.

    original: what was reduced; reduced: what `reduce` made, or a recovered one of the same shape;
    units, kept: as for `reduce`.
    """

    _source_is_hf = True

    def __init__(
        self, original: Checkpoint, reduced: Checkpoint, units: Sequence[Unit], kept: Kept
    ) -> None:
        super().__init__(original.path, original.config)
        self.original, self.reduced, self._args = original, reduced, (tuple(units), dict(kept))
        self._places = _Places(original.config, units, kept)
        self._whole = {c.name + ".weight": (c.rows, c.row_length) for c in original.components()}
        self._whole |= {n: (k,) for n, k in original.vectors()}  # type: ignore[misc]
        left = {c.name + ".weight" for c in reduced.components()}
        self._left = left | {n for n, _ in reduced.vectors()}

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskedCheckpoint, (self.original, self.reduced, *self._args)

    @property
    def tokenizer(self) -> Any:
        return self.original.tokenizer

    def _names(self) -> set[str]:
        return self.original._names()

    def _read(self, name: str) -> FloatArray:
        if name not in self._left:
            if name.endswith("attn_norm.weight"):  # of no attention: feeds zeros
                return self.original.hf_tensor(name)
            return np.zeros(self._whole[name], dtype=np.float32)
        data = self.reduced.hf_tensor(name)
        rows, columns = self._places.of(name)
        if rows is None and columns is None:
            return data
        out = np.zeros(self._whole[name], dtype=np.float32)
        if rows is not None:
            out[rows] = data
        else:
            out[:, columns] = data
        return out


def masked(
    checkpoint: Checkpoint,
    reduced: Checkpoint,
    units: Sequence[Unit],
    kept: Kept,
    device: torch.device,
) -> Any:
    """A torch model in the whole shape that computes what the reduced one does, as `load_model`
    gives it. Arguments as for MaskedCheckpoint."""
    return load_model(MaskedCheckpoint(checkpoint, reduced, units, kept), device)


# --- the check against llama.cpp ------------------------------------------------------------


class Disagreement(NamedTuple):
    """A generated position at which two runs choose different tokens; margin: torch's own top-1
    minus top-2 logit there (near 0 where it is a near-tie)."""

    row: int
    position: int
    margin: float


@torch.no_grad()
def disagreements(
    model: Any, reference: Reference, ids: npt.NDArray[np.int32]
) -> list[Disagreement]:
    """Where the model, reading the reference's own tokens, would choose another token than `ids`,
    int32 (sequences, tokens), as in Record.ids of a teacher-forced run. A margin that is not a
    number counts as a disagreement."""
    device = next(model.parameters()).device
    out = []
    for row in range(len(reference)):
        first, count = int(reference.prompt_lengths[row]) - 1, int(reference.generated_lengths[row])
        text = torch.tensor([(reference.prompt(row) + reference.generated(row))[:-1]])
        logits = model(input_ids=text.to(device), use_cache=False).logits
        top = logits[0, first : first + count].float().topk(2)
        margins = (top.values[:, 0] - top.values[:, 1]).cpu().numpy()
        chosen = top.indices[:, 0].cpu().numpy()
        for position in np.flatnonzero((chosen != ids[row, :count]) | ~np.isfinite(margins)):
            out.append(Disagreement(row, int(position), float(margins[position])))
    return out
