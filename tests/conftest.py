"""Shared fixtures: a tiny Llama with random weights, its own greedy reference, a bundle of both;
and for the host side a tiny trained one with what the measuring stages take from it.

No torch at import: the device tests must run without it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fixtures import tiny_bundle as tiny_bundles
from hypothesis import settings

from edge_dtm.formats.reference import CALIBRATION, Reference

if TYPE_CHECKING:
    from edge_dtm.formats.plan import Component

# Whoever comes first loads llama.cpp, which takes longer than an example may.
settings.register_profile("edge-dtm", deadline=None)
settings.load_profile("edge-dtm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: none of them starts when all others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def _tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundles.make_bundle(tmp_path_factory.mktemp("bundle") / "tiny", "F32")


@pytest.fixture(scope="session")
def tiny_gguf(_tiny_bundle: Path) -> Path:
    """A Llama with two layers, random F32 weights and a SentencePiece byte vocabulary."""
    return _tiny_bundle / "model.gguf"


@pytest.fixture(scope="session")
def tiny_reference(_tiny_bundle: Path) -> Reference:
    """The tiny model's own greedy reference."""
    return Reference.load(_tiny_bundle / "reference.npz")


@pytest.fixture
def tiny_bundle(_tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle folder of the tiny model that a test may spoil."""
    return Path(shutil.copytree(_tiny_bundle, tmp_path / "tiny-bundle"))


@pytest.fixture
def seal() -> Callable[..., None]:
    """Write the manifest of a spoilt tiny bundle anew: seal(folder, measured=, thresholds=)."""
    return tiny_bundles.seal


# --- the host side --------------------------------------------------------------------------

STEPS = 60  # enough for margins and gradients like those of a trained model
SEED, TOKENS = 3, 20
PROMPTS = [
    "The baker went to the market and",
    "Anna has three red apples.",
    "def count_items(items):",
    "Once upon a time",
    "1. Wash the",
    "The weather in Oslo",
    "Dear Clara,",
    "{",
    "What is two plus two?",
    "On Monday the farmer",
    "Return the",
    "A short story about a parrot:",
]
STARTS = PROMPTS[:8]


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes of a test run: the first that asks trains it, the others wait."""
    temporary = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        temporary = temporary.parent
    folder = temporary / "tiny-trained"
    with (temporary / "tiny-trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            from fixtures.tiny_llama import make_tiny_llama

            make_tiny_llama(folder, steps=STEPS)
    return folder


class Made:
    """A model, its reference on STARTS, and what its blocks are measured with, gathered once.

    model: transformers' own. statistics: of each block, on all rows. The sequences that are fitted
    to are the very ones that are measured, with other random signs.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        import torch

        from edge_dtm.core.progress import Stages
        from edge_dtm.host.blocks.block_jobs import BlockJobs
        from edge_dtm.host.blocks.boundaries import Boundaries
        from edge_dtm.host.blocks.gather import BlockData, shapes
        from edge_dtm.host.blocks.statistics import Statistics
        from edge_dtm.host.blocks.text import Text
        from edge_dtm.host.blocks.workers import Crew
        from edge_dtm.host.checkpoint.llama import Llama
        from edge_dtm.host.checkpoint.model import load_model
        from edge_dtm.host.checkpoint.open import open_checkpoint
        from edge_dtm.host.trajectory.generate import generate_reference
        from edge_dtm.host.trajectory.prompts import Prompt

        self.checkpoint = open_checkpoint(folder)
        self.config = self.checkpoint.config
        self.model = load_model(self.checkpoint, torch.device("cpu"))
        self.llama = Llama(self.checkpoint, torch.device("cpu"))
        self.components = self.checkpoint.components()
        tokenizer = self.checkpoint.tokenizer
        prompts = [Prompt(tuple(tokenizer.encode(t)), t) for t in STARTS]
        self.reference: Reference = generate_reference(
            self.llama,
            prompts,
            tokens=TOKENS,
            eos_ids=tokenizer.eos_ids,
            split=np.full(len(prompts), CALIBRATION, np.uint8),
            provenance={},
            parts=work / "parts",
        )
        count = len(prompts)
        self.text = Text(self.reference.rows(np.arange(2 * count) % count), count, SEED)
        tokens, measured = self.text.tokens, self.text.measured_tokens
        self.jobs = BlockJobs(
            work, self.checkpoint, self.text.edges[: count + 1], self.text.measured_positions
        )
        run: Any = SimpleNamespace(stages=Stages())
        boundaries = Boundaries(work, tokens, measured, self.config.hidden)
        self.data = BlockData(run, self.llama, self.text, boundaries, self.jobs, Crew(1, 1), True)
        self.data.prepare(self.config.layers - 1)
        rows = {matrix: np.arange(shape[0]) for matrix, shape in shapes(self.config).items()}
        self.statistics = {}
        for layer in reversed(range(self.config.layers)):
            self.data.gather(layer, rows)
            files = self.jobs.fitted_file(layer), self.jobs.measured_file(layer)
            both = [Statistics.load(file).tensors for file in files]
            self.statistics[layer] = Statistics({**both[0], **both[1]})
        self.edge_inputs = self.data.edge_inputs()

    def component(self, name: str) -> Component:
        return next(c for c in self.components if c.name == name)

    def weights(self, name: str) -> np.ndarray[Any, Any]:
        return self.checkpoint.hf_tensor(name + ".weight")

    def positions(self, row: int) -> slice:
        """Where in the sequence the margins are."""
        first = int(self.reference.prompt_lengths[row]) - 1
        return slice(first, first + int(self.reference.generated_lengths[row]))

    def ids(self, row: int) -> Any:
        import torch

        return torch.tensor([(self.reference.prompt(row) + self.reference.generated(row))[:-1]])


@pytest.fixture(scope="session")
def made(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(trained_folder, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("tied") / "hf"
    from fixtures.tiny_llama import make_tiny_llama

    make_tiny_llama(folder, steps=10, tied=True, layers=1)
    return Made(folder, tmp_path_factory.mktemp("made-tied"))


TINY_LLAMAS: dict[str, dict[str, Any]] = {
    "sentencepiece": {},
    "bpe": {"tokenizer": "bpe", "tied": True, "max_shard_size": "3MB"},
    "mistral": {"arch": "mistral"},
    "bias_rope": {"attention_bias": True, "rope_scaling": "llama3"},
}


@pytest.fixture(scope="session")
def tiny_llamas(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The HF folder of a variant of TINY_LLAMAS, hardly trained; to be copied before a change."""
    from fixtures.tiny_llama import make_tiny_llama

    base = tmp_path_factory.mktemp("llamas")
    return cache(lambda name: make_tiny_llama(base / name, steps=1, layers=2, **TINY_LLAMAS[name]))
