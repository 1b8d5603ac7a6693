"""Distillation: a compressed Llama is trained to say again what the original says.

Logits are distilled on the original's own text (teacher.py). What runs in training are the values
that would be shipped: masks held, rounded to the grids of the plan by ggml's own quantizer. Their
gradients are applied to latent weights as if there were no rounding (straight-through, arXiv
1308.3432), and the roundings are looked up again every few steps.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import write_whole
from edge_dtm.core.machine import peak_rss_bytes
from edge_dtm.formats.reference import Reference
from edge_dtm.host.checkpoint.model import module_name
from edge_dtm.host.distill.evaluate import check, divergence_and_gradient
from edge_dtm.host.distill.result import (
    Distilled,
    Point,
    plain_point,
)
from edge_dtm.host.distill.settings import DistillSettings
from edge_dtm.host.distill.state import TrainingState, load_best, save_best
from edge_dtm.host.distill.teacher import TeacherText, batches_by_length, padded
from edge_dtm.host.distill.trained import HALF_TYPES, Trained, TrainedGain, TrainedMatrix
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

BLOCK_NORMS = ("attn_norm", "ffn_norm")
BETAS = (0.9, 0.95)  # runs are short: 0.999 would remember the whole of them
LARGEST_GRADIENT = 1.0  # norm over all that is trained
CHECKPOINTING_BYTES = 2 * 2**30
LARGEST_WEIGHT = 65504.0


def epoch_batches(lengths: Sequence[int], tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of sequences of similar length, in the order of one epoch. The number of batches is
    the same in every epoch, so that a step's batch follows from the seed and the step alone."""
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths)).tolist()
    batches = batches_by_length(lengths, sorted(shuffled, key=lambda i: lengths[i]), tokens)
    return [batches[i] for i in rng.permutation(len(batches))]


def distill(
    model: Any,
    components: Mapping[str, Trained],
    head: torch.Tensor,
    text: TeacherText,
    validation: Reference,
    settings: DistillSettings,
    folder: Path,
    progress: Callable[[int, float, float], None] | None = None,
) -> Distilled:
    """Train the student, keep the best that was checked; the start counts, so it never gets worse
    on `validation`.

    model: load_model's, float32; its weights are set from the components' start values. Trained
    are the components of blocks and all norm gains; embedding and head are set, if given, and
    frozen, biases are frozen; it is left with the weights that are returned. head: the original's, float32 (vocab, hidden). folder: holds the
    state of the last check, from which a killed run goes on to the same result. progress: called
    after each step with the steps done, its loss in nats and the last check's SDT.
    """
    return Trainer(model, components, head, text, validation, settings, folder, progress).run()


