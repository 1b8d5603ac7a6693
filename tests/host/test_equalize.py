"""Scales leave the function alone: in real arithmetic, in float32, and in llama.cpp."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Made
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_dtm.formats.plan import uniform
from edge_dtm.formats.record import RunSettings
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks import fit as module
from edge_dtm.host.blocks.block_jobs import find_site_scales
from edge_dtm.host.blocks.check import SAME_LOGITS, logit_difference, top_logits
from edge_dtm.host.blocks.edges import head_scales
from edge_dtm.host.blocks.fit import find_scales, part_of
from edge_dtm.host.blocks.statistics import Statistics
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, ModelConfig
from edge_dtm.host.checkpoint.derived import DerivedCheckpoint, EqualizedCheckpoint
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.model import load_model
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.export import export_gguf, fixed_bytes
from edge_dtm.host.quantize.activations import round_activations
from edge_dtm.host.quantize.equalize import (
    LARGEST,
    SMALLEST,
    STRENGTHS,
    Scales,
    channel_scales,
    consumers,
    output_scale,
    sites,
)
from edge_dtm.llamacpp import ggml
from edge_dtm.llamacpp.runner import LlamaRunner

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "no groups": {"num_key_value_heads": 4},
    "one group": {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True},
}


def _fill(model: Any, seed: int) -> None:
    """Weights, gains and biases that all count."""
    generator = torch.Generator().manual_seed(seed)
    for name, data in model.named_parameters():
        noise = torch.randn(data.shape, generator=generator)
        if name.endswith("norm.weight"):
            data.data = 1 + 0.3 * noise
        elif name.endswith(".bias"):
            data.data = 0.3 * noise
        else:
            data.data = noise / data.shape[1] ** 0.5


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Llamas so small that many sets of scales can be tried."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base, out = tmp_path_factory.mktemp("equalize"), {}
    for name, options in VARIANTS.items():
        shape: dict[str, Any] = {
            "vocab_size": 48,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **options}))
        _fill(model, 0)
        model.save_pretrained(base / name)
        out[name] = open_checkpoint(base / name)
        assert out[name].config.attention_bias is options.get("attention_bias", False)
    return out


def _random_scales(config: ModelConfig, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    random, out = np.random.default_rng(seed), {}
    for name in sites(config):
        shape = (config.kv_heads, config.heads // config.kv_heads, config.head_dim)
        if name.endswith("attn_output"):
            own = random.uniform(-3, 3, (shape[0], 1, shape[2])).repeat(shape[1], 1).reshape(-1)
        else:
            own = random.uniform(-3, 3, config.ffn if "down" in name else config.hidden)
        out[name] = np.exp(own).astype(np.float32)
    return out


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 48, (3, 20), generator=torch.Generator().manual_seed(1))
    return torch.as_tensor(model(input_ids=ids, use_cache=False).logits)


@pytest.fixture
def real_numbers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Checkpoint], Any]:
    """A checkpoint's model in float64 throughout, weights too."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:  # transformers' own goes by float32
        size = x.square().mean(-1, keepdim=True) + self.variance_epsilon
        return torch.as_tensor(self.weight * x / size.sqrt())

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    return lambda checkpoint: load_model(checkpoint, CPU).double()


class _Exact(DerivedCheckpoint):
    """Another checkpoint's tensors as float64, so that scaling them hardly rounds."""

    def _read(self, name: str) -> Any:
        return self.original._read(name).astype(np.float64)


def _found(made: Made) -> dict[str, np.ndarray[Any, Any]]:
    head = head_scales(made.edge_inputs, made.weights("output"), made.config)
    blocks = {s: find_site_scales(made.jobs, s) for s in sites(made.config) if s != "output"}
    return {**blocks, "output": head}


@pytest.fixture
def scales(made: Made, monkeypatch: pytest.MonkeyPatch) -> Scales:
    """Of the trained model, at full strength everywhere."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "STRENGTHS", (0.5,))
        return _found(made)


# --- the function ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("seed", range(4))
def test_any_scales_leave_the_function_alone(
    checkpoints: dict[str, Checkpoint],
    real_numbers: Callable[[Checkpoint], Any],
    name: str,
    seed: int,
) -> None:
    """Each site's alone changes some weight, so that none is a dummy."""
    exact = _Exact(checkpoints[name], None)
    scales = _random_scales(exact.config, seed)
    assert ("output" in scales) is not exact.config.tied
    expected = _logits(real_numbers(exact))
    equalized = EqualizedCheckpoint(exact, scales)
    logits = _logits(real_numbers(equalized))
    assert logits.dtype == torch.float64
    assert float((logits - expected).abs().max()) < 1e-9 * float(expected.abs().max())
    for site in scales:
        one, weight = EqualizedCheckpoint(exact, {site: scales[site]}), site + ".weight"
        assert not np.array_equal(one.hf_tensor(weight), exact.hf_tensor(weight)), site


