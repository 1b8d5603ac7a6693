"""What runs on a GPU, on fake ones of this CPU build: every tensor is where the others are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from edge_dtm.formats.plan import Treatment
from edge_dtm.formats.reference import Reference
from edge_dtm.host.blocks.sensitivity import Measured, costs_of
from edge_dtm.host.blocks.sequential_pruning import Pruned, prune_sequentially
from edge_dtm.host.blocks.text import Text
from edge_dtm.host.checkpoint import llama as llama_module
from edge_dtm.host.checkpoint.decoder import Block, Taps, run_block
from edge_dtm.host.checkpoint.llama import Llama
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.quantize.activations import KINDS, round_activations
from edge_dtm.host.quantize.hessian import DampedHessian, local_error, scaled_gradients
from edge_dtm.host.trajectory.decode import Decoding

CUDA = torch.device("cuda:0")


NUMBERS = {torch.Tensor.__bool__: True, torch.Tensor.__int__: 1, torch.Tensor.__float__: 1.0}
NUMBERS[torch.Tensor.item] = 1


class _Values(TorchFunctionMode):
    """What fake tensors on a GPU lack in a CPU build: numbers, all of them 1, indexing, copies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in NUMBERS:
            return NUMBERS[func]
        if func is torch.Tensor.numpy:
            if args[0].device.type != "cpu":
                raise RuntimeError(f"an array of a tensor on {args[0].device}")
            return np.ones(tuple(args[0].shape), str(args[0].dtype).removeprefix("torch."))
        if func is torch.Tensor.copy_:  # between any devices
            torch.broadcast_to(args[1].to("meta"), args[0].shape)
            return args[0]
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return self._indexed(*args)
        if func is torch.Tensor.copy_:
            if args[0].device != args[1].device:
                raise RuntimeError(f"{args[1].device} beside {args[0].device}")
            return args[0]
        return func(*args, **(kwargs or {}))

    def _indexed(self, x: torch.Tensor, key: Any, *value: torch.Tensor) -> torch.Tensor | None:
        """An index may be on the CPU; a mask has no padding to leave out."""
        if isinstance(key, torch.Tensor) and key.dtype == torch.bool:
            return x.flatten(0, key.ndim - 1)
        parts = key if isinstance(key, tuple) else (key,)
        indices = [t for t in parts if isinstance(t, torch.Tensor) and t.device.type != "cpu"]
        if wrong := {t.device for t in [*indices, *value]} - {x.device}:
            raise RuntimeError(f"{wrong} beside {x.device}")
        meta = tuple(t.to("meta") if isinstance(t, torch.Tensor) else t for t in parts)
        found = x.to("meta")[meta]
        if value:
            torch.broadcast_to(value[0].to("meta"), found.shape)
            return None
        return torch.empty(found.shape, dtype=x.dtype, device=x.device)


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), _Values(), torch.no_grad():
        yield


@pytest.fixture(params=[1.0, 0.0], ids=["float32 kept", "16 bits kept"])
def model(
    fake: None, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Llama:
    checkpoint: Any = open_checkpoint(tiny_gguf)
    shapes = checkpoint.shapes()
    monkeypatch.setattr(
        checkpoint, "torch_tensor", lambda name: torch.empty(shapes[name], dtype=torch.float16)
    )
    monkeypatch.setattr(llama_module, "KEPT_SHARE", request.param)
    monkeypatch.setattr(llama_module, "memory_bytes", lambda _: 10**12)
    return Llama(checkpoint, CUDA)


def _block(model: Llama, block: Block, taps: Taps | None = None) -> torch.Tensor:
    hidden = torch.empty(2, 5, block.config.hidden, device=CUDA)
    turn = model.turn(torch.arange(5, device=CUDA)[None])
    return run_block(block, hidden, turn, taps=taps)


def test_a_block(model: Llama) -> None:
    taps = Taps()
    found = [_block(model, model.block(0), taps), *taps.inputs.values(), *taps.outputs.values()]
    assert len(found) == 15 and {x.device for x in found} == {CUDA}


@pytest.mark.parametrize("name", ["attn_norm", "attn_k", "attn_output", "ffn_norm", "ffn_down"])
def test_a_tensor_on_the_cpu_is_noticed(model: Llama, name: str) -> None:
    tensors = dict(model.block(0).tensors)
    tensors[name + ".weight"] = tensors[name + ".weight"].cpu()
    with pytest.raises(RuntimeError, match="cuda"):
        _block(model, Block(model.config, tensors))


def test_decoding(model: Llama) -> None:
    decoding, vocab = Decoding(model, [[5, 6, 7], [8]], 4), model.config.vocab
    for _ in range(2):
        decoding.step(decoding.logits.argmax(-1))
    assert decoding.logits.device == CUDA and decoding.logits.shape == (2, vocab)
    assert {h.device for h in model.final_hidden([[5, 6], [7]])} == {CUDA}
    decoding._values = decoding._values.cpu()
    with pytest.raises(RuntimeError, match="cuda"):
        decoding.step(decoding.logits.argmax(-1))


def test_sequential_pruning(model: Llama, tiny_reference: Reference) -> None:
    text = Text(tiny_reference, len(tiny_reference) - 1, 0)  # one sequence: no padding
    tokens = text.tokens - text.measured_tokens

    def wanted(name: str) -> Pruned:
        rows = model.block(0).tensors[f"{name.rpartition('.')[2]}.weight"].shape[0]
        moments = torch.empty(rows, rows, device=CUDA)
        type_name = "Q8_0" if name == "blk.0.attn_k" else "F16"
        weights = torch.empty(tokens, device=CUDA)
        return Pruned(type_name, weights, lambda: DampedHessian(moments, 0.1))

    fitted: list[str] = []
    prune_sequentially(model, model, text, wanted, lambda name, _: fitted.append(name))
    assert len(fitted) == 7 * model.layers


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_of_inputs(fake: None, kind: str) -> None:
    assert round_activations(torch.empty(6, 512, device=CUDA), kind).device == CUDA


def test_costs(fake: None) -> None:
    x, g = torch.empty(6, 512, device=CUDA), torch.empty(2, 6, 32, device=CUDA)
    back, sizes = torch.empty(2, 6, 512, device=CUDA), torch.empty(6, device=CUDA)
    measured = Measured(x, g, back, sizes, np.array([0, 2, 6]), 5)
    treatments = [Treatment(t) for t in ("F16", "Q8_0", "Q4_K")]
    w = torch.empty(32, 512, device=CUDA)
    costs_of(measured, treatments, w, [w, w, w], 64)
    with pytest.raises(RuntimeError, match="cuda"):
        costs_of(measured, treatments, w, [w, w.cpu(), w], 64)


def test_hessians(fake: None) -> None:
    moments = torch.empty(512, 512, device=CUDA)
    hessian = DampedHessian(moments, 0.1)
    assert hessian.damped.shape == (512, 512) and hessian.importance.shape == (512,)
    parts = [x for pair in hessian.blocks(32) for x in pair]
    assert {x.device for x in [*parts, hessian.damped, hessian.inverse_diagonal]} == {CUDA}
    scaled = scaled_gradients(torch.empty(6, 32, device=CUDA), torch.empty(6, device=CUDA))
    local_error(torch.empty(32, 512, device=CUDA), moments, scaled)
    with pytest.raises(RuntimeError, match="cuda"):
        local_error(torch.empty(32, 512), moments, scaled)
