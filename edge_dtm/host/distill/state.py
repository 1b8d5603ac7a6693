"""How far a distillation has come: saved at every check, so that a killed run goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.distill.result import (
    Point,
    load_tensors,
    plain_point,
    point_from_json,
    save_tensors,
)
from edge_dtm.host.distill.settings import DistillSettings

STATE = "state.safetensors"
Tensors = Mapping[str, torch.nn.Parameter]


@dataclass
class TrainingState:
    """seconds and tokens: of training only. curve: one point a check, the first of the start.
    rate_scale: what the rate is multiplied with; checks_since: the best, or since it was lowered.
    """

    step: int = 0
    best_step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    rate_scale: float = 1.0
    checks_since: int = 0
    curve: list[Point] = field(default_factory=list)

    def is_best(self, point: Point) -> bool:
        """Whether nothing that was checked is as good."""
        return all(_rank(point) < _rank(p) for p in self.curve)

    def stops_early(self, settings: DistillSettings) -> bool:
        """Nothing better in the last `patience` checks."""
        best = min(range(len(self.curve)), key=lambda i: _rank(self.curve[i]))
        return len(self.curve) - 1 - best >= settings.patience

    def backs_off(self, settings: DistillSettings) -> bool:
        return self.checks_since > 0 and self.checks_since % settings.back_off_after == 0

    def save(self, folder: Path, key: str, trained: Tensors, optimizer: torch.optim.AdamW) -> None:
        """With the latents, and AdamW's moments of those that had a gradient."""
        tensors = {name: t.detach().cpu() for name, t in trained.items()}
        for name, t in trained.items():
            for moment, value in optimizer.state[t].items():
                tensors[f"adam.{moment}.{name}"] = value.detach().cpu()
        head = {**asdict(self), "key": key, "curve": [plain_point(p) for p in self.curve]}
        save_tensors(folder / STATE, tensors, {"state": json.dumps(head)})
        for file in folder.glob("best-*.safetensors"):
            if file != best_file(folder, self.best_step):
                file.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, folder: Path, key: str, trained: Tensors, optimizer: torch.optim.AdamW
    ) -> TrainingState | None:
        """What an earlier run with this key saved, put into latents and optimizer; None when there
        is none."""
        path = folder / STATE
        if not path.is_file():
            return None
        try:
            tensors, text = load_tensors(path)
            head = json.loads(text["state"])
            if head.pop("key") != key:
                return None
            with torch.no_grad():
                for name, t in trained.items():
                    t.copy_(tensors[name])
                    if f"adam.step.{name}" not in tensors:
                        continue  # never had a gradient
                    optimizer.state[t] = {
                        moment: tensors[f"adam.{moment}.{name}"].to(t.device)
                        for moment in ("step", "exp_avg", "exp_avg_sq")
                    }
            return cls(**{**head, "curve": [point_from_json(p) for p in head["curve"]]})
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise damaged(path, error) from None


def damaged(path: Path, error: BaseException) -> EdgeDtmError:
    return EdgeDtmError(
        f"{path} is damaged ({error}): run edge-dtm compress again with --no-resume"
    )


def best_file(folder: Path, step: int) -> Path:
    """A name for each step: until the state names it the former best must not be lost."""
    return folder / f"best-{step:07d}.safetensors"


def save_best(
    folder: Path, step: int, blocks: Mapping[str, Any], gains: Mapping[str, torch.Tensor]
) -> None:
    """blocks: uint8 arrays (rows, row_bytes) by component; gains: float32 by GGUF name."""
    tensors = {f"blocks.{n}": torch.from_numpy(b) for n, b in blocks.items()}
    tensors |= {f"vector.{n}": gain.detach().cpu() for n, gain in gains.items()}
    save_tensors(best_file(folder, step), tensors, {})


def load_best(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What save_best was given."""
    path = best_file(folder, step)
    try:
        tensors, _ = load_tensors(path)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None
    kinds: dict[str, dict[str, Any]] = {"blocks": {}, "vector": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        kinds[kind][name] = tensor.numpy()
    return kinds["blocks"], kinds["vector"]


def _rank(point: Point) -> tuple[float, float]:
    """Lower is better: SDT, ties decided by perplexity."""
    return point["sdt"], point["perplexity"]