# --- llama.cpp ------------------------------------------------------------------------------


def _replayed(checkpoint: Checkpoint, reference: Reference, path: Path, kind: str) -> Any:
    export_gguf(
        checkpoint, uniform(checkpoint.components(), kind, fixed_bytes(checkpoint)), path, {}
    )
    kv_type = "F32" if kind == "F32" else "F16"
    with LlamaRunner(path, RunSettings(threads=1, kv_type=kv_type), 128) as runner:
        return runner.teacher_forced(reference)


@pytest.mark.parametrize(("kind", "near_tie"), [("F32", 1e-3), ("F16", 0.05)])
def test_llama_cpp_says_the_same(
    made: Made, scales: Scales, tmp_path: Path, kind: str, near_tie: float
) -> None:
    # Through a pickle, as it goes to another process.
    equalized = pickle.loads(pickle.dumps(EqualizedCheckpoint(made.checkpoint, scales)))
    ref = made.reference
    original = _replayed(made.checkpoint, ref, tmp_path / "o.gguf", kind)
    ours = _replayed(equalized, ref, tmp_path / "e.gguf", kind)
    counted = np.arange(ref.generated_ids.shape[1]) < ref.generated_lengths[:, None]
    clear = counted & (ref.margins > near_tie)
    assert clear.sum() > 0.8 * counted.sum()
    assert np.array_equal(original.ids[clear], ours.ids[clear])
    assert np.array_equal(original.ids[clear], ref.generated_ids[clear])
    # And from the GGUF as a source, whose q and k rows lie otherwise.
    if kind == "F32":
        again = EqualizedCheckpoint(open_checkpoint(tmp_path / "o.gguf"), scales)
        for c in made.components:
            name = c.name + ".weight"
            assert np.array_equal(again.hf_tensor(name), equalized.hf_tensor(name)), name
            assert np.array_equal(again.tensor(name), equalized.tensor(name)), name


# --- the check before it is used ------------------------------------------------------------


class _Spoilt(DerivedCheckpoint):
    def _read(self, name: str) -> Any:
        data, (source, row, factor) = self.original.hf_tensor(name).copy(), self._change
        if name == source + ".weight":
            data[row] *= factor
        return data


@pytest.mark.parametrize(
    ("site", "source", "factor"),
    [
        ("blk.0.attn_q", "blk.0.attn_norm", 2),
        ("blk.1.attn_output", "blk.1.attn_v", 2),
        ("blk.1.ffn_down", "blk.1.ffn_up", 2),
        ("output", "output_norm", 2),
        ("output", "output_norm", np.nan),
    ],
)
def test_the_check_notices_one_wrong_row(
    made: Made, scales: Scales, site: str, source: str, factor: float
) -> None:
    model, ref = Llama(EqualizedCheckpoint(made.checkpoint, scales), CPU), made.reference
    # The reference was made with a batch's padding, hence not to the last bit.
    moved = logit_difference(top_logits(model, ref), ref, ref.top_logits)
    assert moved < SAME_LOGITS / 10
    layer, _, part = site.removeprefix("blk.").partition(".")
    squares = made.edge_inputs.head_squares
    if part:
        squares = made.statistics[int(layer)][f"squares.{part}"].numpy()
    if part == "attn_output":
        squares = squares.reshape(2, 2, 64).sum(1).reshape(-1)
    spoilt = Llama(_Spoilt(model.checkpoint, (source, int(squares.argmax()), factor)), CPU)
    assert not logit_difference(top_logits(spoilt, ref), ref, ref.top_logits) <= 2 * SAME_LOGITS


# --- scales ---------------------------------------------------------------------------------

_SQUARES = hnp.arrays(np.float64, 24, elements=st.floats(1e-6, 1e6))


