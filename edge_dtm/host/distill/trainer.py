"""Distillation: a compressed Llama is trained to say again what the original says.

Logits are distilled on the original's own text (teacher.py). What runs in training are the values
that would be shipped: masks held, rounded to the grids of the plan by ggml's own quantizer. Their
gradients are applied to latent weights as if there were no rounding (straight-through, arXiv
1308.3432), and the roundings are looked up again every few steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import peak_rss_bytes
from edge_dtm.formats.reference import Reference
from edge_dtm.host.checkpoint.model import module_name
from edge_dtm.host.checkpoint.sequences import batches_by_length, padded
from edge_dtm.host.distill.evaluate import check, divergence_and_gradient
from edge_dtm.host.distill.result import Distilled, Tensors, load_tensors, save_tensors
from edge_dtm.host.distill.settings import DistillSettings, fast_bfloat16
from edge_dtm.host.distill.teacher import TeacherText
from edge_dtm.host.distill.trained import Start, TrainedGain, TrainedMatrix, set_weights

STATE = "state.pt"
BETAS = (0.9, 0.95)  # runs are short: 0.999 would remember the whole of them
LARGEST_GRADIENT = 1.0  # norm over all that is trained
CHECKPOINTING_BYTES = 2 * 2**30
LARGEST_WEIGHT = 65504.0  # of float16, in which scales are stored too


def epoch_batches(lengths: Sequence[int], tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of sequences of similar length, in the order of one epoch. The number of batches is
    the same in every epoch, so that a step's batch follows from the seed and the step alone."""
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths)).tolist()
    batches = batches_by_length(lengths, sorted(shuffled, key=lambda i: lengths[i]), tokens)
    return [batches[i] for i in rng.permutation(len(batches))]


