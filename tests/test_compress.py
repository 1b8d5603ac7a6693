"""compress, verify, pack and unpack on a tiny trained model, and killed runs gone on with."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner, Result

from edge_dtm.cli import main
from edge_dtm.host import compress as module
from edge_dtm.host import generate, sensitivity
from edge_dtm.inspect import describe
from edge_dtm.plan import Plan
from edge_dtm.reference import Reference

ROOT = Path(__file__).resolve().parents[1]
STEPS, TOKENS, MAX_BYTES = 60, 24, 1_600_000
BUNDLE = {"manifest.json", "model.gguf", "reference.npz", "host.npz", "plan.json", "report.md"}
LINES = [
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
    path.write_text("\n".join(LINES) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def _small_runs() -> Iterator[None]:
    """Few prompts, several batches of them, and one thread, as _PROGRAM has it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAMPLED_PROMPTS", 4)
        patch.setattr(generate, "BATCH_SEQUENCES", 4)
        patch.setattr(os, "cpu_count", lambda: 1)
        yield


def _arguments(model: Path, prompts: Path, out: Path, *options: str) -> list[str]:
    given = ["compress", str(model), "-o", str(out), "--prompts", str(prompts)]
    given += ["--tokens", str(TOKENS), "--device", "cpu"]
    if "--max-bytes" not in options:
        given += ["--max-bytes", str(MAX_BYTES)]
    return [*given, *options]


