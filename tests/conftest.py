"""Shared fixtures: a tiny Llama with random weights, its own greedy reference, a bundle of both;
and for the host side a tiny trained one with what the measuring stages take from it.

No torch at import: the device tests must run without it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fixtures.tiny_bundle import write_gguf

from edge_dtm.formats.bundle import write_manifest
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import CALIBRATION, HELD_OUT, PADDING, TOP_K, Reference
from edge_dtm.formats.thresholds import Thresholds
from edge_dtm.llamacpp import probe_model
from edge_dtm.llamacpp.runner import LlamaRunner
from edge_dtm.llamacpp.vocabulary import tokenize

if TYPE_CHECKING:
    from edge_dtm.formats.plan import Component

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, LAYERS, HEADS, KV_HEADS = 256, 2, 4, 2
TEXTS = [
    "the cat",
    "a longer prompt of several words, which takes more than sixteen tokens",
    "1 + 1 =",
    "ünï 😀",
    "",
    "end</s>again",
]
BUNDLE_FILES = [
    "model.gguf", "reference.npz", "host.npz", "probe.npz", "plan.json", "report.md"
]  # fmt: skip
THRESHOLDS = Thresholds(
    max_sdt=0.1,
    min_fdt=20.0,
    max_kl_vs_host=0.01,
    decided_margin=1.0,
    max_decided_sdt_vs_host=0.002,
    max_kl_probe=1e-3,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: none of them starts when all others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _write_tiny_gguf(path: Path, seed: int) -> None:
    write_gguf(path, seed, hidden=HIDDEN, layers=LAYERS, matrix_type="F32")


@pytest.fixture(scope="session")
def make_tiny_gguf() -> Callable[[Path, int], None]:
    """Write a tiny Llama GGUF: (path, seed of its weights)."""
    return _write_tiny_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with two layers, random F32 weights and a SentencePiece byte vocabulary."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    _write_tiny_gguf(path, 0)
    return path


@pytest.fixture(scope="session")
def tiny_settings() -> RunSettings:
    return RunSettings(threads=1, batch_tokens=64)


@pytest.fixture(scope="session")
def tiny_greedy(tiny_gguf: Path, tiny_settings: RunSettings) -> tuple[Reference, Record]:
    """The tiny model's own greedy reference of TEXTS, and the record it was made from."""
    prompts = tokenize(tiny_gguf, TEXTS)
    s, n = len(TEXTS), 32
    lengths = np.array([32, 32, 20, 1, 32, 7], dtype=np.int32)
    prompt_ids = np.full((s, max(map(len, prompts))), PADDING, dtype=np.int32)
    for row, ids in enumerate(prompts):
        prompt_ids[row, : len(ids)] = ids
    empty = Reference(
        prompt_ids=prompt_ids,
        prompt_lengths=np.array([len(ids) for ids in prompts], dtype=np.int32),
        generated_ids=np.zeros((s, n), dtype=np.int32),
        generated_lengths=lengths,
        top_ids=np.zeros((s, n, TOP_K), dtype=np.int32),
        top_logits=np.zeros((s, n, TOP_K), dtype=np.float32),
        log_normalizers=np.zeros((s, n), dtype=np.float32),
        split=np.full(s, HELD_OUT, dtype=np.uint8),
        texts=np.array(TEXTS),
        provenance={"model": "tiny"},
    )
    with LlamaRunner(tiny_gguf, tiny_settings, 256) as llama:
        record = llama.greedy(empty)
    reference = dataclasses.replace(
        empty,
        generated_ids=record.ids,
        top_ids=record.top_ids,
        top_logits=record.top_logits,
        log_normalizers=record.log_normalizers,
    )
    return reference, record


@pytest.fixture(scope="session")
def tiny_reference(tiny_greedy: tuple[Reference, Record]) -> Reference:
    return tiny_greedy[0]


