"""compress, verify, pack and unpack on a tiny trained model, and killed runs gone on with."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import gguf
from click.testing import CliRunner, Result
from fixtures import tiny_bundle
from fixtures.killed import Moment, run_killed

from edge_dtm.cli import main
from edge_dtm.core.progress import Stages
from edge_dtm.core.work import Work
from edge_dtm.formats.imatrix import read_imatrix
from edge_dtm.formats.plan import Plan
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import PACKAGED, Reference, load_imatrix, load_npz
from edge_dtm.host import export
from edge_dtm.host.blocks import costs as costs_module
from edge_dtm.host.blocks.cost_records import read_costs
from edge_dtm.host.blocks.encoded import EncodedStore
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.decoder import SITES
from edge_dtm.host.checkpoint.derived import EqualizedCheckpoint
from edge_dtm.host.checkpoint.open import open_checkpoint
from edge_dtm.host.measure import RECORD, noise_floor
from edge_dtm.host.quantize.treat import treat
from edge_dtm.host.trajectory.prompts import packaged_prompts
from edge_dtm.llamacpp.gguf_header import read_header
from edge_dtm.llamacpp.runner import LlamaRunner

TOKENS, MAX_BYTES = 24, 1_600_000
BUNDLE = {
    "manifest.json", "model.gguf", "reference.npz", "host.npz", "probe.npz", "plan.json", "report.md"
}  # fmt: skip
# Few prompts and several batches of them, in this process and in those that are killed.
SMALL: dict[str, Any] = {
    "edge_dtm.host.trajectory.reference.SAMPLED_PROMPTS": 4,
    "edge_dtm.host.trajectory.reference.PACKAGED_PROMPTS": 6,
    "edge_dtm.host.trajectory.decode.BATCH_SEQUENCES": 4,
}


@pytest.fixture(scope="module", autouse=True)
def _small_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(name, value)
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        yield


def _arguments(model: Path, prompts: Path, out: Path, *options: str) -> list[str]:
    given = ["compress", str(model), "-o", str(out), "--prompts", str(prompts)]
    given += ["--tokens", str(TOKENS), "--calibration-tokens", "200", "--device", "cpu"]
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
    found = {t.component: t.type for t in read_header(bundle / "model.gguf").tensors if t.is_matrix}
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
    assert data["measured"]["sdt"]["value"] < 0.1
    assert "# " in (bundle / "report.md").read_text()


def test_the_noise_floors_near_ties_are_those_at_its_margin(tmp_path: Path) -> None:
    """Counted by hand: eight tokens of two answers, three of them divergent."""
    reference, record = tiny_bundle.made_up()
    reference = dataclasses.replace(reference, generated_lengths=np.array([4, 4], dtype=np.int32))
    margins = np.array([[0.1, 9, 9, 0.2], [9, 9, 5, 9]], dtype=np.float32)
    top = reference.top_logits.copy()
    top[:, :, 0] = top[:, :, 1] + margins
    reference = dataclasses.replace(reference, top_logits=top)
    ids = reference.generated_ids.copy()
    for at in ((0, 0), (0, 3), (1, 2)):
        ids[at] += 1
    settings = RunSettings.from_json(record.settings)
    work = Work(tmp_path, print)
    path = work.path_of(RECORD, ["noise floor", "key", settings.to_json()])
    dataclasses.replace(record, ids=ids, lengths=reference.generated_lengths).save(path)
    run: Any = SimpleNamespace(work=work, key="key", run_settings=settings)
    floor = noise_floor(run, reference)
    # The 95th percentile of 0.1, 0.2 and 5 lies between the last two.
    assert 0.2 < floor.near_tie_margin < 5
    divergence = floor.measurement.divergence
    assert divergence.divergent_tokens == 3 and divergence.tokens == 8
    assert divergence.near_tie_share == 2 / 8
    # What was answered with other settings is not taken.
    run.run_settings = dataclasses.replace(settings, batch_tokens=32)
    run.checkpoint = None
    with pytest.raises(AttributeError):
        noise_floor(run, reference)


def test_an_f16_gguf_is_its_own_noise_floor(
    bundle: Path, trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is exported for it, the file is not; the answers are equal to the last bit."""
    (path,) = (bundle / "work").glob("reference-*.npz")
    reference = Reference.load(path)
    model = open_checkpoint(trained_folder)
    plan = export.f16_plan(model, export.fixed_bytes(model))
    export.export_gguf(model, plan, tmp_path / "original.gguf", {})

    def floor(key: str, checkpoint: Checkpoint) -> Record:
        run: Any = SimpleNamespace(
            work=Work(tmp_path, print),
            key=key,
            run_settings=tiny_bundle.SETTINGS,
            checkpoint=checkpoint,
            stages=Stages(),
        )
        return noise_floor(run, reference).measurement.record

    exported = floor("folder", model)
    gguf_file = open_checkpoint(tmp_path / "original.gguf")
    monkeypatch.setattr(export, "export_gguf", None)
    itself = floor("file", gguf_file)
    for name in ("ids", "top_ids", "top_logits", "log_normalizers"):
        assert np.array_equal(getattr(exported, name), getattr(itself, name)), name
    with pytest.raises(TypeError):
        floor("other", model)


