"""What `edge-dtm compress` is asked for, in groups: what to compress, how far, and by what means."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edge_dtm.formats.ggml_types import DEFAULT_TYPES
from edge_dtm.formats.profile import DeviceProfile


@dataclass(frozen=True)
class Source:
    """What is compressed, and the text it is measured on.

    model: a Hugging Face folder or a GGUF. prompts: the user's own, None: the packaged ones.
    tokens: greedy tokens a prompt, at most. calibration_tokens: of text sampled from the model, to fit
    error feedback and scales to, beside the prompts. imatrix: importance vectors in place of ours.
    """

    model: Path
    prompts: Path | None = None
    tokens: int = 96
    calibration_tokens: int = 6000
    seed: int = 0
    imatrix: Path | None = None


@dataclass(frozen=True)
class Goal:
    """How far it is compressed.

    The file has at most max_bytes, by default what the profile allows; unlimited: any size.
    max_sdt (share) and min_fdt (tokens) ask for the smallest file that reaches them. sparsity:
    average share of zeros over the block matrices. int8_share: share of the components in Q8_0,
    in place of a search.
    """

    profile: DeviceProfile
    max_bytes: int | None = None
    unlimited: bool = False
    max_sdt: float | None = None
    min_fdt: float | None = None
    types: tuple[str, ...] = DEFAULT_TYPES
    sparsity: float = 0.0
    int8_share: float | None = None


@dataclass(frozen=True)
class Method:
    """By what means: see the options of the same names in `edge-dtm compress --help`."""

    device: str = "auto"
    workers: int | None = None
    feedback: bool = True
    equalize: bool = True
    mask_score: str = "activation"
    sequential_pruning: bool = True
    sparsity_steps: int = 1
    distill_steps: int = 0


@dataclass(frozen=True)
class Settings:
    """All of it. out: the bundle's folder. resume: go on with what its work folder holds."""

    out: Path
    source: Source
    goal: Goal
    method: Method = field(default_factory=Method)
    resume: bool = True
