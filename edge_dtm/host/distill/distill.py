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
from dataclasses import asdict, dataclass
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
    load_tensors,
    plain_point,
    point_from_json,
    save_tensors,
)
from edge_dtm.host.distill.teacher import TeacherText, batches_by_length, padded
from edge_dtm.host.distill.trained import HALF_TYPES, Trained, TrainedGain, TrainedMatrix
from edge_dtm.llamacpp import ggml

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

BETAS = (0.9, 0.95)  # runs are short: 0.999 would remember the whole of them
LARGEST_GRADIENT = 1.0  # norm over all that is trained
CHECKPOINTING_BYTES = 2 * 2**30
LARGEST_WEIGHT = 65504.0
STATE = "state.safetensors"
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class DistillSettings:
    """learning_rate: at its highest, a share of every weight's size, see unit_sizes. batch_tokens
    count padding. round_every: steps between two roundings; check_every: None for
    a tenth of the steps; patience: checks without a better SDT before it stops early; back_off: what
    the rate is multiplied with after every back_off_after checks without a better SDT, when the
    training goes on from the best; checkpointing: recompute activations to save memory, None: where they would take more than
    CHECKPOINTING_BYTES."""

    steps: int
    learning_rate: float = 3e-3
    batch_tokens: int = 2048
    warmup_share: float = 0.05
    round_every: int = 4
    check_every: int | None = None
    patience: int = 6  # of ten checks: the highest rate makes the first ones worse
    # What repairs a badly damaged model within a few steps is too much for a slightly damaged one.
    back_off_after: int = 2
    back_off: float = 0.2
    seed: int = 0
    precision: str = "auto"
    checkpointing: bool | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.round_every < 1 or self.batch_tokens < 1 or self.patience < 1:
            raise EdgeDtmError(
                "distillation needs at least one step, batch token, check and rounding"
            )
        if self.back_off_after < 1 or not 0 < self.back_off <= 1:
            raise EdgeDtmError(
                "distillation backs off after one check or more, to a share of the rate"
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise EdgeDtmError(f"a learning rate of {self.learning_rate} trains nothing: use 3e-3")
        if self.precision not in PRECISIONS:
            raise EdgeDtmError(
                f"precision {self.precision!r} is unknown: use {', '.join(PRECISIONS)}"
            )

    @property
    def steps_to_check(self) -> int:
        return self.check_every or max(1, self.steps // 10)

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0): linear warm-up, then half a cosine towards 0."""
        warmup = max(1, round(self.steps * self.warmup_share))
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (steps were 1.5 times as fast on a
    Zen 4 core: 452 instead of 303 tokens a second, hidden 576, 6 layers, vocabulary 8,192)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Private, but there is no other way to ask; absent elsewhere than on x86.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in names)


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
    return _Run(model, components, head, text, validation, settings, folder, progress).run()


class _Run:
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
        names = [
            f"blk.{i}.{norm}"
            for i in range(len(model.model.layers))
            for norm in ("attn_norm", "ffn_norm")
        ]
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
        fast = settings.precision == "auto" and fast_bfloat16(self.device)
        self.bfloat16 = fast or settings.precision == "bfloat16"
        self.checkpointing = settings.checkpointing
        if self.checkpointing is None:
            self.checkpointing = self._activation_bytes() > CHECKPOINTING_BYTES
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.curve: list[Point] = []
        self.best_step = 0
        # What the rate is multiplied with, and the checks since the best or since it was lowered.
        self.scale, self.since = 1.0, 0
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
            while self.step < self.settings.steps and not self._stopped():
                start = time.perf_counter()
                loss = self._step()
                self.step += 1
                due = (
                    self.step % self.settings.steps_to_check == 0
                    or self.step == self.settings.steps
                )
                if not due:  # a check rounds everything anyway
                    self._follow()
                self.seconds += time.perf_counter() - start
                loss_sum, since = loss_sum + loss, since + 1
                if due:
                    self._check(loss_sum / since)
                    loss_sum, since = 0.0, 0
                if self.progress:
                    self.progress(self.step, loss, self.curve[-1]["sdt"])
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
        rows = self._batch(self.step)
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
            group["lr"] = self.settings.rate(self.step) * self.scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        self.tokens += sum(lengths)
        return loss

    def _need_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise EdgeDtmError(
                f"distillation has no finite loss any more at step {self.step + 1}: lower the learning "
                f"rate of {self.settings.learning_rate:g}"
            )

    def _follow(self) -> None:
        fresh = self.step % self.settings.round_every == 0
        for gain in self.gains.values():
            gain.follow()
        for matrix in self.matrices:
            if fresh and matrix.type not in HALF_TYPES and matrix.type != "F32":
                self._round(matrix)
            else:
                matrix.follow()

    def _round(self, matrix: TrainedMatrix) -> ByteArray:
        # What float16, in which scales are stored too, cannot hold would come back as infinite.
        if not float(matrix.weights().abs().max()) < LARGEST_WEIGHT:
            self._need_finite(math.inf)
        return matrix.round()

    def _rank(self, point: Point) -> tuple[float, float]:
        """Lower is better: SDT, ties decided by perplexity."""
        return point["sdt"], point["perplexity"]

    def _stopped(self) -> bool:
        """Nothing better in the last `patience` checks."""
        best = min(range(len(self.curve)), key=lambda i: self._rank(self.curve[i]))
        return len(self.curve) - 1 - best >= self.settings.patience

    def _check(self, loss: float) -> None:
        """Round everything, check what would be shipped, keep it if it is the best, save."""
        blocks: dict[str, ByteArray] = {}
        if self.step:
            start = time.perf_counter()
            for gain in self.gains.values():
                gain.follow()
            for matrix in self.matrices:
                blocks[matrix.name] = self._round(matrix)
            self.seconds += time.perf_counter() - start
        found = check(self.model, self.validation, self.settings.batch_tokens)
        point: Point = {
            "step": self.step,
            "loss": loss,
            "sdt": found.sdt,
            "fdt": found.fdt,
            "perplexity": found.perplexity,
            "tokens": self.tokens,
        }
        if self.step:
            better = all(self._rank(point) < self._rank(p) for p in self.curve)
            self.curve.append(point)
            self.since = 0 if better else self.since + 1
            if better:
                self._keep(blocks)
            elif self._backs_off:
                self.scale *= self.settings.back_off
                self._to_best()
            self._save()
        else:
            self.curve.append(point)
        lines = "".join(json.dumps(plain_point(p)) + "\n" for p in self.curve)
        write_whole(self.folder / "curve.jsonl", lines.encode())

    @property
    def _backs_off(self) -> bool:
        return self.since > 0 and self.since % self.settings.back_off_after == 0

    def _to_best(self) -> None:
        """Go on from the best that was checked, without AdamW's memory of the way beyond it."""
        best = self._result()
        for matrix in self.matrices:
            matrix.restart(best.values[matrix.name])
        for name, gain in self.gains.items():
            gain.restart(best.vectors[name])
        self.optimizer.state.clear()

    def _best_file(self, step: int) -> Path:
        return self.folder / f"best-{step:07d}.safetensors"

    def _keep(self, blocks: dict[str, ByteArray]) -> None:
        """Under a name of its own: until the state names it the former best must not be lost."""
        tensors = {f"blocks.{n}": torch.from_numpy(b) for n, b in blocks.items()}
        tensors |= {f"vector.{n}": gain.detach().cpu() for n, gain in self.norms.items()}
        self.best_step = self.step
        save_tensors(self._best_file(self.step), tensors, {})

    def _save(self) -> None:
        tensors = {name: t.detach().cpu() for name, t in self.trained.items()}
        for name, t in self.trained.items():
            for key, value in self.optimizer.state[t].items():
                tensors[f"adam.{key}.{name}"] = value.detach().cpu()
        head = {
            "key": self.key,
            "step": self.step,
            "curve": [plain_point(p) for p in self.curve],
            "best_step": self.best_step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "scale": self.scale,
            "since": self.since,
        }
        save_tensors(self.folder / STATE, tensors, {"state": json.dumps(head)})
        for file in self.folder.glob("best-*.safetensors"):
            if file != self._best_file(self.best_step):
                file.unlink(missing_ok=True)

    def _resume(self) -> bool:
        """Whether there was a state of this very run to go on with.

        Offsets are not saved: a state is always of a moment when all was freshly rounded.
        """
        path = self.folder / STATE
        if not path.is_file():
            return False
        try:
            tensors, text = load_tensors(path)
            state = json.loads(text["state"])
            if state["key"] != self.key:
                return False
            with torch.no_grad():
                for name, t in self.trained.items():
                    t.copy_(tensors[name])
                    if f"adam.step.{name}" not in tensors:
                        continue  # never had a gradient
                    self.optimizer.state[t] = {
                        key: tensors[f"adam.{key}.{name}"].to(self.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
            self.step, self.best_step = state["step"], state["best_step"]
            self.seconds, self.tokens = state["seconds"], state["tokens"]
            self.curve = [point_from_json(p) for p in state["curve"]]
            self.scale, self.since = float(state["scale"]), int(state["since"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise EdgeDtmError(
                f"{path} is damaged ({error}): run edge-dtm compress again with --no-resume"
            ) from None
        if self._backs_off:
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
        vectors: dict[str, FloatArray] = {}
        if self.best_step:
            path = self._best_file(self.best_step)
            try:
                tensors, _ = load_tensors(path)
            except (OSError, ValueError) as error:
                raise EdgeDtmError(
                    f"{path} is damaged ({error}): run edge-dtm compress again with --no-resume"
                ) from None
            for key, tensor in tensors.items():
                kind, _, name = key.partition(".")
                if kind == "blocks":
                    blocks[name] = tensor.numpy()
                else:
                    vectors[name] = tensor.numpy()
        else:
            vectors = self.first_gains
        lengths = {m.name: m.parameter.shape[1] for m in self.matrices}
        return Distilled(
            best_step=self.best_step,
            steps=self.step,
            curve=self.curve,
            types=types,
            values={
                n: ggml.dequantize(types[n], blocks[n], lengths[n])
                if blocks
                else np.array(self.components[n].start, dtype=np.float32)
                for n in types
            },
            blocks=blocks,
            vectors=vectors,
            tokens_per_s=self.tokens / self.seconds if self.seconds else 0.0,
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
