"""Sparsity and distillation from the command line to the bundle, on a tiny trained model; and
killed runs gone on with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import gguf
import test_compress
from fixtures.killed import Moment, run_killed
from test_compress import _manifest, _plan, _run, _same, _tensors

from edge_dtm.formats.plan import Plan
from edge_dtm.host.blocks.prune import SEQUENTIAL
from edge_dtm.host.checkpoint.derived import EditedCheckpoint
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.distill.stage import DISTILLED

TOKENS, HEAD_DIM = 24, 64
LEVELS = (0.25, 0.5, 0.75, 0.9)
# Little of everything, in this process and in those that are killed.
SMALL: dict[str, Any] = {
    **test_compress.SMALL,
    "edge_dtm.host.blocks.costs.SPARSE_LEVELS": LEVELS,
    "edge_dtm.formats.plan.SPARSE_LEVELS": LEVELS,
    "edge_dtm.host.distill.teacher.BATCH_SEQUENCES": 4,
    "edge_dtm.host.distill.teacher.SAMPLED_TEXTS": 8,
    "edge_dtm.host.distill.teacher.FEWEST_TEXTS": 8,
    "edge_dtm.host.distill.teacher.SAMPLED_TOKENS": 32,
}


@pytest.fixture(scope="module", autouse=True)
def _small_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(name, value)
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        yield


class Runs:
    """Compresses the model into folders, the first of which lends its work folder to the others:
    reference, noise floor and costs without zeros do not depend on what they are asked for."""

    def __init__(self, model: Path, prompts: Path, folder: Path) -> None:
        self.model, self.prompts, self.folder = model, prompts, folder
        self.count = 0

    def arguments(self, out: Path, *options: str) -> list[str]:
        given = ["compress", str(self.model), "-o", str(out), "--prompts", str(self.prompts)]
        given += ["--tokens", str(TOKENS), "--calibration-tokens", "200", "--device", "cpu"]
        if "--types" not in options and "--preset" not in options:
            given += ["--types", "F16,Q8_0"]
        if "--max-bytes" not in options and "--preset" not in options:
            given += ["--max-bytes", "6M"]
        return [*given, *options]

    def new(self) -> Path:
        """A bundle with its work folder, to be spoilt."""
        self.count += 1
        out = self.folder / f"run-{self.count}"
        return Path(shutil.copytree(self.folder / "plain", out))


@pytest.fixture(scope="module")
def runs(
    trained_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    runs = Runs(trained_folder, prompts_file, tmp_path_factory.mktemp("sparsity"))
    _run(*runs.arguments(runs.folder / "plain"))
    return runs


SPARSE = ("--sparsity", "0.85", "--sparsity-steps", "2", "--distill", "6")


@pytest.fixture(scope="module")
def sparse(runs: Runs) -> Path:
    out = runs.new()
    text = _run(*runs.arguments(out, *SPARSE)).stderr
    # Costs of zeros were not measured before, hence all are measured again.
    assert "reference: taken from the work folder" in text
    assert "costs: taken from the work folder" not in text
    return out


def _strict(path: Path) -> Any:
    """JSON as the standard has it, without NaN."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def _values(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What the tensors of the bundle's GGUF stand for, float32, decoded by gguf-py."""
    return {
        t.name.removesuffix(".weight"): gguf.quants.dequantize(t.data, t.tensor_type)
        for t in gguf.GGUFReader(folder / "model.gguf").tensors
        if len(t.shape) > 1
    }


def _masked(plan: Plan) -> dict[str, int]:
    """Zeros that masks put into a row of each component that has some."""
    shares = {
        c.name: (c, t.zero_share) for c, t in zip(plan.components, plan.treatments, strict=True)
    }
    return {n: round(c.row_length * share) for n, (c, share) in shares.items() if share}


