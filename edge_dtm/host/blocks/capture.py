"""One forward and backward pass: what every component is fed, and the margins' gradients there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from edge_dtm.formats.reference import Reference
from edge_dtm.host.checkpoint.model import module_name

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


class Capture:
    """Hooks on a model that keep inputs and outputs of the components during one pass.

    keys: `g.<component>` of every block matrix whose gradients are wanted.
    """

    def __init__(self, model: Any, reference: Reference, keys: Iterable[str]) -> None:
        self.model, self.reference = model, reference
        self.device = next(model.parameters()).device
        self.outputs: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}
        self.handles = []
        modules = dict(model.named_modules())
        for key in keys:
            name = key[2:]
            if key.startswith("g.") and name != EMBEDDED:
                self.handles.append(
                    modules[module_name(name)].register_forward_hook(self._keep(name))
                )

    def _keep(self, name: str) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.outputs[name] = output
            self.inputs[input_key(name)] = args[0]

        return hook

    def run(self, rows: range, seed: int, draws: int) -> dict[str, list[torch.Tensor]]:
        """For some rows of the reference, in pieces a sequence: `x.<input>` float32 (tokens,
        row_length); `g.<component>` (draws, tokens, rows), the gradient of the randomly signed
        sum of the sequence's margins at the outputs; `b.<input>`, the same at the
        inputs, at the final hidden states through the head."""
        ref = self.reference
        lengths = [int(ref.prompt_lengths[r] + ref.generated_lengths[r] - 1) for r in rows]
        ids = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
        for i, r in enumerate(rows):
            ids[i, : lengths[i]] = torch.tensor((ref.prompt(r) + ref.generated(r))[: lengths[i]])
        # Padding stands to the right, where causal attention never looks back from.
        embedded = self.model.model.embed_tokens(ids.to(self.device)).detach().requires_grad_(True)
        hidden = self.model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        head = self.model.lm_head.weight
        pieces: dict[str, list[torch.Tensor]] = {
            f"x.{k}": [v[i, :n].detach().float() for i, n in enumerate(lengths)]
            for k, v in self.inputs.items()
        }
        pieces[f"x.{FINAL}"] = [hidden[i, :n].detach() for i, n in enumerate(lengths)]
        wanted = {f"g.{n}": t for n, t in self.outputs.items()}
        wanted |= {f"b.{n}": t for n, t in self.inputs.items()}
        wanted[f"g.{EMBEDDED}"] = embedded
        drawn: list[tuple[torch.Tensor, ...]] = []
        targets = []
        for draw in range(draws):
            target = torch.zeros_like(hidden)
            for i, r in enumerate(rows):
                first, count = int(ref.prompt_lengths[r]) - 1, int(ref.generated_lengths[r])
                # Signs belong to the sequence, not to the batch it happens to run in.
                rng = np.random.default_rng([seed, draw, r])
                signs = torch.from_numpy(rng.choice([-1.0, 1.0], count).astype(np.float32))
                top = torch.from_numpy(ref.top_ids[r, :count, :2].astype(np.int64)).to(self.device)
                difference = head[top[:, 0]] - head[top[:, 1]]
                target[i, first : first + count] = signs.to(self.device)[:, None] * difference
            targets.append(target)
            drawn.append(
                torch.autograd.grad(
                    hidden,
                    list(wanted.values()),
                    grad_outputs=target,
                    retain_graph=draw + 1 < draws,
                )
            )
        for j, key in enumerate(wanted):
            pieces[key] = [
                torch.stack([drawn[d][j][i, :n] for d in range(draws)])
                for i, n in enumerate(lengths)
            ]
        pieces[f"b.{FINAL}"] = [
            torch.stack([t[i, :n] for t in targets]) for i, n in enumerate(lengths)
        ]
        self.outputs.clear()
        self.inputs.clear()
        return pieces

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
