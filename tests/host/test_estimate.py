"""What a run needs is known before it, and what happens when memory runs out after all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from click.testing import CliRunner

from edge_dtm.cli import main
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.profile import load_profile
from edge_dtm.host.blocks.gather import shapes
from edge_dtm.host.checkpoint.checkpoint import ModelConfig, components_of
from edge_dtm.host.estimate import Sizes, Speed, Stage, estimate, measure_speed
from edge_dtm.host.out_of_memory import (
    is_out_of_memory,
    out_of_memory_in_words,
    with_less_at_a_time,
)
from edge_dtm.host.room import check_room, run_sizes
from edge_dtm.host.settings import Goal, Settings, Source
from edge_dtm.host.trajectory.reference import text_size

CPU = torch.device("cpu")
GIB = 2**30
SPEED = Speed(1e11, 1e10)


def _config(hidden: int, heads: int, ffn: int, layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        name="shape",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocab=32_000,
        rms_epsilon=1e-5,
        rope_theta=1e4,
        context_length=4096,
        tied=False,
    )


SEVEN, THIRTEEN = _config(4096, 32, 11_008, 32), _config(5120, 40, 13_824, 40)


def _sizes(config: ModelConfig, prompts: int = 160, tokens: int = 96) -> Sizes:
    goal = Goal(load_profile("raspberrypi"))
    source = Source(Path("model"), tokens=tokens)
    text = text_size([30] * prompts, source)
    return run_sizes(Settings(Path("out"), source, goal), config, text, 4 * 10**9, CPU)


def test_shapes_are_those_of_the_components() -> None:
    for c in components_of(SEVEN):
        if c.in_block:
            assert shapes(SEVEN)[c.name.rpartition(".")[2]] == (c.rows, c.row_length)


@pytest.mark.parametrize("config", [SEVEN, THIRTEEN])
def test_a_gpu_of_24_gb_is_enough_for_7b_and_13b(config: ModelConfig) -> None:
    stages = estimate(replace(_sizes(config), on_gpu=True, keeps_float32=False), SPEED)
    assert 4 * GIB < max(s.gpu_bytes for s in stages) < 23 * 10**9


def test_time_grows_with_parameters_text_and_types() -> None:
    def seconds(sizes: Sizes) -> dict[str, float]:
        return {s.name: s.seconds for s in estimate(sizes, SPEED)}

    base = seconds(_sizes(SEVEN))
    for other in (_sizes(THIRTEEN), _sizes(SEVEN, tokens=192), _sizes(SEVEN, prompts=320)):
        assert all(seconds(other)[name] >= base[name] for name in base)
    blocks = seconds(replace(_sizes(SEVEN), types=2))["Blocks"]
    assert blocks < base["Blocks"]
    twice = {s.name: s.seconds for s in estimate(_sizes(SEVEN), Speed(2e11, 2e10))}
    assert twice["Sweep forward"] == pytest.approx(base["Sweep forward"] / 2)


def test_the_machine_has_a_speed() -> None:
    speed = measure_speed(CPU, 0.01)
    assert 1e8 < speed.flops < 1e14 and 1e7 < speed.bytes_per_s < 1e13


def test_every_stage_without_room_is_named() -> None:
    stages = [
        Stage("Sweep", 1.0, 3e9, 0.0, 1e9),
        Stage("Blocks", 1.0, 7e9, 0.0, 9e9),
        Stage("Plan", 1.0, 1e9, 0.0, 2e9),
    ]
    check_room(stages, {"memory": 7e9, "disk": 9e9}, "out")
    with pytest.raises(EdgeDtmError) as error:
        check_room(stages, {"memory": 2e9, "disk": 8e9}, "out")
    text = str(error.value)
    for part in ("Sweep 3.0 GB of memory", "Blocks 7.0 GB of memory", "Blocks 9.0 GB of disk",
                 "2.0 GB of memory, 8.0 GB of disk free", "--workers", "out"):  # fmt: skip
        assert part in text
    assert "Plan" not in text and "GPU" not in text


def _folder(path: Path, **changes: Any) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32,
        "intermediate_size": 11_008, "vocab_size": 32_000, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def test_a_dry_run_needs_config_json_only(tmp_path: Path) -> None:
    model = _folder(tmp_path / "shape")
    arguments = ["compress", str(model), "--dry-run", "--types", "Q4_K,Q6_K", "--device", "cpu"]
    done = CliRunner().invoke(main, [*arguments, "--max-bytes", "3.9G"])
    assert "at most 3,900,000,000 bytes" in done.output
    for stage in ("Greedy reference", "Sweep forward", "Blocks", "Quantizing the plan"):
        assert stage in done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shape"]
    # Too small a budget is refused as the run would refuse it.
    done = CliRunner().invoke(main, [*arguments, "--max-bytes", "1G"])
    assert done.exit_code == 1 and "smallest plan" in done.output
    done = CliRunner().invoke(main, ["compress", str(model)])
    assert done.exit_code == 2 and "-o" in done.output


def test_a_dry_run_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_dtm.host import room

    monkeypatch.setattr(room, "free_room", lambda *_: {"memory": 1e9, "disk": 1e9})
    monkeypatch.setattr("edge_dtm.host.dry_run.free_room", room.free_room)
    model = _folder(tmp_path / "shape")
    done = CliRunner().invoke(
        main, ["compress", str(model), "--dry-run", "--max-bytes", "5G", "--device", "cpu"]
    )
    assert done.exit_code == 1
    assert "Blocks" in done.output and "of memory" in done.output and "of disk" in done.output


def test_less_at_a_time_until_it_fits() -> None:
    tried = []

    def work(amount: int) -> int:
        tried.append(amount)
        if amount > 300:
            raise torch.OutOfMemoryError("no room on the GPU")
        return amount

    assert with_less_at_a_time(work, 2048, 100) == 256
    assert tried == [2048, 1024, 512, 256]
    with pytest.raises(torch.OutOfMemoryError):
        with_less_at_a_time(work, 2048, 400)
    with pytest.raises(RuntimeError, match="shapes"):
        with_less_at_a_time(_refuse, 2048, 1)


def _refuse(_: int) -> int:
    raise RuntimeError("shapes do not fit")


def test_running_out_of_memory_takes_one_line() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    assert is_out_of_memory(real.value)
    with pytest.raises(EdgeDtmError, match="--workers") as line, out_of_memory_in_words("cuda:0"):
        raise real.value
    assert "\n" not in str(line.value) and "--device cpu" in str(line.value)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_in_words("cpu"):
        _refuse(1)
