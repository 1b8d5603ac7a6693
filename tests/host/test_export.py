"""The GGUF that is written: its size, its metadata, its weights, and what a full disk leaves."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.ggml_types import DEFAULT_TYPES, SPARSE_TYPES
from edge_dtm.formats.plan import SPARSE_LEVELS, Component, Plan, Treatment, uniform
from edge_dtm.formats.record import RunSettings
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.export import (
    KEY_FDT,
    KEY_PLAN,
    KEY_SDT,
    compare_with_plan,
    export_gguf,
    f16_plan,
    fixed_bytes,
    write_measured,
)
from edge_dtm.host.quantize.treat import treat, treated_values
from edge_dtm.llamacpp.ggml import zero_shares
from edge_dtm.llamacpp.runner import LlamaRunner

VARIANTS = ["sentencepiece", "bpe", "bias_rope"]
Importance = dict[str, np.ndarray[Any, Any] | None]


@pytest.fixture(scope="module")
def checkpoints(tiny_llamas: Callable[[str], Path]) -> dict[str, Checkpoint]:
    return {name: open_checkpoint(tiny_llamas(name)) for name in VARIANTS}


@pytest.fixture(scope="module")
def checkpoint(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints["sentencepiece"]


def _importance(checkpoint: Checkpoint) -> Importance:
    random = np.random.default_rng(0)
    return {
        c.name: random.uniform(0.1, 2, c.row_length).astype(np.float32)
        for c in checkpoint.components()
        if c.name != "token_embd"
    }


def _random_plan(checkpoint: Checkpoint) -> Plan:
    """Any allowed treatment for every component, each type at least once where there is room."""
    random = np.random.default_rng(0)
    components = checkpoint.components()
    types = [*random.permutation(DEFAULT_TYPES), *random.choice(DEFAULT_TYPES, 100)]
    treatments = []
    for c, kind in zip(components, types, strict=False):
        share = random.choice(SPARSE_LEVELS) if c.in_block and kind in SPARSE_TYPES else 0.0
        treatments.append(Treatment(str(kind), float(share)))
    return Plan(components, tuple(treatments), fixed_bytes(checkpoint))


@pytest.mark.parametrize("name", VARIANTS)
def test_any_plan_is_exported_as_it_says(
    checkpoints: dict[str, Checkpoint], name: str, tmp_path: Path
) -> None:
    checkpoint = checkpoints[name]
    plan, importance, path = _random_plan(checkpoint), _importance(checkpoint), tmp_path / "m"
    written: list[int] = []

    def blocks(component: Component, treatment: Treatment) -> np.ndarray[Any, Any]:
        weights = checkpoint.tensor(component.name + ".weight")
        return treat(weights, treatment, importance.get(component.name))

    export_gguf(checkpoint, plan, path, blocks)
    elsewhere = path.read_bytes()
    export_gguf(checkpoint, plan, path, importance, written.append)
    assert path.read_bytes() == elsewhere
    assert path.stat().st_size == plan.size_bytes
    assert sum(written) == sum(c.weights for c in plan.components)
    back = open_checkpoint(path)
    for component, treatment in zip(plan.components, plan.treatments, strict=True):
        full = component.name + ".weight"
        expected = treated_values(
            checkpoint.tensor(full), treatment, importance.get(component.name)
        )
        assert np.array_equal(back.tensor(full), expected), full
    for vector, _ in checkpoint.vectors():
        assert np.array_equal(back.tensor(vector), checkpoint.tensor(vector)), vector
    with LlamaRunner(path, RunSettings(threads=1), 32) as runner:
        assert runner.n_vocab == checkpoint.config.vocab


@pytest.mark.parametrize("name", VARIANTS)
def test_metadata(checkpoints: dict[str, Checkpoint], name: str, tmp_path: Path) -> None:
    checkpoint, path = checkpoints[name], tmp_path / "m.gguf"
    plan = f16_plan(checkpoint, fixed_bytes(checkpoint))
    export_gguf(checkpoint, plan, path, {})
    reader, config = gguf.GGUFReader(path), checkpoint.config
    expected = {
        KEY_PLAN: plan.hash,
        "general.architecture": "llama",
        "llama.block_count": config.layers,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.context_length": 512,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.vocab_size": 768,
        "tokenizer.ggml.model": "gpt2" if "bpe" in name else "llama",
    }
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert expected.items() <= values.items()
    assert math.isnan(values[KEY_SDT]) and math.isnan(values[KEY_FDT])
    assert values["edge_dtm.version"] and values["edge_dtm.gguf_py_version"]
    assert {t.name for t in reader.tensors} == set(checkpoint.shapes())


def test_measured_values_are_put_in_place(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    plan = uniform(checkpoint.components(), "Q8_0", fixed_bytes(checkpoint))
    export_gguf(checkpoint, plan, path, {})
    before = path.read_bytes()
    write_measured(path, 0.0125, 71.5)
    fields = gguf.GGUFReader(path).fields
    assert fields[KEY_SDT].contents() == np.float32(0.0125)
    assert fields[KEY_FDT].contents() == 71.5
    compare_with_plan(path, plan)
    write_measured(path, math.nan, math.nan)
    assert path.read_bytes() == before  # nothing else has changed


@pytest.mark.parametrize("kind", SPARSE_TYPES)
def test_zeros_are_those_asked_for(checkpoint: Checkpoint, kind: str, tmp_path: Path) -> None:
    dense = uniform(checkpoint.components(), kind, fixed_bytes(checkpoint))
    treatments = [
        Treatment(kind, SPARSE_LEVELS[i % len(SPARSE_LEVELS)] if c.in_block else 0.0)
        for i, c in enumerate(dense.components)
    ]
    plan = Plan(dense.components, tuple(treatments), dense.fixed_bytes)
    importance = _importance(checkpoint)
    export_gguf(checkpoint, dense, tmp_path / "dense", importance)
    export_gguf(checkpoint, plan, tmp_path / "sparse", importance)
    assert plan.size_bytes == dense.size_bytes
    dense_zeros, zeros = (zero_shares(tmp_path / name) for name in ("dense", "sparse"))
    assert max(dense_zeros.values()) < 0.05
    for c, t in zip(plan.components, plan.treatments, strict=True):
        in_mask = c.zeros(t) / c.weights
        # What the quantizer itself rounds to zero lies mostly among what is pruned anyway.
        assert in_mask <= zeros[c.name] <= in_mask + dense_zeros[c.name] + 1e-9, c.name


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.999])
def test_file_that_may_not_grow(checkpoint: Checkpoint, tmp_path: Path, share: float) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"earlier")
    plan = f16_plan(checkpoint, fixed_bytes(checkpoint))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(plan.size_bytes * share), hard))
    try:
        with pytest.raises(EdgeDtmError, match=f"could not be written .*{plan.size_bytes:,} bytes"):
            export_gguf(checkpoint, plan, path, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(EdgeDtmError, match="could not be written"):
        export_gguf(checkpoint, plan, tmp_path / "none" / "m.gguf", {})


def test_a_file_that_is_not_the_plan_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = f16_plan(checkpoint, fixed_bytes(checkpoint) + 32)
    with pytest.raises(EdgeDtmError, match="the file has"):
        export_gguf(checkpoint, plan, tmp_path / "m.gguf", {})
    assert list(tmp_path.iterdir()) == []
    export_gguf(checkpoint, f16_plan(checkpoint, plan.fixed_bytes - 32), tmp_path / "m", {})
    other = Plan(plan.components, (Treatment("Q8_0"), *plan.treatments[1:]), plan.fixed_bytes)
    with pytest.raises(EdgeDtmError, match="token_embd is .*F16.*Q8_0"):
        compare_with_plan(tmp_path / "m", other)
