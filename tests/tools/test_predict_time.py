"""tools/predict_time.py: counts that can be checked by hand, and the whole command."""

from __future__ import annotations

import sys
from argparse import Namespace

import predict_time as MODULE
import pytest

from edge_dtm.formats.plan import CANDIDATE_TYPES

SHAPE = {
    "recover": 0,
    "layers": 2,
    "hidden": 256,
    "ffn": 512,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 1000,
}
NS = dict.fromkeys(CANDIDATE_TYPES, 100.0)


def test_shapes_are_llamas() -> None:
    shapes = {c.name[6:]: (c.rows, c.row_length) for c in MODULE.blocks_of(Namespace(**SHAPE))}
    assert shapes["attn_q"] == (256, 256)
    assert shapes["attn_k"] == shapes["attn_v"] == (128, 256)
    assert shapes["ffn_up"] == (512, 256)
    assert shapes["ffn_down"] == (256, 512)


@pytest.mark.parametrize("gpu", [False, True])
def test_time_follows_layers_cores_and_rate(gpu: bool) -> None:
    tokens = MODULE.Tokens()

    def seconds(gflops: float = 100.0, cores: int = 2, **changes: int) -> dict[str, float]:
        machine = MODULE.Machine(gflops, cores, 5.0, gpu, NS)
        found: dict[str, float] = MODULE.stages(Namespace(**{**SHAPE, **changes}), tokens, machine)
        return found

    once = seconds()
    assert seconds(layers=4)["Gradients"] == pytest.approx(2 * once["Gradients"])
    assert seconds(layers=4)["Sensitivity"] == pytest.approx(2 * once["Sensitivity"])
    assert seconds(gflops=200)["Gradients"] == pytest.approx(once["Gradients"] / 2)
    assert seconds(cores=4)["Gradients"] == once["Gradients"]
    assert seconds(cores=4)["Sensitivity"] < once["Sensitivity"]


def test_gradients_are_counted_as_passes() -> None:
    """A pass of T tokens through W weights takes 2 T W operations: forward, and one backward a
    draw of signs."""
    tokens = MODULE.Tokens(measured=10, fitted=20, sequence=100)
    machine = MODULE.Machine(1.0, 1, 0.0, False, NS)
    weights = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    wanted = 2 * weights * 100 * (10 * 3 + 20 * 2) / 1e9
    factor = MODULE.FACTORS["Gradients"]
    found = MODULE.stages(Namespace(**SHAPE), tokens, machine)["Gradients"]
    assert found == pytest.approx(factor * wanted)


def test_the_command_prints_every_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MODULE, "quantize_ns", lambda: NS)
    monkeypatch.setattr(sys, "argv", ["predict_time.py", "--gflops", "30000", "--gpu"])
    MODULE.main()
    out = capsys.readouterr().out
    for word in ("Greedy reference", "Gradients", "Sensitivity", "together", "ns a weight"):
        assert word in out


def test_recovery_counts_steps_and_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = MODULE.Machine(1.0, 1, 0.0, False, NS)

    def seconds(steps: int) -> float:
        shape = Namespace(**{**SHAPE, "recover": steps})
        return float(MODULE.stages(shape, MODULE.Tokens(), machine)["Recovery"])

    assert seconds(200) == pytest.approx(2 * seconds(100))
    monkeypatch.setattr(MODULE, "quantize_ns", lambda: NS)
    words = ["predict_time.py", "--gflops", "100", "--recover", "10"]
    monkeypatch.setattr(sys, "argv", words)
    MODULE.main()
    # SmolLM2: 106 million weights in the blocks at 20 and 24 bytes, 28 million in the embedding.
    out = " ".join(capsys.readouterr().out.split())
    assert "Recovery takes 2 GB, with grids other than F16 3 GB" in out
