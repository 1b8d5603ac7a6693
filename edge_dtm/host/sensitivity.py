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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.errors import EdgeDtmError
from edge_dtm.host.activations import activation_kind, round_activations
from edge_dtm.host.model import module_name
from edge_dtm.host.treat import prune_order, treated_values
from edge_dtm.plan import Component, Treatment
from edge_dtm.reference import Reference

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int], None] | None

SIGN_DRAWS = 2
BATCH_SEQUENCES = 4
# q, k, v share an input, gate and up another; it is stored once, under the first one's name.
_INPUT_OF = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
FINAL, EMBEDDED = "final_hidden", "token_embd"


def input_key(name: str) -> str:
    """Name of the component under which a component's input is stored."""
    if name in ("token_embd", "output"):
        return FINAL
    prefix, _, part = name.rpartition(".")
    return f"{prefix}.{_INPUT_OF.get(part, part)}"


class Activations:
    """Inputs of and margin gradients at every component, for some sequences, as files.

    Files, since at 7B they exceed memory: inputs float32 (tokens, row_length), gradients float16
    (SIGN_DRAWS, tokens, rows) divided by a power of two a file. Tokens of all sequences lie one
    after another; `edges` (sequences + 1,) tells where each begins.
    """

    def __init__(self, folder: Path, reference: Reference, components: Sequence[Component]) -> None:
        self.folder, self.reference = folder, reference
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
        capture = _Capture(model, self)
        try:
            for start in range(state["done"], len(self.reference), BATCH_SEQUENCES):
                stop = min(start + BATCH_SEQUENCES, len(self.reference))
                for key, pieces in capture.run(range(start, stop), seed).items():
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
        return np.asarray(self._file(f"x.{input_key(name)}"))

    def gradients(self, name: str) -> FloatArray:
        """float32 (SIGN_DRAWS, tokens, rows)."""
        scale = self._state()["scales"][f"g.{name}"]
        return np.asarray(self._file(f"g.{name}"), dtype=np.float32) * np.float32(scale)

    def importance(self, name: str) -> FloatArray:
        """Mean square of the component's inputs, float32 (row_length,): llama.cpp's imatrix."""
        x = self.inputs(name)
        total = np.zeros(x.shape[1])
        for part in np.array_split(x, max(1, len(x) // 4096)):
            total += np.square(part, dtype=np.float64).sum(axis=0)
        return (total / len(x)).astype(np.float32)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class _Capture:
    """Hooks on a model that keep inputs and outputs of the components during one pass."""

    def __init__(self, model: Any, owner: Activations) -> None:
        self.model, self.owner = model, owner
        self.device = next(model.parameters()).device
        self.outputs: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}
        self.handles = []
        modules = dict(model.named_modules())
        for key in owner.shapes:
            name = key[2:]
            if key.startswith("g.") and name != EMBEDDED:
                self.handles.append(
                    modules[module_name(name)].register_forward_hook(self._keep(name))
                )

    def _keep(self, name: str) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.outputs[name] = output
            self.inputs[input_key(name)] = args[0].detach()

        return hook

    def run(self, rows: range, seed: int) -> dict[str, list[torch.Tensor]]:
        """Pieces a sequence for every file of the owner."""
        ref = self.owner.reference
        lengths = [int(ref.prompt_lengths[r] + ref.generated_lengths[r] - 1) for r in rows]
        ids = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
        for i, r in enumerate(rows):
            ids[i, : lengths[i]] = torch.tensor((ref.prompt(r) + ref.generated(r))[: lengths[i]])
        # Padding stands to the right, where causal attention never looks back from.
        embedded = self.model.model.embed_tokens(ids.to(self.device)).detach().requires_grad_(True)
        hidden = self.model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        names = list(self.outputs)
        head = self.model.lm_head.weight
        pieces: dict[str, list[torch.Tensor]] = {
            f"x.{k}": [v[i, :n].float() for i, n in enumerate(lengths)]
            for k, v in self.inputs.items()
        }
        pieces[f"x.{FINAL}"] = [hidden[i, :n].detach() for i, n in enumerate(lengths)]
        drawn: list[tuple[torch.Tensor, ...]] = []
        for draw in range(SIGN_DRAWS):
            target = torch.zeros_like(hidden)
            for i, r in enumerate(rows):
                first, count = int(ref.prompt_lengths[r]) - 1, int(ref.generated_lengths[r])
                # Signs belong to the sequence, not to the batch it happens to run in.
                rng = np.random.default_rng([seed, draw, r])
                signs = torch.from_numpy(rng.choice([-1.0, 1.0], count).astype(np.float32))
                top = torch.from_numpy(ref.top_ids[r, :count, :2].astype(np.int64)).to(self.device)
                difference = head[top[:, 0]] - head[top[:, 1]]
                target[i, first : first + count] = signs.to(self.device)[:, None] * difference
            drawn.append(
                torch.autograd.grad(
                    hidden,
                    [*(self.outputs[n] for n in names), embedded],
                    grad_outputs=target,
                    retain_graph=draw + 1 < SIGN_DRAWS,
                )
            )
        for j, name in enumerate([*names, EMBEDDED]):
            pieces[f"g.{name}"] = [
                torch.stack([drawn[d][j][i, :n] for d in range(SIGN_DRAWS)])
                for i, n in enumerate(lengths)
            ]
        self.outputs.clear()
        self.inputs.clear()
        return {k: v for k, v in pieces.items() if k in self.owner.shapes}

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def component_costs(
    activations: Activations,
    component: Component,
    treatments: Sequence[Treatment],
    weights: FloatArray,
    device: torch.device,
    importance: FloatArray | None,
) -> list[float]:
    """Cost of each treatment of one block matrix. weights: float32 (rows, row_length), HF layout
    (rows are quantized alone, so their order is no matter)."""
    w = torch.from_numpy(np.ascontiguousarray(weights)).to(device)
    x = torch.from_numpy(np.array(activations.inputs(component.name))).to(device)
    g = torch.from_numpy(activations.gradients(component.name)).to(device)
    order = prune_order(weights, importance) if any(t.zero_share for t in treatments) else None
    costs = [0.0] * len(treatments)
    positions = int(activations.reference.generated_lengths.sum())
    back = g @ w  # (draws, tokens, row_length)
    for kind in sorted({activation_kind(t.type) for t in treatments}):
        which = [j for j, t in enumerate(treatments) if activation_kind(t.type) == kind]
        rounded = round_activations(x, kind)
        deltas = torch.stack(
            [
                torch.from_numpy(treated_values(weights, treatments[j], importance, order))
                .to(device)
                .sub_(w)
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
) -> list[float]:
    """Costs of `token_embd` (its rows are looked up) and `output` (or a tied embedding).

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
    costs = []
    for t in treatments:
        new = treated_values(rows, t, importance)
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
        costs.append(cost)
    return costs


def sensitivity(
    activations: Activations,
    components: Sequence[Component],
    treatments: Sequence[Sequence[Treatment]],
    read: Callable[[str], FloatArray],
    device: torch.device,
    tied: bool,
    results: Path,
    progress: Progress = None,
) -> list[list[float]]:
    """Costs of all components, one line of `results` (JSONL) a component as soon as it is known;
    lines that are there already are not measured again. progress: called with weights done.

    read: GGUF name -> float32 weights in HF layout.
    """
    known: dict[str, list[float]] = {}
    if results.is_file():
        for line in results.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the run was killed
            known[record["name"]] = record["costs"]
    with results.open("a") as file:
        for component, choices in zip(components, treatments, strict=True):
            costs = known.get(component.name)
            if costs is None or len(costs) != len(choices):
                weights = read(component.name + ".weight")
                use = component_importance(activations, component, tied)
                if component.in_block:
                    costs = component_costs(activations, component, choices, weights, device, use)
                else:
                    costs = edge_costs(activations, component, choices, weights, use, tied)
                known[component.name] = costs
                file.write(
                    "\n" * (file.tell() > 0) + json.dumps({"name": component.name, "costs": costs})
                )
                file.flush()
            if progress:
                progress(component.weights)
    return [known[c.name] for c in components]


def component_importance(
    activations: Activations, component: Component, tied: bool
) -> FloatArray | None:
    """The importance vector a component is quantized with; none for a table of looked-up rows
    that is not a head too, since there the columns are equally important."""
    if component.name == EMBEDDED and not tied:
        return None
    return activations.importance(component.name)
