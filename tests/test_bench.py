"""The comparison scripts run on a tiny bundle and say sane things."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from edge_dtm.host import compress
from edge_dtm.plan import Component
from edge_dtm.profiles import load_profile
from edge_dtm.progress import Stages

TOOLS = Path(__file__).resolve().parents[1] / "tools"
TOKENS = 16
PROMPTS = [
    f"Write {n} lines about {what}." for n in (2, 3, 5) for what in ("rain", "bread", "a map")
]


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


quality = _load("bench_quality")
sensitivity = _load("bench_sensitivity")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its bundle with the work folder."""
    folder = tmp_path_factory.mktemp("bench")
    model, bundle, prompts = folder / "tiny", folder / "bundle", folder / "prompts.txt"
    _load("make_tiny_llama").make_tiny_llama(model, steps=40, layers=2)
    prompts.write_text("\n".join(PROMPTS) + "\n")
    settings = compress.Settings(
        model=model,
        out=bundle,
        profile=load_profile("raspberrypi"),
        max_bytes=2_000_000,
        prompts=prompts,
        tokens=TOKENS,
        device="cpu",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "SAMPLED_PROMPTS", 6)
        compress.compress(settings, Stages())
    return model, bundle


@pytest.mark.slow
def test_quality(
    made: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, bundle = made
    out, result = tmp_path / "quality.md", tmp_path / "quality.json"
    arguments = [
        str(bundle), "--model", str(model), "--presets", "Q4_K_M,Q8_0", "--threads", "1",
        "--out", str(out), "--json", str(result),
    ]  # fmt: skip
    assert quality.main(arguments) == 0
    printed = capsys.readouterr().out
    data = json.loads(result.read_text())
    assert [r["preset"] for r in data["presets"]] == ["Q4_K_M", "Q8_0"]
    for r in data["presets"]:
        assert r["preset"] in printed
        assert r["ours"]["size_bytes"] <= min(r[k]["size_bytes"] for k in ("plain", "imatrix"))
        assert r["ours"]["size_bytes"] > 0.98 * r["imatrix"]["size_bytes"]
        assert all(r[k]["sequences"] == data["sequences"] for k in ("plain", "imatrix", "ours"))
        assert all(0 <= r[k]["sdt"]["value"] < 0.5 for k in ("plain", "imatrix", "ours"))
    four, eight = data["presets"]
    # K-quants look at the imatrix, Q8_0 does not.
    assert four["plain"]["gguf_sha256"] != four["imatrix"]["gguf_sha256"]
    assert eight["plain"]["gguf_sha256"] == eight["imatrix"]["gguf_sha256"]
    assert eight["imatrix"]["sdt"]["value"] < four["plain"]["sdt"]["value"]
    text = out.read_text()
    assert "python tools/bench_quality.py bundle --model tiny" in text
    assert str(tmp_path.parent) not in text
    assert not list((bundle / "work" / "bench").glob("*.gguf"))

    # A second run makes and measures nothing.
    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(quality.Bench, "_quantize", never)
    monkeypatch.setattr(quality._Run, "measure", never)
    assert quality.main(arguments) == 0
    assert json.loads(result.read_text()) == data


@pytest.mark.slow
def test_imatrix_gives_our_bytes(made: tuple[Path, Path], tmp_path: Path) -> None:
    """llama.cpp was really given the vectors: its Q4_K matrices are then ours byte for byte."""
    import gguf

    from edge_dtm.host.treat import treat
    from edge_dtm.plan import Treatment

    model, bundle = made
    run, reference = quality.open_run(bundle, model, Stages(), threads=1)
    _, importance = run.costs(reference)
    work = quality.Bench(run, reference, importance)
    work._quantize("Q4_K_M", True, tmp_path / "preset.gguf")
    work.close()
    tensors = gguf.GGUFReader(tmp_path / "preset.gguf").tensors
    matrices = [t for t in tensors if t.tensor_type.name == "Q4_K"]
    assert matrices
    for t in matrices:
        name = t.name.removesuffix(".weight")
        ours = treat(run.checkpoint.tensor(t.name), Treatment("Q4_K"), importance.get(name))
        assert np.array_equal(np.asarray(t.data).reshape(ours.shape), ours), name


@pytest.mark.slow
def test_sensitivity(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, bundle = made
    result = tmp_path / "sensitivity.json"
    arguments = [
        str(bundle), "--model", str(model), "--components", "7", "--types", "Q8_0,Q4_0",
        "--sequences", "4", "--device", "cpu", "--json", str(result),
    ]  # fmt: skip
    assert sensitivity.main(arguments) == 0
    assert "Spearman" in capsys.readouterr().out
    data = json.loads(result.read_text())
    assert len(data["pairs"]) == 14
    assert data["base_sdt"] < 0.05
    for pairs in data["agreement"].values():
        assert pairs[0]["type"] == "all"
        assert pairs[0]["spearman"] > 0.7
        assert 0.3 < pairs[0]["ratio_median"] < 3
    assert data["time_ratio"] > 0
    assert not (bundle / "work" / "bench" / "activations").exists()


def test_errors_take_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main in (quality.main, sensitivity.main):
        assert main([str(tmp_path), "--model", str(tmp_path / "none")]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    assert quality.main([str(tmp_path), "--model", str(tmp_path), "--presets", "Q9_9"]) == 1
    assert "Q9_9" in capsys.readouterr().err


def test_sample_covers_kinds_and_layers() -> None:
    components = [Component("token_embd", 8, 32)] + [
        Component(f"blk.{layer}.{kind}", 8, 32)
        for layer in range(12)
        for kind in ("attn_q", "attn_k", "ffn_down")
    ]
    chosen = sensitivity.sample(components, 10, seed=1)
    assert chosen == sensitivity.sample(components, 10, seed=1)
    assert len(chosen) == len({c.name for c in chosen}) == 10
    for kind in ("attn_q", "attn_k", "ffn_down"):
        layers = [int(c.name.split(".")[1]) for c in chosen if c.name.endswith(kind)]
        assert len(layers) in (3, 4)
        assert min(layers) < 4
        assert max(layers) >= 8
    assert len(sensitivity.sample(components, 100, seed=1)) == 36


def test_spearman() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert sensitivity.spearman(a, a**3) == pytest.approx(1)
    assert sensitivity.spearman(a, -a) == pytest.approx(-1)
    assert np.array_equal(sensitivity.ranks(np.array([5.0, 1.0, 5.0])), [1.5, 0, 1.5])
    assert np.isnan(sensitivity.spearman(a, np.ones(4)))