class Trainer:
    """A distillation under way; see distill()."""

    def __init__(
        self,
        model: Any,
        components: Mapping[str, Trained],
        head: torch.Tensor,
        text: TeacherText,
        validation: Reference,
        settings: DistillSettings,
        folder: Path,
        progress: Callable[[int, float, float], None] | None,
    ) -> None:
        if not len(validation):
            raise EdgeDtmError("there is no text to check the distillation on: give more prompts")
        if not text.captured:
            raise EdgeDtmError(f"{text.folder} is not complete: run edge-dtm compress again")
        self.model, self.text, self.validation = model, text, validation
        self.settings, self.folder, self.progress = settings, folder, progress
        self.components = components
        self.device = next(model.parameters()).device
        self.head = head.detach().to(self.device, torch.float32)
        model.requires_grad_(False)
        self._set_frozen()
        self.student_head = model.lm_head.weight.detach()
        modules = dict(model.named_modules())
        self.matrices = [
            TrainedMatrix(name, trained, modules[module_name(name)].weight)
            for name, trained in components.items()
            if name.startswith("blk.")
        ]
        names = [f"blk.{i}.{n}" for i in range(len(model.model.layers)) for n in BLOCK_NORMS]
        self.norms: dict[str, torch.nn.Parameter] = {
            f"{name}.weight": modules[module_name(name)].weight for name in [*names, "output_norm"]
        }
        self.first_gains = {n: g.detach().cpu().numpy().copy() for n, g in self.norms.items()}
        self.key = self._hash()
        for parameter in [*(m.parameter for m in self.matrices), *self.norms.values()]:
            parameter.requires_grad_(True)
        self.trained = {f"latent.{m.name}": m.latent for m in self.matrices}
        self.gains = {name: TrainedGain(parameter) for name, parameter in self.norms.items()}
        self.trained |= {f"vector.{name}": gain.latent for name, gain in self.gains.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.trained.values()),
            lr=settings.learning_rate,
            betas=BETAS,
            weight_decay=0.0,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.bfloat16 = settings.uses_bfloat16(self.device)
        self.checkpointing = settings.checkpointing
        if self.checkpointing is None:
            self.checkpointing = self._activation_bytes() > CHECKPOINTING_BYTES
        self.state = TrainingState()
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._batches = len(epoch_batches(text.lengths, settings.batch_tokens, settings.seed, 0))

    def _set_frozen(self) -> None:
        """Embedding and head as they are shipped."""
        tied = bool(self.model.config.tie_word_embeddings)
        for name, modules in (
            ("token_embd", [self.model.model.embed_tokens] + [self.model.lm_head] * tied),
            ("output", [self.model.lm_head]),
        ):
            if name in self.components:
                start = torch.tensor(self.components[name].start, device=self.device)
                for module in modules:
                    module.weight.data = start

    def _hash(self) -> str:
        """SHA-256 of all that the result depends on, in hex. Needs the start values in place."""
        digest = hashlib.sha256(json.dumps([asdict(self.settings), self.text.key]).encode())
        for matrix in self.matrices:
            treatment = self.components[matrix.name].treatment
            digest.update(json.dumps([matrix.name, treatment.to_json()]).encode())
            if matrix.importance is not None:
                digest.update(np.ascontiguousarray(matrix.importance).data)
        for parameter in [*self.model.parameters(), self.head]:
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
        for ids in (self.validation.prompt_ids, self.validation.generated_ids):
            digest.update(np.ascontiguousarray(ids).data)
        return digest.hexdigest()

    def _activation_bytes(self) -> int:
        """Bytes, roughly, that a step keeps for the backward pass: every matrix's inputs and outputs."""
        numbers = sum(sum(m.parameter.shape) for m in self.matrices)
        numbers += 4 * sum(len(gain) for gain in self.norms.values())
        return 4 * numbers * max(self.settings.batch_tokens, max(self.text.lengths))

    def run(self) -> Distilled:
        """See distill()."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._resume():
            self._check(math.nan)
        loss_sum, since = 0.0, 0
        if self.checkpointing:
            _checkpointing(self.model, True)
        try:
            while self.state.step < self.settings.steps and not self.state.stops_early(
                self.settings
            ):
                start = time.perf_counter()
                loss = self._step()
                self.state.step += 1
                due = (
                    self.state.step % self.settings.steps_to_check == 0
                    or self.state.step == self.settings.steps
                )
                if not due:  # a check rounds everything anyway
                    self._follow()
                self.state.seconds += time.perf_counter() - start
                loss_sum, since = loss_sum + loss, since + 1
                if due:
                    self._check(loss_sum / since)
                    loss_sum, since = 0.0, 0
                if self.progress:
                    self.progress(self.state.step, loss, self.state.curve[-1]["sdt"])
        finally:
            if self.checkpointing:
                _checkpointing(self.model, False)
            self.model.eval().requires_grad_(False)
            for parameter in self.model.parameters():
                parameter.grad = None
        return self._leave(self._result())

    def _leave(self, result: Distilled) -> Distilled:
        """The model as what is returned, not as what was trained last."""
        with torch.no_grad():
            for matrix in self.matrices:
                matrix.parameter.copy_(torch.from_numpy(result.values[matrix.name]))
            for name, gain in self.norms.items():
                gain.copy_(torch.from_numpy(result.vectors[name]))
        return result

    def _batch(self, step: int) -> list[int]:
        epoch, index = divmod(step, self._batches)
        if self._epoch[0] != epoch:
            settings = self.settings
            batches = epoch_batches(self.text.lengths, settings.batch_tokens, settings.seed, epoch)
            self._epoch = epoch, batches
        return self._epoch[1][index]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _step(self) -> float:
        """One update of the latents; returns the loss in nats a position."""
        rows = self._batch(self.state.step)
        lengths = [self.text.lengths[i] for i in rows]
        ids = padded([self.text.sequences[i] for i in rows]).to(self.device)
        self.model.train()  # transformers checkpoints only then; a Llama has no dropout
        with self._autocast():
            states = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        at = torch.cat([states[i, :n] for i, n in enumerate(lengths)]).float()
        # The heads in float32: bfloat16 logits are as far off as the errors to be repaired.
        loss, gradient = divergence_and_gradient(
            at.detach(), self.student_head, self.text.hidden_states(rows).to(self.device), self.head
        )
        self._need_finite(loss)
        torch.autograd.backward(at, gradient)
        for matrix in self.matrices:
            matrix.take_gradient()
        for gain in self.gains.values():
            gain.take_gradient()
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), LARGEST_GRADIENT)
        self._need_finite(float(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.state.step) * self.state.rate_scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        self.state.tokens += sum(lengths)
        return loss

    def _need_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise EdgeDtmError(
                f"distillation has no finite loss any more at step {self.state.step + 1}: lower the learning "
                f"rate of {self.settings.learning_rate:g}"
            )

    def _follow(self) -> None:
        fresh = self.state.step % self.settings.round_every == 0
        for gain in self.gains.values():
            gain.follow()
        for matrix in self.matrices:
            if fresh and matrix.type not in HALF_TYPES:
                self._round(matrix)
            else:
                matrix.follow()

    def _round(self, matrix: TrainedMatrix) -> ByteArray:
        # What float16, in which scales are stored too, cannot hold would come back as infinite.
        if not float(matrix.weights().abs().max()) < LARGEST_WEIGHT:
            self._need_finite(math.inf)
        return matrix.round()

    def _check(self, loss: float) -> None:
        """Round everything, check what would be shipped, keep it if it is the best, save."""
        state = self.state
        blocks: dict[str, ByteArray] = {}
        if state.step:
            start = time.perf_counter()
            for gain in self.gains.values():
                gain.follow()
            for matrix in self.matrices:
                blocks[matrix.name] = self._round(matrix)
            self.state.seconds += time.perf_counter() - start
        answers = check(self.model, self.validation, self.settings.batch_tokens)
        point: Point = {
            "step": self.state.step,
            "loss": loss,
            "sdt": answers.sdt,
            "fdt": answers.fdt,
            "perplexity": answers.perplexity,
            "tokens": self.state.tokens,
        }
        if self.state.step:
            better = state.is_best(point)
            state.curve.append(point)
            state.checks_since = 0 if better else state.checks_since + 1
            if better:
                self._keep(blocks)
            elif state.backs_off(self.settings):
                state.rate_scale *= self.settings.back_off
                self._to_best()
            self._save()
        else:
            self.state.curve.append(point)
        lines = "".join(json.dumps(plain_point(p)) + "\n" for p in self.state.curve)
        write_whole(self.folder / "curve.jsonl", lines.encode())

    def _to_best(self) -> None:
        """Go on from the best that was checked, without AdamW's memory of the way beyond it."""
        best = self._result()
        for matrix in self.matrices:
            matrix.restart(best.values[matrix.name])
        for name, gain in self.gains.items():
            gain.restart(best.vectors[name])
        self.optimizer.state.clear()

    def _keep(self, blocks: dict[str, ByteArray]) -> None:
        self.state.best_step = self.state.step
        save_best(self.folder, self.state.step, blocks, self.norms)

    def _save(self) -> None:
        self.state.save(self.folder, self.key, self.trained, self.optimizer)

    def _resume(self) -> bool:
        """Whether there was a state of this very run to go on with.

        Offsets are not saved: a state is always of a moment when all was freshly rounded.
        """
        state = TrainingState.load(self.folder, self.key, self.trained, self.optimizer)
        if state is None:
            return False
        self.state = state
        if state.backs_off(self.settings):
            self._to_best()
            return True
        for gain in self.gains.values():
            gain.follow()
        for matrix in self.matrices:
            matrix.round()
        return True

    def _result(self) -> Distilled:
        types = {m.name: m.type for m in self.matrices}
        blocks: dict[str, ByteArray] = {}
        vectors: dict[str, FloatArray] = self.first_gains
        if self.state.best_step:
            blocks, vectors = load_best(self.folder, self.state.best_step)
        lengths = {m.name: m.parameter.shape[1] for m in self.matrices}
        seconds = self.state.seconds
        return Distilled(
            best_step=self.state.best_step,
            steps=self.state.step,
            curve=self.state.curve,
            types=types,
            values={
                n: ggml.dequantize(types[n], blocks[n], lengths[n])
                if blocks
                else np.array(self.components[n].start, dtype=np.float32)
                for n in types
            },
            blocks=blocks,
            vectors=vectors,
            tokens_per_s=self.state.tokens / seconds if seconds else 0.0,
            peak_rss_bytes=peak_rss_bytes(),
        )


def _checkpointing(model: Any, on: bool) -> None:
    """transformers calls it gradient checkpointing up to 5.x, and warns of that name later on."""
    state = "enable" if on else "disable"
    switch = getattr(model, f"activation_checkpointing_{state}", None)
    if switch is None:
        arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if on else {}
        getattr(model, f"gradient_checkpointing_{state}")(**arguments)
    else:
        switch()  # not reentrant by default