@pytest.fixture(scope="session")
def _tiny_bundle(
    tiny_gguf: Path,
    tiny_reference: Reference,
    tiny_settings: RunSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    folder.mkdir()
    shutil.copy(tiny_gguf, folder / "model.gguf")
    tiny_reference.save(folder / "reference.npz")
    with LlamaRunner(tiny_gguf, tiny_settings, 256) as llama:
        llama.teacher_forced(tiny_reference).save(folder / "host.npz", {"machine": "host"})
    probe_model.record(folder / "p.gguf", tiny_settings).save(folder / "probe.npz", {})
    (folder / "p.gguf").unlink()
    (folder / "plan.json").write_text("{}\n")
    (folder / "report.md").write_text("# Tiny\n")
    seal_bundle(folder)
    return folder


def seal_bundle(folder: Path, **changes: Any) -> None:
    """Write the manifest of a tiny bundle anew; changes: thresholds or measured."""
    write_manifest(
        folder,
        changes.get("files", BUNDLE_FILES),
        changes.get("thresholds", THRESHOLDS),
        {"model": "tiny"},
        changes.get("measured", {"noise_floor": {"near_tie_margin": 0.01, "sdt": 0.002}}),
    )


@pytest.fixture
def tiny_bundle(_tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle folder of the tiny model that a test may spoil."""
    return Path(shutil.copytree(_tiny_bundle, tmp_path / "tiny-bundle"))


@pytest.fixture
def seal() -> Callable[..., None]:
    """Write the manifest of a spoilt tiny bundle anew: seal(folder, thresholds=, measured=)."""
    return seal_bundle


# --- the host side --------------------------------------------------------------------------

STEPS = 60  # enough for margins and gradients like those of a trained model
SEED, TOKENS = 3, 20
STARTS = [
    "The baker went to the market and",
    "Anna has three red apples.",
    "def count_items(items):",
    "Once upon a time",
    "1. Wash the",
    "The weather in Oslo",
    "Dear Clara,",
    "{",
]


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


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # One for all test modules that ask for it under this name.
    folder = tmp_path_factory.getbasetemp() / "tiny-trained"
    if not folder.exists():
        from fixtures.tiny_llama import make_tiny_llama

        make_tiny_llama(folder, steps=STEPS)
    return folder


class Made:
    """A model, its reference on STARTS, and activations and calibration captured once.

    Calibration is captured on the very sequences that are measured, with another seed of signs.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        import torch

        from edge_dtm.host.blocks.activations import Activations
        from edge_dtm.host.blocks.calibration import Calibration
        from edge_dtm.host.checkpoint.model import load_model
        from edge_dtm.host.checkpoint.open import open_checkpoint
        from edge_dtm.host.trajectory.generate import generate_reference
        from edge_dtm.host.trajectory.prompts import Prompt

        self.checkpoint = open_checkpoint(folder)
        self.model = load_model(self.checkpoint, torch.device("cpu"))
        self.components = self.checkpoint.components()
        tokenizer = self.checkpoint.tokenizer
        prompts = [Prompt(tuple(tokenizer.encode(t)), t) for t in STARTS]
        self.reference: Reference = generate_reference(
            self.model,
            prompts,
            tokens=TOKENS,
            eos_ids=tokenizer.eos_ids,
            split=np.full(len(prompts), CALIBRATION, np.uint8),
            provenance={},
            parts=work / "parts",
        )
        self.activations = Activations(work / "activations", self.reference, self.components)
        self.activations.capture(self.model, SEED)
        self.calibration = Calibration(work / "calibration", self.reference, self.components)
        self.calibration.capture(self.model, SEED + 1)

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
    "bpe": {"tokenizer": "bpe", "tied": True, "shards": 2},
    "mistral": {"arch": "mistral"},
    "bias_rope": {"attention_bias": True, "rope_scaling": "llama3"},
}


@pytest.fixture(scope="session")
def tiny_llamas(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The HF folder of a variant of TINY_LLAMAS, hardly trained; to be copied before a change."""
    from fixtures.tiny_llama import make_tiny_llama

    base = tmp_path_factory.mktemp("llamas")
    return cache(lambda name: make_tiny_llama(base / name, steps=1, layers=2, **TINY_LLAMAS[name]))