def test_weights_changed_between_two_runs(
    measured: Path, trained_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """Where the fingerprint does not look: the hash is compared before the bundle is written."""
    folder = Path(shutil.copytree(trained_folder, tmp_path / "model" / trained_folder.name))
    _run(*_arguments(folder, prompts_file, measured))
    stored = open_checkpoint(folder).stored["blk.0.ffn_up.weight"]
    with stored.file.open("r+b") as file:
        file.seek(stored.offset + 3000)
        file.write(b"\1\2")
    before = (measured / "manifest.json").read_bytes()
    result = _run(*_arguments(folder, prompts_file, measured), status=1)
    assert "reference: taken from the work folder" in result.stderr
    assert "--no-resume" in result.stderr.splitlines()[-1]
    assert (measured / "manifest.json").read_bytes() == before


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
    output = _run("inspect", bundle).output
    assert all(c.name.split(".")[-1] in output for c in _plan(bundle).components)
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
    assert "reference: taken from the work folder" in text
    assert "costs: taken from the work folder" in text
    _same(bundle, tmp_path / "b")


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


# --- error feedback, equalization, importance -----------------------------------------------


def _shipped(folder: Path, checkpoint: Checkpoint) -> EncodedStore:
    (only,) = (folder / "work").glob("encoded-*")
    return EncodedStore(only, checkpoint)


def _equalized(folder: Path, model: Path) -> Checkpoint:
    checkpoint = open_checkpoint(model)
    (blocks,) = (folder / "work").glob("blocks-*")
    scales = load_npz(blocks / "fit-head.npz", ["output"], "fit")[0]
    for layer in range(checkpoint.config.layers):
        names = [f"blk.{layer}.{site}" for site in SITES]
        scales |= load_npz(blocks / f"fit-{layer:03d}.npz", names, "fit")[0]
    return EqualizedCheckpoint(checkpoint, scales)


def _tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Raw blocks as gguf-py reads them, uint8 (rows, row_bytes)."""
    return {
        t.name.removesuffix(".weight"): t.data.view(np.uint8).reshape(t.shape[-1], -1)
        for t in gguf.GGUFReader(path).tensors
        if len(t.shape) > 1
    }


def _costs(folder: Path) -> dict[str, dict[str, float]]:
    plan = json.loads((folder / "plan.json").read_text())
    return {c["name"]: c["costs"] for c in plan["costs"]}


def test_the_file_holds_what_was_quantized(bundle: Path, trained_folder: Path) -> None:
    """Every matrix once, in the plan's type and, where that costs less, with error feedback."""
    plan, tensors = _plan(bundle), _tensors(bundle / "model.gguf")
    checkpoint = _equalized(bundle, trained_folder)
    shipped = _shipped(bundle, checkpoint)
    (results,) = (bundle / "work").glob("costs-*.jsonl")
    known = read_costs(results)
    assert set(tensors) == set(known) == set(plan.by_name())
    fitted = 0
    for component, treatment in zip(plan.components, plan.treatments, strict=True):
        name = component.name
        assert np.array_equal(tensors[name], shipped.encoded(component, treatment)), name
        weights = checkpoint.tensor(name + ".weight")
        plain = np.array_equal(tensors[name], treat(weights, treatment, shipped.importance(name)))
        choices = list(_costs(bundle)[name])
        assert plain is not known[name]["feedback"][choices.index(treatment.type)], name
        fitted += not plain
    assert fitted > 0.7 * len(plan.components)
    files = [p for p in shipped.folder.iterdir() if "importance" not in p.name]
    assert len(files) == len(plan.components)


def test_stages_leave_their_files(bundle: Path) -> None:
    left = {p.name.split("-")[0] for p in (bundle / "work").iterdir()}
    assert left == {"reference", "blocks", "imatrix", "costs", "encoded", "record", "model.json"}  # fmt: skip
    provenance = _manifest(bundle)["provenance"]
    assert provenance["error_feedback"] is True and provenance["equalization"] is True
    assert provenance["imatrix"] == "our own"


def test_norms_are_the_equalized_ones(bundle: Path, trained_folder: Path) -> None:
    equalized, back = _equalized(bundle, trained_folder), open_checkpoint(bundle / "model.gguf")
    changed = 0
    for name, _ in equalized.vectors():
        assert np.array_equal(back.tensor(name), equalized.tensor(name)), name
        changed += not np.array_equal(
            back.tensor(name), open_checkpoint(trained_folder).tensor(name)
        )
    assert changed


def test_packaged_prompts_are_measured_too(bundle: Path, trained_folder: Path) -> None:
    """Against a replay of our own of the packaged part of the reference."""
    (path,) = (bundle / "work").glob("reference-*.npz")
    reference = Reference.load(path)
    part = reference.part(PACKAGED)
    assert len(part) == 6
    packaged = {p.ids for p in packaged_prompts(open_checkpoint(trained_folder).tokenizer)}
    for row in range(len(part)):
        assert tuple(part.prompt(row)) in packaged
    others = reference.rows(reference.split != PACKAGED)
    mine = {tuple(others.prompt(row)) for row in range(len(others))}
    assert not mine & {tuple(part.prompt(row)) for row in range(len(part))}
    with LlamaRunner(bundle / "model.gguf", tiny_bundle.SETTINGS, 512) as runner:
        record = runner.teacher_forced(part)
    lengths = part.generated_lengths
    wrong = np.arange(TOKENS) < lengths[:, None]
    wrong &= record.ids != part.generated_ids
    found = _manifest(bundle)["measured"]["packaged_prompts"]
    # Batches of another size may turn a near-tie.
    assert found["sdt"]["value"] == pytest.approx(wrong.sum() / lengths.sum(), abs=0.02)
    assert "packaged" in (bundle / "report.md").read_text()


def test_plain_rounding(
    measured: Path, bundle: Path, trained_folder: Path, prompts_file: Path
) -> None:
    shutil.rmtree(next((measured / "work").glob("encoded-*")))
    options = ("--no-feedback", "--no-equalize")
    text = _run(*_arguments(trained_folder, prompts_file, measured, *options)).stderr
    assert "reference: taken from the work folder" in text
    assert "costs: taken from the work folder" not in text
    provenance = _manifest(measured)["provenance"]
    assert provenance["error_feedback"] is False and provenance["equalization"] is False
    checkpoint, plan = open_checkpoint(trained_folder), _plan(measured)
    shipped, tensors = _shipped(measured, checkpoint), _tensors(measured / "model.gguf")
    for component, treatment in zip(plan.components, plan.treatments, strict=True):
        importance = shipped.importance(component.name)
        assert (importance is None) == (component.name == "token_embd")
        weights = checkpoint.tensor(component.name + ".weight")
        assert np.array_equal(tensors[component.name], treat(weights, treatment, importance))
    back = open_checkpoint(measured / "model.gguf")
    for name, _ in checkpoint.vectors():
        assert np.array_equal(back.tensor(name), checkpoint.tensor(name))
    _run("verify", "--threads", "1", measured)
    # What the two are for.
    plain, ours = (sum(c["Q4_0"] for c in _costs(f).values()) for f in (measured, bundle))
    assert ours < plain


def test_recipe_and_imatrix(
    measured: Path, trained_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """The recipe's files hold plan and vectors, and another run takes the vectors."""
    output = _run("recipe", measured, "-o", tmp_path / "recipe").output
    matrix, types = tmp_path / "recipe" / "imatrix.gguf", tmp_path / "recipe" / "tensor-types.txt"
    assert str(matrix) in output and "llama-quantize" in output
    plan, vectors = _plan(measured), read_imatrix(matrix)
    own, tokens = load_imatrix(next((measured / "work").glob("imatrix-*.npz")))
    assert tokens > 100
    assert set(vectors) == set(own) == set(plan.by_name()) - {"token_embd"}
    for name, vector in own.items():
        assert np.array_equal(vectors[name], vector), name
    lines = types.read_text().splitlines()
    assert all(any(c.name.split(".")[-1] in line for line in lines) for c in plan.components)
    shutil.rmtree(next((measured / "work").glob("encoded-*")))
    options = ("--imatrix", str(matrix), "--no-feedback", "--no-equalize", "--types", "Q4_0,Q8_0")
    _run(*_arguments(trained_folder, prompts_file, measured, *options))
    assert _manifest(measured)["provenance"]["imatrix"] == "imatrix.gguf"
    checkpoint, plan = open_checkpoint(trained_folder), _plan(measured)
    tensors = _tensors(measured / "model.gguf")
    for component, treatment in zip(plan.components, plan.treatments, strict=True):
        weights = checkpoint.tensor(component.name + ".weight")
        expected = treat(weights, treatment, vectors.get(component.name))
        assert np.array_equal(tensors[component.name], expected), component.name


@pytest.mark.parametrize("lost", ["encoded-*", "blocks-*", "blocks-*/hidden-*", "blocks-*/fit*"])
def test_lost_files_are_made_again(
    measured: Path, bundle: Path, trained_folder: Path, prompts_file: Path, lost: str
) -> None:
    found = list((measured / "work").glob(lost))
    assert found
    for path in [*found, *(measured / "work").glob("encoded-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    _run(*_arguments(trained_folder, prompts_file, measured))
    _same(bundle, measured)


@pytest.mark.parametrize(
    "name", ["encoded-*/blk*.npy", "blocks-*/fit-001.npz", "blocks-*/fitted-*"]
)
def test_spoilt_files_are_one_line(
    measured: Path, trained_folder: Path, prompts_file: Path, name: str
) -> None:
    found = list((measured / "work").glob(name))
    for path in found:
        path.write_bytes(path.read_bytes()[:-100])
    if not name.startswith("encoded"):
        shutil.rmtree(next((measured / "work").glob("encoded-*")))
    before = (measured / "manifest.json").read_bytes()
    result = _run(*_arguments(trained_folder, prompts_file, measured), status=1)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and any(p.name in last for p in found), last
    assert "--no-resume" in last
    assert (measured / "manifest.json").read_bytes() == before
    assert not (measured / "work" / "model.gguf.tmp").exists()


def test_a_target_out_of_reach_is_one_line(
    measured: Path, trained_folder: Path, prompts_file: Path
) -> None:
    before = (measured / "manifest.json").read_bytes()
    options = ("--max-bytes", "1250K", "--max-sdt", "0.000001")
    result = _run(*_arguments(trained_folder, prompts_file, measured, *options), status=1)
    lines = result.stderr.splitlines()
    assert sum("error:" in line for line in lines) == 1
    last = lines[-1]
    assert last.startswith("error: no plan within 1,250,000 bytes has an SDT of at most 0.00%")
    assert "noise floor" in last and "F16" in last and "--max-sdt" in last
    assert (measured / "manifest.json").read_bytes() == before


# --- killed runs ----------------------------------------------------------------------------

# Which call of what a run is killed at, and what it leaves of the work that goes on there.
BLOCKS = "edge_dtm.host.blocks."
_MOMENTS = {
    "reference-*.parts/000000.npz": Moment("edge_dtm.host.trajectory.generate._decode", 2),
    "blocks-*/hidden-000.npy": Moment(BLOCKS + "sweeps._forward", 1),
    "blocks-*/hidden-001.npy": Moment(BLOCKS + "sweeps._forward", 2),
    "blocks-*/hidden-003.npy": Moment(BLOCKS + "gather.start_back", 1),
    "blocks-*/gradient-003.npy": Moment(BLOCKS + "gather.keep", 1),
    "blocks-*/fitted-002.safetensors": Moment(BLOCKS + "costs._save_fit", 1),
    "blocks-*/fit-002.npz": Moment(BLOCKS + "sensitivity.Measured.of", 4),
    "blocks-*/gradient-001.npy": Moment(BLOCKS + "costs._save_fit", 2),
    "blocks-*/gradient-000.npy": Moment(BLOCKS + "costs._measure_edges", 1),
    "blocks-*/fit-head.npz": Moment(BLOCKS + "costs.edge_costs", 2),
    "costs-*.jsonl": Moment(BLOCKS + "costs.check_equalized", 1),
    "encoded-*/token_embd.*.npy": Moment(BLOCKS + "encoded.EncodedStore.save", 23),
    "model.gguf": Moment("edge_dtm.host.measure.tokenization_mismatches", 1),
    "plan.json": Moment("edge_dtm.formats.bundle.write_manifest", 1),
}


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
    for left, moment in _MOMENTS.items():
        run_killed(arguments, SMALL, moment)
        folder = out if left == "plan.json" else out / "work"
        assert len(list(folder.glob(left))) == 1, moment
        assert not (out / "manifest.json").exists()
    assert (out / "model.gguf").exists() and (out / "report.md").exists()
    measured: list[str] = []
    monkeypatch.setattr(costs_module, "_measure", lambda *_: measured.append("again"))
    text = _run(*arguments).stderr
    assert measured == []
    assert "reference: taken from the work folder" in text
    assert "costs: taken from the work folder" in text
    _same(bundle, out)
    one, two = (next((f / "work").glob("encoded-*")) for f in (bundle, out))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for path in one.glob("*.npy"):
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    (one,), (two,) = (list((f / "work").glob("blocks-*")) for f in (bundle, out))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    _run("verify", "--threads", "1", out)
