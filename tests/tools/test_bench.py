"""The comparison scripts run on a tiny bundle and say sane things."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bench_quality as quality
import bench_quality_files as files_of
import bench_quality_text as text_of
import bench_sensitivity as sensitivity
import numpy as np
import pytest
from fixtures.tiny_llama import make_tiny_llama

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from edge_dtm.core.metrics import BOOTSTRAP_RESAMPLES
from edge_dtm.core.progress import Stages
from edge_dtm.formats.plan import Component, Plan, Treatment, uniform
from edge_dtm.formats.profile import load_profile
from edge_dtm.formats.reference import CALIBRATION, load_imatrix
from edge_dtm.host.blocks.costs import measure_costs
from edge_dtm.host.blocks.quantize import quantize
from edge_dtm.host.checkpoint.model import load_model, module_name
from edge_dtm.host.compress import compress
from edge_dtm.host.export import export_gguf
from edge_dtm.host.prepare import reopen_run
from edge_dtm.host.settings import Goal, Method, Settings, Source
from edge_dtm.host.trajectory import reference as trajectory
from edge_dtm.host.values import Base, Run
from edge_dtm.search.cost_table import CostTable

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TOKENS = 24
PROMPTS = [
    f"Write {n} lines about {what}." for n in (2, 3, 5) for what in ("rain", "bread", "a map")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its bundle with the work folder."""
    folder = tmp_path_factory.mktemp("bench")
    model, bundle, prompts = folder / "tiny", folder / "bundle", folder / "prompts.txt"
    make_tiny_llama(model, steps=40, layers=2)
    prompts.write_text("\n".join(PROMPTS) + "\n")
    settings = Settings(
        out=bundle,
        source=Source(model, prompts, TOKENS, calibration_tokens=300),
        goal=Goal(load_profile("raspberrypi"), max_bytes=2_000_000),
        method=Method(device="cpu"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectory, "SAMPLED_PROMPTS", 6)
        patch.setattr(trajectory, "PACKAGED_PROMPTS", 2)
        compress(settings, Stages())
    return model, bundle


def _reopened(made: tuple[Path, Path]) -> tuple[Run, Base, Any]:
    model, bundle = made
    settings = Settings(
        bundle, Source(model), Goal(load_profile("raspberrypi")), Method(device="cpu")
    )
    return reopen_run(settings, Stages(), threads=1)


VARIANTS = [
    "full method", "without feedback", "without equalization", "without both",
    "weight error as cost",
]  # fmt: skip


@pytest.mark.slow
def test_quality(
    made: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, bundle = made
    out, result, figure = (tmp_path / f"quality.{end}" for end in ("md", "json", "png"))
    arguments = [
        str(bundle), "--model", str(model), "--presets", "Q3_K_M,Q4_K_M,Q8_0", "--threads", "1",
        "--ablations", "Q4_K_M", "--out", str(out), "--json", str(result),
        "--figure", str(figure),
    ]  # fmt: skip
    assert quality.main(arguments) == 0
    data = json.loads(result.read_text())
    _check_sizes(data)
    _check_ablations(data)

    text = out.read_text()
    assert "python tools/bench_quality.py bundle --model tiny" in text
    assert "(quality.png)" in text
    assert "warning: only" in text
    assert text_of.SMALLEST in text
    assert str(tmp_path.parent) not in text
    assert str(tmp_path.parent) not in result.read_text()
    work = bundle / "work"
    assert not list((work / "bench").glob("*.gguf"))

    # A second run replays nothing. Another model's figures stand in the same file.
    monkeypatch.delattr(files_of, "replay")
    other = tmp_path / "other.json"
    shutil.copy(result, other)
    assert quality.main([*arguments, "--with", str(other)]) == 0
    assert out.read_text().count("## tiny") == 2
    # What llama.cpp would not make as its name says is left out, and that is said.
    real = quality.why_skipped
    monkeypatch.setattr(
        quality, "why_skipped", lambda n, c: "odd rows" if n == "Q3_K_M" else real(n, c)
    )
    assert quality.main(arguments) == 0
    assert [r["preset"] for r in json.loads(result.read_text())["presets"]] == ["Q4_K_M", "Q8_0"]
    assert "Q3_K_M was skipped: odd rows." in out.read_text()
    other.write_text(json.dumps({"schema_version": 1}))
    assert quality.main([*arguments, "--with", str(other)]) == 1
    assert "other.json" in capsys.readouterr().err


def _check_sizes(data: dict[str, Any]) -> None:
    kinds = ("plain", "imatrix", "ours")
    assert [r["preset"] for r in data["presets"]] == ["Q3_K_M", "Q4_K_M", "Q8_0"]
    every = [(r[k]["size_bytes"], r[k]["sdt"]["value"]) for r in data["presets"] for k in kinds[:2]]
    floor = data["noise_floor"]["sdt"]["value"]
    for r in data["presets"]:
        limit = min(r[k]["size_bytes"] for k in kinds[:2])
        assert all(r[k]["sequences"] == data["sequences"] for k in kinds)
        # The comparison is with the best of all files that are no larger.
        assert r["best"]["size_bytes"] <= limit
        assert r["best"]["sdt"]["value"] == min(sdt for size, sdt in every if size <= limit)
        ours, best = (r[k]["sdt"]["value"] - floor for k in ("ours", "best"))
        # A file as good as the noise floor leaves nothing to compare with.
        assert r["sdt_ratio"]["value"] == (pytest.approx(ours / best) if best > 0 else None)
        fdt = r["ours"]["fdt"]["value"] / r["best"]["fdt"]["value"]
        assert r["fdt_ratio"]["value"] == pytest.approx(fdt)
    three, four, eight = data["presets"]
    # We have no type of 3 bits, and say so.
    assert three["ours"]["smallest"] and three["ours"]["size_bytes"] > three["limit_bytes"]
    for r in (four, eight):
        assert not r["ours"]["smallest"]
        assert 0.98 * r["limit_bytes"] < r["ours"]["size_bytes"] <= r["limit_bytes"]
    # K-quants look at the imatrix, Q8_0 does not.
    assert four["plain"]["gguf_sha256"] != four["imatrix"]["gguf_sha256"]
    assert eight["plain"]["gguf_sha256"] == eight["imatrix"]["gguf_sha256"]
    assert eight["imatrix"]["sdt"]["value"] < four["plain"]["sdt"]["value"]


def _check_ablations(data: dict[str, Any]) -> None:
    four = data["presets"][1]
    name = four["best_imatrix"]
    variants = {a["variant"]: a for a in data["ablations"]}
    assert list(variants) == [*VARIANTS, f"{name} + im", f"{name} + im, equalized"]
    assert all(a["preset"] == "Q4_K_M" for a in data["ablations"])
    assert all(a["size_bytes"] <= four["limit_bytes"] for a in data["ablations"])
    full = variants["full method"]
    assert full["gguf_sha256"] == four["ours"]["gguf_sha256"]
    # On this model the full method may reach the floor, and then a ratio above it is none.
    reached = full["sdt"]["value"] == data["noise_floor"]["sdt"]["value"]
    assert full["sdt_ratio_to_full"]["value"] == (None if reached else 1)
    # Other blocks make another file; other costs with the same blocks may find the same plan.
    shas = {a["gguf_sha256"] for n, a in variants.items() if not n.endswith("as cost")}
    assert len(shas) == len(variants) - 1
    plain, equalized = (variants[f"{name} + im{end}"] for end in ("", ", equalized"))
    assert plain["tensors_of_type"] == equalized["tensors_of_type"]


@pytest.mark.slow
def test_imatrix_gives_our_bytes(made: tuple[Path, Path], tmp_path: Path) -> None:
    """llama.cpp was really given the vectors: its Q4_K matrices are then ours byte for byte."""
    import gguf

    from edge_dtm.host.quantize.treat import treat

    run, base, _ = _reopened(made)
    vectors, _ = load_imatrix(run.work.folder / f"imatrix-{run.key}.npz")
    source, preset = tmp_path / "f32.gguf", tmp_path / "preset.gguf"
    plan = uniform(base.components, "F32", base.fixed_bytes)
    export_gguf(run.checkpoint, plan, source, {}, lambda _: None)
    files_of.quantize(source, preset, "Q4_K_M", vectors, threads=1)
    tensors = gguf.GGUFReader(preset).tensors
    matrices = [t for t in tensors if t.tensor_type.name == "Q4_K"]
    assert matrices
    for t in matrices:
        name = t.name.removesuffix(".weight")
        ours = treat(run.checkpoint.tensor(t.name), Treatment("Q4_K"), vectors.get(name))
        assert np.array_equal(np.asarray(t.data).reshape(ours.shape), ours), name


@pytest.mark.slow
def test_equalized_imatrix(made: tuple[Path, Path]) -> None:
    """The transformed vectors are the mean squares that the equalized model really has."""
    run, base, reference = _reopened(made)
    new = measure_costs(run, base, reference).equalized
    part = reference.part(CALIBRATION)
    names = [c.name for c in base.components if c.in_block]

    def squares(checkpoint: Any) -> dict[str, Any]:
        model, out = load_model(checkpoint, run.device), {}
        modules = dict(model.named_modules())
        handles = [
            modules[module_name(n)].register_forward_pre_hook(
                lambda _, args, n=n: out.update({n: args[0][0].square().mean(0).numpy()})
            )
            for n in names
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([part.prompt(0) + part.generated(0)]), use_cache=False)
        for h in handles:
            h.remove()
        return out

    original, equalized = squares(run.checkpoint), squares(new)
    changed = files_of.equalized_imatrix(original, new)
    for n in names:
        # Float32 rounding through the layers.
        np.testing.assert_allclose(changed[n], equalized[n], rtol=1e-2, atol=1e-9, err_msg=n)
    assert not np.allclose(original[names[0]], equalized[names[0]], rtol=0.1)


@pytest.mark.slow
def test_sensitivity(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, bundle = made
    result = tmp_path / "sensitivity.json"
    arguments = [
        str(bundle), "--model", str(model), "--components", "7", "--types", "Q8_0,IQ4_NL,Q4_0",
        "--sequences", "4", "--json", str(result),
    ]  # fmt: skip
    assert sensitivity.main(arguments) == 0
    assert "Spearman" in capsys.readouterr().out
    data = json.loads(result.read_text())
    assert len(data["pairs"]) == 21
    assert data["base_sdt"] < 0.05
    of_all = data["agreement"][0]
    assert of_all["type"] == "all" and of_all["spearman"] > 0.7
    assert 0.3 < of_all["ratio_median"] < 3


@pytest.mark.slow
def test_direct_measurement(made: tuple[Path, Path]) -> None:
    """What ships comes in HF's order."""
    run, base, reference = _reopened(made)
    costs = measure_costs(run, base, reference)
    table = costs.table
    part = reference.part(CALIBRATION)
    direct = sensitivity.Direct(load_model(costs.equalized, run.device), part)
    exact, _ = direct.run()
    for c, treatments in zip(table.components, table.treatments, strict=True):
        if c.name not in ("blk.0.attn_q", "blk.0.attn_k"):
            continue
        weights = costs.equalized.hf_tensor(c.name + ".weight")
        eight_bits = [(c, t) for t in treatments if t.type == "Q8_0"]
        quantize(run, costs, eight_bits)
        for _, t in eight_bits:
            values = sensitivity.shipped_values(costs, c, t)
            # Within a few steps of 1/32 of the row's largest; other rows would be far off.
            assert np.abs(values - weights).max() < 0.2 * np.abs(weights).max()
            assert np.square(values - weights).mean() < 0.01 * np.square(weights).mean()
            margins, _ = direct.treated(c, values, "q8_0")
            assert 0 < np.square(margins - exact).mean() < np.square(exact).mean()
        # Nothing is left behind.
        assert np.array_equal(direct.run()[0], exact)


def test_ratio_above_floor_against_a_slow_loop() -> None:
    rng = np.random.default_rng(5)
    lengths = rng.integers(3, 13, 17)
    counted = np.arange(12)[None] < lengths[:, None]
    ours, theirs, floor = (counted & (rng.random((17, 12)) < p) for p in (0.2, 0.4, 0.05))
    draws = np.random.default_rng(0).integers(0, 17, (BOOTSTRAP_RESAMPLES, 17))

    def interval(ratio: Any) -> list[float]:
        values = sorted(ratio(list(draw)) for draw in draws)
        # The smallest value with that share of all at or below it.
        return [values[int(np.ceil(p * len(values))) - 1] for p in (0.025, 0.975)]

    def sdt_ratio(draw: list[int]) -> float:
        a, b, f = (sum(int(m[i].sum()) for i in draw) for m in (ours, theirs, floor))
        return (a - f) / (b - f) if b > f else float("inf")

    def fdt_ratio(draw: list[int]) -> float:
        def first(mask: Any, i: int) -> int:
            return next((t for t in range(lengths[i]) if mask[i, t]), int(lengths[i]))

        return sum(first(ours, i) for i in draw) / sum(first(theirs, i) for i in draw)

    everything = list(range(17))
    for ratio, slow in (
        (quality.above_floor(ours, theirs, floor), sdt_ratio),
        (quality.fdt_ratio(ours, theirs, lengths), fdt_ratio),
    ):
        assert ratio.value == pytest.approx(slow(everything))
        assert [ratio.low, ratio.high] == pytest.approx(interval(slow))
    none = quality.ratio_json(quality.above_floor(ours, floor, floor))
    assert none["value"] is None
    assert text_of.ratio_text(none) == "inf (inf to inf)"


def test_bytes_at_equal_sdt() -> None:
    """On a curve that is exponential in the size, the interpolation is exact."""
    curve = {size: 0.5 * 2 ** (-size / 100) for size in (100, 150, 300)}
    points = [*curve.items()]
    for size in (100, 120, 150, 222, 300):
        assert quality.bytes_at(points[::-1], 0.5 * 2 ** (-size / 100)) == pytest.approx(size)
    assert quality.bytes_at(points, 0.26) is None
    assert quality.bytes_at(points, 0.06) is None
    # A curve that goes up in between: the smallest size.
    assert quality.bytes_at([(1, 0.4), (2, 0.1), (3, 0.2), (4, 0.1)], 0.1) == 2


def test_presets_that_would_fall_back_are_skipped() -> None:
    whole, part = Component("blk.0.ffn_up", 8, 512), Component("blk.0.attn_q", 8, 576)
    assert files_of.why_skipped("Q3_K_M", [whole]) is None
    assert "1 of 2" in (files_of.why_skipped("Q3_K_M", [whole, part]) or "")
    assert files_of.why_skipped("Q4_K_M", [whole, part]) is None


def test_smallest_plan_is_marked() -> None:
    c = Component("blk.0.ffn_up", 4, 256)
    treatments = (Treatment("Q8_0"), Treatment("Q4_0"))
    table = CostTable((c,), (treatments,), ((0.1, 1.0),), 100)
    sizes = [100 + c.size_bytes(t) for t in treatments]
    assert files_of.best_plan(table, sizes[0]) == (Plan((c,), treatments[:1], 100), False)
    for limit, marked in ((sizes[1], False), (sizes[1] - 1, True)):
        assert files_of.best_plan(table, limit) == (Plan((c,), treatments[1:], 100), marked)


@pytest.mark.parametrize(
    ("main", "options", "offender"),
    [
        (quality.main, [], "none"),
        (quality.main, ["--presets", "Q9_9"], "Q9_9"),
        (quality.main, ["--presets", "Q4_K_M", "--ablations", "Q6_K"], "Q6_K"),
        (sensitivity.main, [], "none"),
    ],
)
def test_errors_take_one_line(
    main: Any, options: list[str], offender: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--model", str(tmp_path / "none"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and offender in error


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