@given(_SQUARES, _SQUARES, st.floats(0.01, 100), st.floats(0, 1))
def test_scales_are_the_formula(x: Any, b: Any, factor: float, strength: float) -> None:
    ours = channel_scales(x, b, strength)
    assert ours.dtype == np.float32
    free = (np.sqrt(b) / np.sqrt(x)) ** strength
    free /= np.exp(np.log(free).mean())
    assert np.allclose(ours, free.clip(SMALLEST, LARGEST), rtol=1e-5)
    if free.min() > SMALLEST and free.max() < LARGEST:
        assert np.exp(np.log(ours.astype(np.float64)).mean()) == pytest.approx(1, rel=1e-5)
    # Only ratios between channels count.
    assert np.allclose(channel_scales(x * factor, b, strength), ours, rtol=1e-5)
    assert np.allclose(channel_scales(x, b * factor, strength), ours, rtol=1e-5)
    assert (channel_scales(x, b, 0.0) == 1).all()


@given(_SQUARES, _SQUARES, hnp.arrays(np.bool_, 24), hnp.arrays(np.bool_, 24))
def test_dead_channels_are_left_alone(x: Any, b: Any, silent: Any, unheard: Any) -> None:
    x, b = np.where(silent, 0, x), np.where(unheard, 0, b)
    ours, alive = channel_scales(x, b), ~(silent | unheard)
    assert np.isfinite(ours).all() and (ours >= SMALLEST).all() and (ours <= LARGEST).all()
    assert (ours[~alive] == 1).all()
    if alive.any():
        assert np.array_equal(ours[alive], channel_scales(x[alive], b[alive]))


def test_heads_of_a_group_share_their_scales(made: Made, scales: Scales) -> None:
    config, statistics = made.config, made.statistics[1]
    assert list(scales) == sites(config) and (config.heads, config.kv_heads) == (4, 2)
    site, d = "blk.1.attn_output", config.head_dim
    x, b = (statistics[f"{k}.attn_output"].numpy() for k in ("squares", "gradient_squares"))
    both = [a[:d] + a[d : 2 * d] for a in (x, b)], [a[2 * d : 3 * d] + a[3 * d :] for a in (x, b)]
    expected = channel_scales(*(np.stack(pair) for pair in zip(*both, strict=True)))
    for head in range(4):
        own = scales[site][head * d : (head + 1) * d]
        assert np.array_equal(own, expected[head // 2])
    of_v = output_scale(scales, "blk.1.attn_v", config)
    assert of_v is not None and np.array_equal(of_v, expected.reshape(-1))


@pytest.mark.parametrize("site", ["blk.0.attn_q", "blk.2.attn_output", "blk.1.ffn_down"])
def test_the_strength_is_the_one_that_harms_least(
    made: Made, monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    """Against the harm written out, on all rows and tokens as on every fourth."""
    layer, part = int(site.split(".")[1]), site.split(".")[2]
    known = made.statistics[layer]
    x = known[f"inputs.{part}"].numpy().astype(np.float64)  # of the same sequences
    tensors = {**known.tensors, f"sample.{part}": known[f"inputs.{part}"]}
    monkeypatch.setattr(module, "ROW_STEP", 1)

    def find() -> np.ndarray[Any, Any]:
        weights = {c: made.weights(c) for c in consumers(site)}
        return find_scales(Statistics(tensors), site, made.config, weights)

    tried = []
    for strength in STRENGTHS:
        with monkeypatch.context() as patch:
            patch.setattr(module, "STRENGTHS", (strength,))
            tried.append(find())
    assert (tried[0] == 1).all() and len({s.tobytes() for s in tried}) == len(STRENGTHS)
    b2 = known[f"gradient_squares.{part}"].numpy()
    harms = []
    for s in tried:
        scaled = torch.from_numpy((x * s).astype(np.float32))
        moved = (round_activations(scaled, "q8_0") - scaled).double().numpy() / s
        inputs = (moved**2).mean(0) @ b2
        total = 0.0
        for kind in ("Q4_0", "Q5_0", "Q8_0"):
            harm = inputs
            for name in consumers(site):
                w = made.weights(name).astype(np.float64)
                importance = ((x * s) ** 2).mean(0).astype(np.float32)
                columns = (w / s).astype(np.float32)
                data = ggml.quantize(kind, columns, importance)
                error = (ggml.dequantize(kind, data, w.shape[1]) - columns) * s  # as of W itself
                each_row = (error**2) @ (x**2).mean(0)
                harm += float(known[f"output_squares.{part_of(name)}"].numpy() @ each_row)
            total += float(np.log(harm))
        harms.append(total)
    assert np.array_equal(find(), tried[int(np.argmin(harms))])