def _run(*arguments: str | Path, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.stderr
    return result


@pytest.fixture(scope="module")
def bundle(
    trained_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("compress") / "bundle"
    _run(*_arguments(trained_folder, prompts_file, out))
    return out


@pytest.fixture
def measured(bundle: Path, tmp_path: Path) -> Path:
    """A folder whose work folder holds the measurements, which no budget or target changes."""
    return Path(shutil.copytree(bundle, tmp_path / "measured"))


def _manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def _plan(folder: Path) -> Plan:
    return Plan.from_json(json.loads((folder / "plan.json").read_text()))


def _same(first: Path, second: Path) -> None:
    for name in ("plan.json", "model.gguf"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_bundle_is_what_its_plan_says(bundle: Path) -> None:
    assert {p.name for p in bundle.iterdir()} - {"work", "frontier.png"} == BUNDLE
    plan, size = _plan(bundle), (bundle / "model.gguf").stat().st_size
    assert plan.size_bytes == size <= MAX_BYTES
    assert size > 0.9 * MAX_BYTES  # and uses what it may
    types = {t.type for t in plan.treatments}
    assert any(t.endswith("_K") for t in types), types
    assert not plan.zero_share
    found = {t.component: t.type for t in describe(bundle / "model.gguf") if t.is_matrix}
    assert found == {name: t.type for name, t in plan.by_name().items()}
    assert json.loads((bundle / "plan.json").read_text())["sha256"] == plan.hash


def test_held_out_sequences_are_in_the_bundle(bundle: Path, trained_folder: Path) -> None:
    reference = Reference.load(bundle / "reference.npz")
    assert 9 <= len(reference) <= 11  # two thirds of 12 of the file and up to 4 sampled
    assert (reference.split == 1).all()
    assert reference.generated_ids.shape[1] == TOKENS
    data = _manifest(bundle)
    assert data["provenance"]["model"] == trained_folder.name
    assert data["provenance"]["held_out_sequences"] == len(reference)
    assert data["measured"]["noise_floor"]["type"] == "F16"
    assert 0 <= data["measured"]["sdt"]["value"] <= 0.5
    assert "# " in (bundle / "report.md").read_text()


def test_verify_passes(bundle: Path, tmp_path: Path) -> None:
    _run("verify", "--threads", "1", bundle, "--json", tmp_path / "v.json")
    verdict = json.loads((tmp_path / "v.json").read_text())
    assert verdict["passed"]
    measured = _manifest(bundle)["measured"]
    # The same machine and settings: the very numbers of the host.
    assert verdict["against_original"]["sdt"]["value"] == pytest.approx(measured["sdt"]["value"])
    assert verdict["kl_vs_host_nats"] < 1e-6


def test_generating_for_real_diverges_where_the_replay_does(bundle: Path, tmp_path: Path) -> None:
    for mode in ("teacher-forced", "generate"):
        # A token in a near-tie can put the real text past the threshold by itself.
        _run(
            "verify",
            "--threads",
            "1",
            bundle,
            "--mode",
            mode,
            "--min-fdt",
            "0",
            "--json",
            tmp_path / mode,
        )
    forced, generated = (
        json.loads((tmp_path / mode).read_text())["against_original"]["fdt"]["value"]
        for mode in ("teacher-forced", "generate")
    )
    assert abs(forced - generated) < 2


def test_packed_bundle(bundle: Path, tmp_path: Path) -> None:
    packed = tmp_path / "b.tar.zst"
    _run("pack", bundle, "-o", packed)
    _run("verify", "--threads", "1", packed)
    _run("unpack", packed, "-o", tmp_path / "again")
    assert {p.name for p in (tmp_path / "again").iterdir()} == BUNDLE
    for name in BUNDLE:
        assert (tmp_path / "again" / name).read_bytes() == (bundle / name).read_bytes()


def test_other_commands_read_it(bundle: Path, tmp_path: Path) -> None:
    _run("frontier", bundle, "--png", tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert "blk.0" in _run("inspect", bundle).output or "attn_q" in _run("inspect", bundle).output
    _run("measure", bundle / "model.gguf", "--reference", bundle, "--json", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["sdt"]["value"] == pytest.approx(_manifest(bundle)["measured"]["sdt"]["value"])


@pytest.mark.slow
def test_two_runs_make_the_same_bytes(
    bundle: Path, trained_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    _run(*_arguments(trained_folder, prompts_file, tmp_path / "b"))
    _same(bundle, tmp_path / "b")
    # Again in the same folder: everything is there already.
    text = _run(*_arguments(trained_folder, prompts_file, tmp_path / "b")).stderr
    assert "Greedy reference: taken from the work folder" in text
    assert "Sensitivity: taken from the work folder" in text
    _same(bundle, tmp_path / "b")


def test_sparsity_is_the_average_asked_for(
    measured: Path, trained_folder: Path, prompts_file: Path
) -> None:
    options = ("--sparsity", "0.25", "--max-bytes", "6M")
    text = _run(*_arguments(trained_folder, prompts_file, measured, *options)).stderr
    assert "Sensitivity: taken from the work folder" in text
    plan = _plan(measured)
    assert plan.zero_share == pytest.approx(0.25, abs=1e-3)
    masked = {name for name, t in plan.by_name().items() if t.zero_share}
    tensors = {t.component: t for t in describe(measured / "model.gguf")}
    zeros = sum((tensors[n].zero_share or 0) * np.prod(tensors[n].shape) for n in masked)
    total = sum(c.weights for c in plan.components if c.in_block)
    assert zeros / total == pytest.approx(0.25, abs=0.005)
    assert all(n.startswith("blk.") for n in masked)
    assert _manifest(measured)["measured"]["zero_share"] == pytest.approx(plan.zero_share)
    _run("verify", "--threads", "1", measured)


def test_target_makes_a_smaller_file_that_meets_it(
    measured: Path, trained_folder: Path, prompts_file: Path
) -> None:
    large = ("--max-bytes", "20M")
    _run(*_arguments(trained_folder, prompts_file, measured, *large))
    unlimited = (measured / "model.gguf").stat().st_size
    _run(*_arguments(trained_folder, prompts_file, measured, *large, "--max-sdt", "0.05"))
    data = _manifest(measured)
    assert data["measured"]["sdt"]["value"] <= 0.05
    assert data["thresholds"]["max_sdt"] == 0.05
    assert (measured / "model.gguf").stat().st_size < 0.7 * unlimited
    _run("verify", "--threads", "1", measured)


# Each moment kills the process itself, as `kill -9` would, right after or within a piece of work.
_MOMENTS = {
    "reference": "patch(generate, '_decode', 2)",
    "gradients": "patch(sensitivity._Capture, 'run', 2)",
    "costs": "patch(sensitivity, 'component_costs', 6)",
    "plan exported": "patch(compress, 'tokenization_mismatches', 1)",
    "bundle half moved": "patch(compress.bundle, 'write_manifest', 1)",
}
_PROGRAM = """
import os, signal, sys
from edge_dtm.cli import main
from edge_dtm.host import compress, generate, sensitivity

def patch(owner, name, call):
    real, count = getattr(owner, name), 0
    def replaced(*args, **options):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    setattr(owner, name, replaced)

os.cpu_count = lambda: 1
compress.SAMPLED_PROMPTS = 4
generate.BATCH_SEQUENCES = 4
{patch}
main(sys.argv[1:])
"""


def _killed(moment: str, arguments: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(patch=_MOMENTS[moment]), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, (moment, done.stderr)


@pytest.mark.slow
def test_a_run_killed_at_every_stage_ends_in_the_same_bytes(
    bundle: Path,
    trained_folder: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "killed"
    arguments = _arguments(trained_folder, prompts_file, out)
    left = {
        "reference": "reference-*.parts/000000.npz",
        "gradients": "activations-*/state.json",
        "costs": "costs-*.jsonl",
        "plan exported": "model.gguf",
    }
    for moment in _MOMENTS:
        _killed(moment, arguments)
        if moment in left:
            assert len(list((out / "work").glob(left[moment]))) == 1, moment
        if moment == "costs":
            (costs,) = (out / "work").glob("costs-*.jsonl")
            assert len(costs.read_text().splitlines()) == 7  # embedding, head, five of the blocks
        assert not (out / "manifest.json").exists()
    assert (out / "model.gguf").exists() and (out / "report.md").exists()
    measured: list[str] = []
    real = sensitivity.component_costs
    monkeypatch.setattr(
        sensitivity,
        "component_costs",
        lambda activations, component, *rest: (
            measured.append(component.name) or real(activations, component, *rest)
        ),
    )
    text = _run(*arguments).stderr
    assert measured == []
    assert "Greedy reference: taken from the work folder" in text
    assert "Sensitivity: taken from the work folder" in text
    _same(bundle, out)
    _run("verify", "--threads", "1", out)