class Trainer:
    """A distillation.

    model: load_model's, float32; trained are its block matrices and all norm gains. starts: what
    its matrices are set to; embedding and head are frozen, as are biases. head: the original's,
    float32 (vocab, hidden). folder: holds the state of the last check, from which a killed run
    goes on to the same result. progress: called after each step with the steps done, its loss in
    nats and the last check's SDT.
    """

    def __init__(
        self,
        model: Any,
        starts: Mapping[str, Start],
        head: torch.Tensor,
        text: TeacherText,
        validation: Reference,
        settings: DistillSettings,
        folder: Path,
        progress: Callable[[int, float, float], None],
    ) -> None:
        self.model, self.text, self.validation = model, text, validation
        self.settings, self.folder, self.progress = settings, folder, progress
        self.device = next(model.parameters()).device
        self.head = head.detach().to(self.device)
        set_weights(model, starts)

        def weight(name: str) -> torch.nn.Parameter:
            parameter: torch.nn.Parameter = model.get_submodule(module_name(name)).weight
            return parameter

        self.matrices = {
            name: TrainedMatrix(start, weight(name))
            for name, start in starts.items()
            if name.startswith("blk.")
        }
        layers = range(len(model.model.layers))
        norms = [f"blk.{i}.{n}" for i in layers for n in ("attn_norm", "ffn_norm")]
        self.gains = {
            name + ".weight": TrainedGain(weight(name)) for name in [*norms, "output_norm"]
        }
        self.latents = [t.latent for t in (*self.matrices.values(), *self.gains.values())]
        self.optimizer = torch.optim.AdamW(
            self.latents,
            lr=settings.learning_rate,
            betas=BETAS,
            weight_decay=0.0,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.bfloat16 = settings.bfloat16
        if self.bfloat16 is None:
            self.bfloat16 = fast_bfloat16(self.device)
        self.batches = len(epoch_batches(text.lengths, settings.batch_tokens, settings.seed, 0))
        self.state = Distilled(self._gains())

    def _gains(self) -> Tensors:
        return {n: g.parameter.detach().cpu().clone() for n, g in self.gains.items()}

    def run(self) -> Distilled:
        """Train the student, keep the best that was checked; the start counts, so it never gets
        worse on `validation`. The model is left with the weights that are returned."""
        state, settings = self.state, self.settings
        if (self.folder / STATE).is_file():
            state = self.state = self._resume()
        else:
            self._check(None, {})
        self._checkpoint_activations()
        losses: list[float] = []
        while state.steps < settings.steps and not state.stops_early(settings.patience):
            start = time.perf_counter()
            loss = self._step()
            losses.append(loss)
            state.steps += 1
            due = state.steps % settings.steps_to_check == 0 or state.steps == settings.steps
            blocks = self._follow(due)
            state.seconds += time.perf_counter() - start
            if due:
                self._check(sum(losses) / len(losses), blocks)
                losses.clear()
            self.progress(state.steps, loss, state.curve[-1]["sdt"])
        self._to_best()
        self.model.requires_grad_(False)
        state.peak_rss_bytes = peak_rss_bytes()
        return state

    def _checkpoint_activations(self) -> None:
        """Where it was asked for, or every matrix's inputs and outputs, which a step keeps for the
        backward pass, would take too much."""
        wanted = self.settings.checkpointing
        if wanted is None:
            numbers = sum(sum(m.parameter.shape) for m in self.matrices.values())
            numbers += 4 * sum(len(g.parameter) for g in self.gains.values())
            tokens = max(self.settings.batch_tokens, *self.text.lengths)
            wanted = 4 * numbers * tokens > CHECKPOINTING_BYTES
        if not wanted:
            return
        # transformers calls it gradient checkpointing up to 5.x, and warns of that name later on.
        switch = getattr(self.model, "activation_checkpointing_enable", None)
        if switch is None:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            switch()  # not reentrant by default

    def _step(self) -> float:
        """One update of the latents; returns the loss in nats a position."""
        settings, lengths = self.settings, self.text.lengths
        epoch, index = divmod(self.state.steps, self.batches)
        rows = epoch_batches(lengths, settings.batch_tokens, settings.seed, epoch)[index]
        ids = padded([self.text.sequences[i] for i in rows]).to(self.device)
        self.model.train()  # transformers checkpoints only then; a Llama has no dropout
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.bfloat16)):
            states = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        at = torch.cat([states[place, : lengths[i]] for place, i in enumerate(rows)]).float()
        # The heads in float32: bfloat16 logits are as far off as the errors to be repaired.
        loss, gradient = divergence_and_gradient(
            at.detach(),
            self.model.lm_head.weight.detach(),
            self.text.hidden_states(rows).to(self.device),
            self.head,
        )
        self._need_finite(loss)
        torch.autograd.backward(at, gradient)
        for trained in (*self.matrices.values(), *self.gains.values()):
            trained.take_gradient()
        norm = torch.nn.utils.clip_grad_norm_(self.latents, LARGEST_GRADIENT)
        self._need_finite(float(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.state.steps) * self.state.rate_scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        self.state.tokens += len(at)
        return loss

    def _need_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise EdgeDtmError(
                f"distillation has no finite loss any more at step {self.state.steps + 1}: lower "
                f"the learning rate of {self.settings.learning_rate:g}"
            )

    def _follow(self, everything: bool) -> Tensors:
        """Effective values after an update of the latents; returns the blocks of what was rounded:
        every few steps what has a grid, or everything."""
        blocks = {}
        fresh = self.state.steps % self.settings.round_every == 0
        for gain in self.gains.values():
            gain.follow()
        for name, matrix in self.matrices.items():
            if everything or (fresh and matrix.type != "F16"):
                if not float(matrix.weights().abs().max()) < LARGEST_WEIGHT:
                    self._need_finite(math.inf)
                blocks[name] = matrix.round()
            else:
                matrix.follow()
        return blocks

    def _check(self, loss: float | None, blocks: Tensors) -> None:
        """Check what would be shipped, keep it if it is the best, save. blocks: of all matrices,
        none at the start."""
        state = self.state
        answers = check(self.model, self.validation, self.settings.batch_tokens)
        point = {"step": state.steps, "loss": loss, **asdict(answers), "tokens": state.tokens}
        state.curve.append(point)
        state.checks_since = 0 if state.best is point else state.checks_since + 1
        if state.best is point:
            state.blocks, state.vectors = blocks, self._gains()
        elif state.backs_off:
            state.rate_scale *= self.settings.back_off
            self._to_best()
        if state.steps:
            self._save()

    def _to_best(self) -> None:
        """Go on from the best that was checked, without AdamW's memory of the way beyond it."""
        for name, matrix in self.matrices.items():
            matrix.restart_from(self.state.blocks.get(name))
        for name, gain in self.gains.items():
            gain.restart(self.state.vectors[name])
        self.optimizer.state.clear()

    def _save(self) -> None:
        """Offsets are not saved: all was freshly rounded."""
        parts = {
            "distilled": vars(self.state),
            "latents": [t.detach() for t in self.latents],
            "optimizer": self.optimizer.state_dict(),
        }
        save_tensors(self.folder / STATE, parts)

    def _resume(self) -> Distilled:
        """The saved state, put into latents and optimizer."""
        parts = load_tensors(self.folder / STATE)
        self.state = Distilled(**parts["distilled"])
        if self.state.backs_off:
            self._to_best()
            return self.state
        with torch.no_grad():
            for latent, values in zip(self.latents, parts["latents"], strict=True):
                latent.copy_(values)
        self.optimizer.load_state_dict(parts["optimizer"])
        self._follow(everything=True)
        return self.state
