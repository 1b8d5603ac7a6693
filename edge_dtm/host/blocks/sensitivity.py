"""What each component's error does to the tokens: gradients times local output error.

For a component with weights W and inputs X, a treatment makes E = X^ W^' - X W' of its output,
X^ being the inputs as the device's kernel rounds them. To first order the margins then change by
the inner product of E with the margins' gradients. One backward pass of sum_t e_t m_t with random
signs e_t gives G; z = <G, E> over a sequence has E[z^2] = sum_t (change of m_t)^2, so

    cost(component, treatment) = sum of z^2 / number of positions,

the mean-square margin change in logits squared. With D = G' X^ this is
z = <D, W^ - W> + <G W, X^ - X>, so one product a rounding kind serves every treatment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.plan import SPARSE_TYPES, Component, Treatment
from edge_dtm.formats.reference import Reference
from edge_dtm.formats.transfer import packed_estimate, sample_step
from edge_dtm.host.blocks.calibration import Calibration
from edge_dtm.host.blocks.capture import BATCH_SEQUENCES, EMBEDDED, Capture, input_key
from edge_dtm.host.blocks.shipped import Shipped, takes_feedback
from edge_dtm.host.blocks.workers import in_workers, worker_count
from edge_dtm.host.checkpoint.checkpoint import ModelConfig
from edge_dtm.host.quantize.activations import activation_kind, round_activations
from edge_dtm.host.quantize.equalize import Scales, input_scale, output_scale
from edge_dtm.host.quantize.error_feedback import (
    Feedback,
    compensate,
    damping_for,
    effective_tokens,
    gradient_moments,
    local_error,
    scaled_gradients,
    second_moments,
)
from edge_dtm.host.quantize.masks import SCORES, fit_masks
from edge_dtm.host.quantize.treat import prune_order, treat, treated_values
from edge_dtm.search.allocation import convex_hull

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int], None] | None

SIGN_DRAWS = 2
JUDGED_STEP = 4  # of the measured tokens a quarter is enough to choose between two roundings
CLEAR = 0.8  # a local error that much smaller on a quarter of the rows needs no look at the rest
ROW_STEP = 4  # of the rows a quarter, for that look
SMALL_WEIGHTS = 10_000_000  # below that, starting processes takes as long as the work


class Activations:
    """Inputs of and margin gradients at every component, for some sequences, as files.

    Files, since at 7B they exceed memory: inputs float32 (tokens, row_length), gradients float16
    (SIGN_DRAWS, tokens, rows) divided by a power of two a file. Tokens of all sequences lie one
    after another; `edges` (sequences + 1,) tells where each begins. What is captured is the
    original model's; with `scales` set, inputs and gradients are given as the equalized model
    has them.
    """

    def __init__(self, folder: Path, reference: Reference, components: Sequence[Component]) -> None:
        self.folder, self.reference = folder, reference
        self.scales: Scales = {}
        self.config: ModelConfig | None = None
        lengths = reference.prompt_lengths + reference.generated_lengths - 1
        self.edges = np.concatenate([[0], np.cumsum(lengths)])
        tokens = int(self.edges[-1])
        self.shapes: dict[str, tuple[int, ...]] = {}
        for c in components:
            self.shapes[f"x.{input_key(c.name)}"] = (tokens, c.row_length)
            if c.in_block:
                self.shapes[f"g.{c.name}"] = (SIGN_DRAWS, tokens, c.rows)
            elif c.name == EMBEDDED:
                self.shapes[f"g.{c.name}"] = (SIGN_DRAWS, tokens, c.row_length)
        self._state_file = folder / "state.json"

    @property
    def size_bytes(self) -> int:
        return sum(
            int(np.prod(s)) * (4 if k.startswith("x.") else 2) for k, s in self.shapes.items()
        )

    def check_disk(self) -> None:
        """EdgeDtmError when the files would not fit the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if not self._state_file.exists() and free < self.size_bytes * 1.05:
            raise EdgeDtmError(
                f"{self.folder} has {free / 1e9:.1f} GB free, the activations need "
                f"{self.size_bytes / 1e9:.1f} GB: free some space or use fewer prompts"
            )

    def _state(self) -> dict[str, Any]:
        if self._state_file.is_file():
            state: dict[str, Any] = json.loads(self._state_file.read_text())
            return state
        return {"done": 0, "scales": {}}

    def _file(self, key: str) -> np.memmap[Any, Any]:
        path = self.folder / f"{key}.bin"
        dtype: Any = np.float32 if key.startswith("x.") else np.float16
        shape = self.shapes[key]
        if path.exists():
            return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
        return np.memmap(path, dtype=dtype, mode="w+", shape=shape)

    def capture(self, model: Any, seed: int, progress: Progress = None) -> None:
        """Run the sequences not yet captured. progress: called with sequences done."""
        self.check_disk()
        state = self._state()
        if progress and state["done"]:
            progress(state["done"])
        capture = Capture(model, self.reference, self.shapes)
        try:
            for start in range(state["done"], len(self.reference), BATCH_SEQUENCES):
                stop = min(start + BATCH_SEQUENCES, len(self.reference))
                for key, pieces in capture.run(range(start, stop), seed, SIGN_DRAWS).items():
                    if key not in self.shapes:
                        continue
                    self._write(key, start, pieces, state["scales"])
                state["done"] = stop
                temporary = self._state_file.with_suffix(".tmp")
                temporary.write_text(json.dumps(state))
                temporary.replace(self._state_file)
                if progress:
                    progress(stop - start)
        finally:
            capture.close()

    def _write(
        self, key: str, start: int, pieces: list[torch.Tensor], scales: dict[str, float]
    ) -> None:
        file = self._file(key)
        joined = torch.cat(pieces, dim=-2)
        if key.startswith("g."):
            if key not in scales:
                largest = float(joined.abs().max()) or 1.0
                scales[key] = 2.0 ** np.floor(np.log2(largest / 256))
            joined = joined / scales[key]
            if float(joined.abs().max()) > 65504:
                raise EdgeDtmError(
                    f"gradients at {key[2:]} exceed the range of half precision: this model's "
                    "margins are not smooth enough to measure; use other prompts"
                )
        first = self.edges[start]
        file[..., first : first + joined.shape[-2], :] = joined.cpu().numpy()

    def inputs(self, name: str) -> FloatArray:
        """float32 (tokens, row_length): what the component was fed."""
        x = np.asarray(self._file(f"x.{input_key(name)}"))
        scale = input_scale(self.scales, name)
        return x if scale is None else x * scale

    def gradients(self, name: str) -> FloatArray:
        """float32 (SIGN_DRAWS, tokens, rows)."""
        scale = self._state()["scales"][f"g.{name}"]
        g = np.asarray(self._file(f"g.{name}"), dtype=np.float32) * np.float32(scale)
        out = output_scale(self.scales, name, self.config) if self.config else None
        return g if out is None else g / out

    def importance(self, name: str) -> FloatArray:
        """Mean square of the component's inputs, float32 (row_length,): llama.cpp's imatrix."""
        x = self.inputs(name)
        total = np.zeros(x.shape[1])
        for part in np.array_split(x, max(1, len(x) // 4096)):
            total += np.square(part, dtype=np.float64).sum(axis=0)
        return (total / len(x)).astype(np.float32)

    def remove(self) -> None:
        self._state_file.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@torch.no_grad()
def component_costs(
    activations: Activations,
    component: Component,
    treatments: Sequence[Treatment],
    weights: FloatArray,
    device: torch.device,
    importance: FloatArray | None,
    known: Mapping[Treatment, torch.Tensor] | None = None,
    exact_inputs: bool = False,
) -> list[float]:
    """Cost of each treatment of one block matrix. weights: float32 (rows, row_length), HF layout
    (rows are quantized alone, so their order is no matter). known: the values, float32 (rows,
    row_length) on the device, of treatments that are not plain rounding. exact_inputs: leave out
    what rounding the inputs does (to see how much that is)."""
    w = torch.from_numpy(np.ascontiguousarray(weights)).to(device)
    x = torch.from_numpy(np.array(activations.inputs(component.name))).to(device)
    g = torch.from_numpy(activations.gradients(component.name)).to(device)
    order = prune_order(weights, importance) if any(t.zero_share for t in treatments) else None
    costs = [0.0] * len(treatments)
    positions = int(activations.reference.generated_lengths.sum())
    back = g @ w  # (draws, tokens, row_length)
    for kind in sorted({activation_kind(t.type) for t in treatments}):
        which = [j for j, t in enumerate(treatments) if activation_kind(t.type) == kind]
        rounded = x if exact_inputs else round_activations(x, kind)
        deltas = torch.stack(
            [
                (
                    known[treatments[j]]
                    if known and treatments[j] in known
                    else torch.from_numpy(
                        treated_values(weights, treatments[j], importance, order)
                    ).to(device)
                )
                .sub(w)
                .reshape(-1)
                for j in which
            ]
        )
        shift = (back * (rounded - x)).sum(-1)  # (draws, tokens)
        total = torch.zeros(len(which), dtype=torch.float64)
        for a, b in zip(activations.edges, activations.edges[1:], strict=False):
            d = g[:, a:b].transpose(1, 2) @ rounded[a:b]  # (draws, rows, row_length)
            z = d.reshape(SIGN_DRAWS, -1) @ deltas.T + shift[:, a:b].sum(1, keepdim=True)
            total += z.double().square().sum(0).cpu() / SIGN_DRAWS
        for j, value in zip(which, (total / positions).tolist(), strict=True):
            costs[j] = value
    return costs


@torch.no_grad()
def edge_costs(
    activations: Activations,
    component: Component,
    treatments: Sequence[Treatment],
    weights: FloatArray,
    importance: FloatArray | None,
    tied: bool,
    feedback: Feedback | None = None,
) -> tuple[list[float], list[bool]]:
    """Costs of `token_embd` (its rows are looked up) and `output` (or a tied embedding), and for
    which treatments error feedback was kept.

    The head's error changes the margins at once, by h (W^[top1] - W^[top2]) - h (W[top1] -
    W[top2]): no gradient is needed. Only rows that occur are quantized.
    """
    ref = activations.reference
    looked_up = component.name == EMBEDDED
    is_head = component.name == "output" or tied
    lengths = [int(b - a) for a, b in zip(activations.edges, activations.edges[1:], strict=False)]
    ids = np.concatenate(
        [(ref.prompt(r) + ref.generated(r))[:n] for r, n in enumerate(lengths)]
    ).astype(np.int64)
    at = np.concatenate(
        [
            activations.edges[r] + ref.prompt_lengths[r] - 1 + np.arange(ref.generated_lengths[r])
            for r in range(len(ref))
        ]
    )
    top = np.concatenate([ref.top_ids[r, : ref.generated_lengths[r], :2] for r in range(len(ref))])
    used = np.unique(np.concatenate([ids, top.ravel()]))
    rows = weights[used]
    index_ids, index_top = np.searchsorted(used, ids), np.searchsorted(used, top)
    hidden = torch.from_numpy(np.array(activations.inputs(component.name)[at])) if is_head else None
    gradients = activations.gradients(EMBEDDED) if looked_up else None
    w = torch.from_numpy(rows)

    def cost_of(t: Treatment, new: FloatArray) -> float:
        cost = 0.0
        if gradients is not None:
            error = (new - rows)[index_ids]
            z = np.add.reduceat(
                (gradients * error).sum(-1, dtype=np.float64), activations.edges[:-1], axis=1
            )
            cost += float(np.square(z).sum() / SIGN_DRAWS / len(at))
        if hidden is not None:
            seen = round_activations(hidden, activation_kind(t.type)).numpy()
            after = np.einsum("ti,ti->t", seen, new[index_top[:, 0]] - new[index_top[:, 1]])
            before = np.einsum(
                "ti,ti->t", hidden.numpy(), rows[index_top[:, 0]] - rows[index_top[:, 1]]
            )
            cost += float(np.square(after - before, dtype=np.float64).mean())
        return cost

    costs = [cost_of(t, treated_values(rows, t, importance)) for t in treatments]
    kept = [False] * len(treatments)
    if feedback is not None:
        which = [j for j, t in enumerate(treatments) if takes_feedback(t)]
        made = compensate(w, [treatments[j].type for j in which], feedback, threads=1)
        for j, (_, values) in zip(which, made, strict=True):
            better = cost_of(treatments[j], values.numpy())
            if better < costs[j]:
                costs[j], kept[j] = better, True
    return costs, kept


@dataclass(frozen=True)
class Moments:
    """What one component is rounded and pruned with: importance for ggml's quantizer and mean
    squares of the inputs, float32 (row_length,), and both sides' second moments."""

    importance: FloatArray
    squares: torch.Tensor
    feedback: Feedback
    outputs: Feedback


@torch.no_grad()
def component_moments(
    calibration: Calibration,
    scales: Scales,
    config: ModelConfig | None,
    component: Component,
    device: torch.device,
    vector: FloatArray | None = None,
) -> Moments:
    """A block matrix's moments on the sequences that are fitted to, as the equalized model has
    them where scales and config are given. vector: importance in place of our own."""
    name = component.name

    def on_device(array: FloatArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    scale = input_scale(scales, name)
    x, v = on_device(calibration.inputs(name)), on_device(calibration.token_weights(name))
    squares = calibration.input_squares(name)
    if scale is not None:
        x *= on_device(scale)
        squares = squares * np.square(scale, dtype=np.float64)
    moments = second_moments(x, v)
    importance = np.ascontiguousarray(moments.diagonal().cpu().numpy())
    feedback = Feedback(moments, damping_for(effective_tokens(v), component.row_length))
    if vector is not None:
        importance = vector
        feedback.importance = vector / max(float(vector.mean()), 1e-30) + np.float32(
            damping_for(effective_tokens(v), component.row_length)
        )
    outputs = output_moments(calibration, scales, config, component, device)
    return Moments(importance, on_device(squares.astype(np.float32)), feedback, outputs)


@torch.no_grad()
def output_moments(
    calibration: Calibration,
    scales: Scales,
    config: ModelConfig | None,
    component: Component,
    device: torch.device,
) -> Feedback:
    """The damped moments of the margins' gradients at a block matrix's outputs."""
    name = component.name
    out = output_scale(scales, name, config) if config is not None else None
    g = torch.from_numpy(calibration.gradients(name)).to(device)
    v = torch.from_numpy(calibration.token_weights(name)[: calibration.output_tokens]).to(device)
    if out is not None:
        g /= torch.from_numpy(out).to(device)
    return Feedback(gradient_moments(g, v), damping_for(effective_tokens(v), component.rows))


@torch.no_grad()
def fit_component(
    calibration: Calibration,
    activations: Activations,
    component: Component,
    treatments: Sequence[Treatment],
    weights: FloatArray,
    device: torch.device,
    vector: FloatArray | None = None,
    threads: int | None = 1,
    score: str = SCORES[0],
) -> tuple[FloatArray, dict[Treatment, tuple[npt.NDArray[np.uint8], torch.Tensor]]]:
    """Importance for plain rounding, float32 (row_length,), and for each treatment whose local
    error on the measured sequences feedback lowers: its blocks and values, in HF's row order.
    vector: importance in place of our own; threads: for rounding, None: all cores."""
    name = component.name

    def on_device(array: FloatArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    m = component_moments(
        calibration, activations.scales, activations.config, component, device, vector
    )
    importance = m.importance
    g = on_device(activations.gradients(name))
    v = g.square().mean((0, 2)).sqrt()
    judge = second_moments(on_device(activations.inputs(name)[::JUDGED_STEP]), v[::JUDGED_STEP])
    judge_outputs = scaled_gradients(g[0, ::JUDGED_STEP], v[::JUDGED_STEP])
    which = [t for t in treatments if takes_feedback(t)]
    w = on_device(weights)

    def plain_error(treatment: Treatment, step: int) -> float:
        some = np.ascontiguousarray(weights[::step])
        error = on_device(treated_values(some, treatment, importance)) - w[::step]
        return local_error(error, judge, judge_outputs[:, ::step])

    kept = {}
    made = compensate(w, [t.type for t in which], m.feedback, m.outputs, threads=threads)
    sparse = [t for t in treatments if t.zero_share]
    made += fit_masks(w, sparse, m.feedback, m.outputs, m.squares, score, threads)
    for treatment, (data, values) in zip([*which, *sparse], made, strict=True):
        with_feedback = local_error(values - w, judge, judge_outputs)
        # Plain rounding's errors of different rows are independent: every fourth row tells.
        if with_feedback < CLEAR * ROW_STEP * plain_error(
            treatment, ROW_STEP
        ) or with_feedback < plain_error(treatment, 1):
            kept[treatment] = (data, values)
    return importance, kept


def read_costs(results: Path) -> dict[str, dict[str, Any]]:
    """What `sensitivity` has written: component -> its costs and where feedback was kept."""
    known: dict[str, dict[str, Any]] = {}
    if results.is_file():
        for line in results.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the run was killed
            known[record["name"]] = record
    return known


def sensitivity(
    activations: Activations,
    components: Sequence[Component],
    treatments: Sequence[Sequence[Treatment]],
    read: Callable[[str], FloatArray],
    device: torch.device,
    tied: bool,
    results: Path,
    progress: Progress = None,
    calibration: Calibration | None = None,
    shipped: Shipped | None = None,
    imatrix: Mapping[str, FloatArray] | None = None,
    score: str = SCORES[0],
    transfer: bool = False,
) -> list[list[float]]:
    """Costs of all components, one line of `results` (JSONL) a component as soon as it is known;
    lines that are there already are not measured again. progress: called with weights done.

    read: GGUF name -> float32 weights in HF layout. calibration: round with error feedback fitted
    to it, where that helps. shipped: keeps the blocks that a plan may choose, and what export
    needs for the others. imatrix: importance vectors of the original model that take the place
    of our own, component -> float32 (row_length,). score: how masks are chosen (masks.SCORES).
    transfer: also estimate what each treatment has after zstd.
    """
    known = read_costs(results)
    missing = [
        (component, tuple(choices), imatrix.get(component.name) if imatrix else None)
        for component, choices in zip(components, treatments, strict=True)
        if len(known.get(component.name, {"costs": ()})["costs"]) != len(choices)
    ]
    if progress and len(missing) < len(components):
        progress(sum(c.weights for c in components) - sum(c.weights for c, *_ in missing))
    # The longest first, so that no core is left with it at the end.
    missing.sort(key=lambda task: -task[0].weights)
    if device.type == "cpu" and sum(c.weights for c, *_ in missing) > SMALL_WEIGHTS:
        needed = max(_needed_bytes(c, len(t), activations, calibration) for c, t, _ in missing)
        workers = worker_count(len(missing), needed)
    else:
        workers = 1  # the GPU takes its work from one process
    context = _Context(activations, read, device, tied, calibration, shipped, score, transfer)
    with results.open("a") as file:
        for (component, *_), record in in_workers(_measure, context, missing, workers):
            known[component.name] = record
            file.write("\n" * (file.tell() > 0) + json.dumps(record))
            file.flush()
            if progress:
                progress(component.weights)
    return [known[c.name]["costs"] for c in components]


@dataclass(frozen=True)
class _Context:
    """What the measurement of every component needs; goes to the worker processes."""

    activations: Activations
    read: Callable[[str], FloatArray]
    device: torch.device
    tied: bool
    calibration: Calibration | None
    shipped: Shipped | None
    score: str
    transfer: bool


def _needed_bytes(
    component: Component, types: int, activations: Activations, calibration: Calibration | None
) -> int:
    """About what one worker holds while it measures the component, half a GB of it libraries."""
    tokens = int(activations.edges[-1]) * (SIGN_DRAWS + 2)
    if calibration:
        tokens = max(tokens, 2 * calibration.tokens)
    rows, n = (component.rows, component.row_length) if component.in_block else (0, 0)
    moments = 40 * max(rows, component.row_length) ** 2
    return 2**29 + 4 * tokens * max(rows, component.row_length) + 16 * types * rows * n + moments


def _measure(
    at: _Context, task: tuple[Component, Sequence[Treatment], FloatArray | None]
) -> dict[str, Any]:
    """One component's line of the results. task: component, choices, given importance."""
    component, choices, vector = task
    activations, calibration, shipped = at.activations, at.calibration, at.shipped
    weights = at.read(component.name + ".weight")
    if vector is None:
        importance = component_importance(activations, component, at.tied)
    else:
        scale = input_scale(activations.scales, component.name)
        importance = vector if scale is None else vector * scale * scale
        vector = importance
    feedback = None
    made: dict[Treatment, npt.NDArray[np.uint8]] = {}
    if component.in_block:
        kept: dict[Treatment, tuple[npt.NDArray[np.uint8], torch.Tensor]] = {}
        if calibration:
            importance, kept = fit_component(
                calibration,
                activations,
                component,
                choices,
                weights,
                at.device,
                vector,
                1 if at.device.type == "cpu" else None,
                at.score,
            )
        values = {t: v for t, (_, v) in kept.items()}
        made = {t: data for t, (data, _) in kept.items()}
        costs = component_costs(
            activations, component, choices, weights, at.device, importance, values
        )
        compensated = [t in kept for t in choices]
        dense = [j for j, t in enumerate(choices) if not t.zero_share]
        hull = convex_hull(
            [component.size_bytes(choices[j]) for j in dense], [costs[j] for j in dense]
        )
        chosen = {choices[dense[i]] for i in hull}
        if len(dense) < len(choices):  # zeros may be given back down to the dense type
            chosen |= {choices[j] for j in dense if choices[j].type in SPARSE_TYPES}
        for t in sorted(chosen):
            if shipped and t in kept:
                shipped.save(component, t, kept[t][0])
    else:
        if calibration:
            feedback = edge_feedback(calibration, activations.scales, component, at.tied)
        costs, compensated = edge_costs(
            activations, component, choices, weights, importance, at.tied, feedback
        )
    if shipped:
        pairs = list(zip(choices, compensated, strict=True))
        types = [t.type for t, yes in pairs if yes and not t.zero_share]
        masks = {t: yes for t, yes in pairs if t.zero_share}
        shipped.save_component(component.name, importance, types, feedback, masks)
    record = {"name": component.name, "costs": costs, "feedback": compensated}
    if at.transfer:
        record["transfer_bytes"] = [
            _packed(component, t, weights, importance, made.get(t)) for t in choices
        ]
    return record


def _packed(
    component: Component,
    treatment: Treatment,
    weights: FloatArray,
    importance: FloatArray | None,
    blocks: npt.NDArray[np.uint8] | None,
) -> int:
    """About what the treated matrix has after zstd. blocks: as measured, None: plain rounding."""
    step = sample_step(component.rows, component.size_bytes(treatment) // component.rows)
    if blocks is None:
        some = treat(np.ascontiguousarray(weights[::step]), treatment, importance)
    else:
        some = blocks[::step]
    return packed_estimate(some, component.rows)


def fit_zeros(
    chosen: Sequence[tuple[Component, Treatment]],
    calibration: Calibration,
    scales: Scales,
    config: ModelConfig | None,
    read: Callable[[str], FloatArray],
    device: torch.device,
    shipped: Shipped,
    imatrix: Mapping[str, FloatArray] | None = None,
    score: str = SCORES[0],
    progress: Progress = None,
) -> None:
    """Make the blocks of treatments with zeros once more and keep them in `shipped`: all that were
    measured would fill the disk. The same as measured, arguments as in `sensitivity`."""
    tasks = [
        (c, t, imatrix.get(c.name) if imatrix else None)
        for c, t in sorted(chosen, key=lambda pair: -pair[0].weights)
    ]
    if device.type == "cpu" and sum(c.weights for c, _ in chosen) > SMALL_WEIGHTS:
        needed = max(
            2**29
            + 12 * calibration.tokens * c.row_length
            + 40 * (c.weights + max(c.rows, c.row_length) ** 2)  # both sides' moments, as above
            for c, _ in chosen
        )
        workers = worker_count(len(tasks), needed)
    else:
        workers = 1
    context = _ZerosContext(calibration, scales, config, read, device, shipped, score)
    for (component, *_), _ in in_workers(_fit_zeros, context, tasks, workers):
        if progress:
            progress(component.weights)


@dataclass(frozen=True)
class _ZerosContext:
    calibration: Calibration
    scales: Scales
    config: ModelConfig | None
    read: Callable[[str], FloatArray]
    device: torch.device
    shipped: Shipped
    score: str


@torch.no_grad()
def _fit_zeros(at: _ZerosContext, task: tuple[Component, Treatment, FloatArray | None]) -> bool:
    component, treatment, vector = task
    if vector is not None:
        scale = input_scale(at.scales, component.name)
        vector = vector if scale is None else vector * scale * scale
    m = component_moments(at.calibration, at.scales, at.config, component, at.device, vector)
    weights = torch.from_numpy(at.read(component.name + ".weight")).to(at.device)
    made = fit_masks(weights, [treatment], m.feedback, m.outputs, m.squares, at.score)
    at.shipped.save(component, treatment, made[0][0])
    return True


def edge_feedback(
    calibration: Calibration, scales: Scales, component: Component, tied: bool
) -> Feedback:
    """Error feedback for `token_embd` or `output`."""
    moments = calibration.edge_moments(component.name, tied)
    scale = input_scale(scales, component.name)
    if scale is not None:
        s = torch.from_numpy(scale)
        moments = s[:, None] * moments * s
    tokens = int(calibration.reference.generated_lengths.sum())
    return Feedback(moments, damping_for(tokens, component.row_length))


def component_importance(
    activations: Activations, component: Component, tied: bool
) -> FloatArray | None:
    """The importance vector a component is quantized with; none for a table of looked-up rows
    that is not a head too, since there the columns are equally important."""
    if component.name == EMBEDDED and not tied:
        return None
    return activations.importance(component.name)