def _gguf_order(name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows in Hugging Face's order in that of a GGUF: halves of the rotated heads interleaved."""
    if name.split(".")[-1] not in ("attn_q", "attn_k"):
        return rows
    heads = len(rows) // HEAD_DIM
    return rows.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(rows.shape)


# --- zeros and distillation ------------------------------------------------------------------


def test_zeros_of_the_file_are_the_plans(sparse: Path) -> None:
    plan, values = _plan(sparse), _values(sparse)
    assert plan.size_bytes == (sparse / "model.gguf").stat().st_size
    assert plan.zero_share == pytest.approx(0.85, abs=1e-3)
    by_name, zeros = plan.by_name(), 0
    for name, count in _masked(plan).items():
        in_rows = (values[name] == 0).sum(1)
        assert name.startswith("blk.")
        assert (in_rows >= count).all(), name
        # Half precision loses no weight, eight bits some that are small.
        more = 0.002 if by_name[name].type == "F16" else 0.03
        assert in_rows.mean() <= count + more * values[name].shape[1], name
        zeros += int(in_rows.sum())
    total = sum(v.size for n, v in values.items() if n.startswith("blk."))
    assert zeros / total == pytest.approx(0.85, abs=0.02)
    _run("verify", "--threads", "1", sparse)


def test_zeros_of_the_first_step_stay(runs: Runs, sparse: Path) -> None:
    (file,) = (sparse / "work").glob("base-*.safetensors")
    base, values = EditedCheckpoint(open_checkpoint(runs.model), file), _values(sparse)
    zeros, total = 0, 0
    for component in base.components():
        if not component.in_block:
            continue
        weights = base.hf_tensor(component.name + ".weight")
        held = _gguf_order(component.name, weights) == 0
        assert not values[component.name][held].any(), component.name
        zeros, total = zeros + int(held.sum()), total + held.size
    assert zeros / total == pytest.approx(1 - (1 - 0.85) ** 0.5, abs=0.005)


def test_report_and_manifest_tell_it(sparse: Path) -> None:
    report = (sparse / "report.md").read_text()
    assert "\n## Zeros\n" in report and "\n## Distillation\n" in report
    for path in sparse.glob("*.json"):
        _strict(path)
    measured = _manifest(sparse)["measured"]
    assert set(measured["distillation"]) == {"at 61.3% zeros", "of the plan"}
    stage = measured["distillation"]["of the plan"]
    assert [p["step"] for p in stage["curve"]] == list(range(7)) and stage["steps"] == 6
    assert stage["curve"][0]["loss"] is None and stage["curve"][1]["loss"] > 0
    best = min(stage["curve"], key=lambda p: (p["sdt"], p["perplexity"]))
    assert stage["best_step"] == best["step"]
    before = measured["before_distillation"]
    assert before["perplexity"] > measured["perplexity"]
    assert before["sdt"]["value"] >= measured["sdt"]["value"] - 0.02
    provenance = _manifest(sparse)["provenance"]
    assert provenance["distill_steps"] == 6 and provenance["sparsity_steps"] == 2


def test_what_was_trained_is_what_is_exported(runs: Runs, sparse: Path) -> None:
    """Of the last distillation: blocks and norm gains."""
    curve = _manifest(sparse)["measured"]["distillation"]["of the plan"]["curve"]
    results = map(DISTILLED.load, (sparse / "work").glob("distilled-*"))
    (result,) = (r for r in results if r.curve == curve)
    assert result.best_step > 0
    tensors, plan = _tensors(sparse / "model.gguf"), _plan(sparse)
    assert set(result.blocks) == {c.name for c in plan.components if c.in_block}
    for name, blocks in result.blocks.items():
        assert np.array_equal(tensors[name], _gguf_order(name, blocks.numpy())), name
    gains = {
        t.name: t.data for t in gguf.GGUFReader(sparse / "model.gguf").tensors if len(t.shape) == 1
    }
    assert set(gains) == set(result.vectors)
    for name, gain in gains.items():
        assert np.array_equal(gain, result.vectors[name]), name
    name = "output_norm.weight"
    assert not np.array_equal(gains[name], open_checkpoint(runs.model).tensor(name))


def test_zeros_were_fitted_in_order(sparse: Path) -> None:
    """In both steps it was decided whether that is better; what is taken are the file's zeros."""
    folders = list((sparse / "work").glob("sequential-pruning-*"))
    assert len(folders) == 2
    for folder in folders:
        assert SEQUENTIAL.is_complete(folder)
        fitted = {path.name.rsplit(".", 2)[0] for path in folder.glob("*.npy")}
        assert SEQUENTIAL.load(folder) == bool(fitted)
        assert not fitted or fitted >= set(_masked(_plan(sparse)))


# --- the paper's int8 -----------------------------------------------------------------------


def test_a_share_of_the_components_in_int8(runs: Runs) -> None:
    out = runs.new()
    _run(*runs.arguments(out, "--preset", "paper-int8", "--int8-share", "0.5"))
    plan = _plan(out)
    treatments = plan.by_name()
    data = json.loads((out / "plan.json").read_text())
    costs = {c["name"]: c["costs"]["Q8_0"] for c in data["costs"]}
    blocks = [c.name for c in plan.components if c.in_block]
    eight = {n for n in blocks if treatments[n].type == "Q8_0"}
    assert len(eight) == round(len(blocks) / 2)
    assert max(costs[n] for n in eight) <= min(costs[n] for n in set(blocks) - eight)
    others = {treatments[c.name].type for c in plan.components if c.name not in eight}
    assert others == {"F16"}
    provenance = _manifest(out)["provenance"]
    assert provenance["error_feedback"] is False and provenance["equalization"] is False
    _run("verify", "--threads", "1", out)


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (("--sparsity", "0.5", "--types", "Q4_0,Q5_0"), "zeros are put into Q8_0 and F16 only"),
        (("--sparsity", "0.85", "--types", "Q4_0,Q8_0", "--max-bytes", "1500K"), "takes about"),
        # The highest level is 0.9, which is 230 of 256 weights: a little less.
        (("--sparsity", "0.9"), "or lower --sparsity"),
        (("--preset", "paper-int8", "--max-bytes", "2M"), "raise --max-bytes"),
    ],
)
def test_errors_before_the_long_run(runs: Runs, options: tuple[str, ...], remedy: str) -> None:
    out = runs.new()
    shutil.rmtree(out / "work")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    lines = _run(*runs.arguments(out, *options), status=1).stderr.split("\n")
    (error,) = (line for line in lines if "error" in line)
    assert error.startswith("error: ") and remedy in error
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_changed_model_has_no_recipe(runs: Runs, sparse: Path, tmp_path: Path) -> None:
    result = _run("recipe", sparse, "-o", tmp_path / "recipe", status=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "--distill changed the model" in line
    assert not (tmp_path / "recipe").exists()
    _run("recipe", runs.folder / "plain", "-o", tmp_path / "recipe")


# --- killed runs ----------------------------------------------------------------------------

# What is left by then, and when.
_MOMENTS = {
    "encoded-*/*.npy": Moment("edge_dtm.host.blocks.sequential_pruning._fit", 1),
    "sequential-pruning-*/*.npy": Moment("edge_dtm.host.blocks.sequential_pruning._fit", 5),
    "text-*.parts/000000.json": Moment("edge_dtm.host.distill.teacher._sample", 2),
    "text-*.pt": Moment("edge_dtm.host.distill.trainer.Trainer._save", 1),
    "distilled-*/state.pt": Moment("edge_dtm.host.distill.trainer.Trainer._save", 3, after=True),
    "base-*.safetensors": Moment("edge_dtm.host.blocks.prune.check_llama", 2),
}


@pytest.mark.slow
def test_a_run_killed_in_every_new_stage_ends_in_the_same_bytes(runs: Runs, sparse: Path) -> None:
    out = runs.folder / "killed"
    arguments = runs.arguments(out, *SPARSE)
    for left, moment in _MOMENTS.items():
        run_killed(arguments, SMALL, moment)
        assert list((out / "work").glob(left)), moment
        assert not (out / "manifest.json").exists()
    stages = ("Distillation of the plan: ", "Sequential pruning: ")
    text = _run(*arguments).stderr
    assert all(stage in text for stage in stages)
    _same(sparse, out)
    stories = [_manifest(f)["measured"]["distillation"] for f in (sparse, out)]
    for name in stories[0]:
        assert stories[0][name]["curve"] == stories[1][name]["curve"]
    _run("verify", "--threads", "1", out)
    again = _run(*arguments).stderr  # all is there already
    assert not any(stage in again for stage in stages)
    _same(sparse, out)
