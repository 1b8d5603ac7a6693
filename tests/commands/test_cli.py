"""The command line: one line for every error, the exit status, and what it imports."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from conftest import BUNDLE_FILES, load_script, seal_bundle

from edge_dtm.cli import EXIT_ERROR, EXIT_USAGE, EXIT_VERIFIED_AND_FAILED, Bytes, main

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = "one apple\ntwo pears\nthree plums\nfour figs\nfive nuts\n"


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def _error(result: Result, *words: str, status: int = EXIT_ERROR, notes: bool = False) -> None:
    """One line that starts with `error:`; notes: progress may stand before it."""
    assert result.exit_code == status, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: "), result.stderr
    assert sum("error:" in line for line in lines) == 1
    assert notes or len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[-1], lines[-1]


def _usage(result: Result, *words: str) -> None:
    assert result.exit_code == EXIT_USAGE, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and all(word in last for word in words), last
    assert "Traceback" not in result.stderr


# --- help and imports -----------------------------------------------------------------------


def _commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    out = [path]
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            out += _commands(command, (*path, name))
        else:
            out.append((*path, name))
    return out


@pytest.mark.parametrize("path", _commands(main), ids=" ".join)
def test_help(path: tuple[str, ...]) -> None:
    for flag in ("--help", "-h"):
        result = _run(*path, flag)
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: ")
        assert not result.stderr


def test_version() -> None:
    from edge_dtm import __version__

    assert __version__ in _run("--version").stdout


def _imported(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_the_command_line_imports_next_to_nothing() -> None:
    heavy = {"torch", "transformers", "numpy", "rich", "gguf", "llama_cpp", "zstandard"}
    assert not heavy & _imported("import edge_dtm.cli")


def test_verify_without_torch(tiny_bundle: Path) -> None:
    code = "import sys\nfor m in ('torch', 'transformers'): sys.modules[m] = None\n"
    code += "from edge_dtm.cli import main\nmain(sys.argv[1:])"
    for arguments, status in (
        (["verify", str(tiny_bundle), "--threads", "1"], 0),
        (["compress", str(tiny_bundle / "model.gguf"), "-o", str(tiny_bundle / "new")], 1),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        if status:
            assert done.stderr.startswith("error: this command needs torch: pip install")
            assert len(done.stderr.splitlines()) == 1


# --- the device's commands ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("105000000", 105_000_000), ("105M", 105_000_000), ("4.2G", 4_200_000_000), ("64k", 64_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert Bytes().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "many", "-3", "0", "1e99", "nan", "inf", "12X", "M"])
def test_bad_sizes(text: str, tmp_path: Path) -> None:
    _usage(_run("compress", tmp_path, "-o", tmp_path / "o", "--max-bytes", text), "--max-bytes")


def test_verify_passes_and_fails(tiny_bundle: Path, tmp_path: Path) -> None:
    passed = _run("verify", tiny_bundle, "--threads", "1")
    assert passed.exit_code == 0, passed.stderr
    failed = _run(
        "verify", tiny_bundle, "--threads", "1", "--min-fdt", "1000", "--json", tmp_path / "v.json"
    )
    assert failed.exit_code == EXIT_VERIFIED_AND_FAILED
    verdict = json.loads((tmp_path / "v.json").read_text())
    assert not verdict["passed"] and "FDT" in verdict["reasons"][0]


@pytest.mark.parametrize("name", ["model.gguf", "reference.npz", "host.npz", "plan.json"])
def test_tampered_bundle(tiny_bundle: Path, name: str) -> None:
    data = bytearray((tiny_bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tiny_bundle / name).write_bytes(data)
    _error(_run("verify", tiny_bundle), name)


def test_bundles_that_are_none(tiny_bundle: Path, tmp_path: Path) -> None:
    _error(_run("verify", tmp_path / "none"), "does not exist")
    (tmp_path / "empty").mkdir()
    _error(_run("verify", tmp_path / "empty"))
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    _error(_run("verify", tmp_path / "junk"))
    _error(_run("unpack", tmp_path / "junk", "-o", tmp_path / "u"))
    _error(_run("frontier", tmp_path / "empty"), "plan.json does not exist")
    _error(_run("frontier", tiny_bundle))  # its plan is {}
    _error(_run("pack", tmp_path / "empty", "-o", tmp_path / "p.tar.zst"), notes=True)
    assert not (tmp_path / "u").exists() and not (tmp_path / "p.tar.zst").exists()


def test_truncated_model_for_the_other_commands(tiny_bundle: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((tiny_bundle / "model.gguf").read_bytes()[:-5000])
    _error(_run("inspect", cut), "truncated")
    _error(_run("measure", cut, "--reference", tiny_bundle), "truncated")
    _error(
        _run("measure", tiny_bundle / "model.gguf", "--reference", tmp_path / "no.npz"), "no.npz"
    )


def test_measure(tiny_bundle: Path, tmp_path: Path) -> None:
    """Against a bundle's folder, with its near-ties, and against a reference alone."""
    found = {}
    for reference in (tiny_bundle, tiny_bundle / "reference.npz"):
        result = _run("measure", tiny_bundle / "model.gguf", "--reference", reference,
                      "--threads", "1", "--json", tmp_path / "m.json")  # fmt: skip
        assert result.exit_code == 0, result.stderr
        # Six answers of 32, 32, 20, 1, 32 and 7 tokens.
        assert "of at most 20.7\n" in result.stdout
        found[reference] = json.loads((tmp_path / "m.json").read_text())
        assert ("near-ties (≤ 0.01)" in result.stdout) == (reference == tiny_bundle)
    whole, alone = found.values()
    assert whole["near_tie_margin"] == 0.01 and 0 <= whole["near_tie_share"] < 0.01
    assert alone["near_tie_margin"] is None and alone["near_tie_share"] is None
    assert whole["sdt"] == alone["sdt"]


def test_measure_counts_near_ties_as_the_bundle_does(
    tiny_bundle: Path, seal: Callable[..., None], make_tiny_gguf: Callable[[Path, int], None]
) -> None:
    """With weights of another model most tokens differ; at a wide margin all are near-ties."""
    other = tiny_bundle.with_name("other.gguf")
    make_tiny_gguf(other, 1)
    shares = {}
    for margin in (0.0, 1e6):
        seal(tiny_bundle, measured={"noise_floor": {"near_tie_margin": margin}})
        path = tiny_bundle.with_name("m.json")
        done = _run("measure", other, "--reference", tiny_bundle, "--threads", "1", "--json", path)
        assert done.exit_code == 0, done.stderr
        shares[margin] = json.loads(path.read_text())
    assert shares[0.0]["near_tie_share"] == 0
    assert shares[1e6]["near_tie_share"] == shares[1e6]["sdt"]["value"] > 0.5
    seal(tiny_bundle, measured={"noise_floor": {"near_tie_margin": -1}})
    _error(_run("measure", other, "--reference", tiny_bundle), "noise floor")


def test_measure_needs_held_out_sequences(tiny_bundle: Path, tmp_path: Path) -> None:
    from edge_dtm.formats.reference import CALIBRATION, Reference

    reference = Reference.load(tiny_bundle / "reference.npz")
    split = reference.split * 0 + CALIBRATION
    dataclasses.replace(reference, split=split).save(tmp_path / "r.npz")
    model = tiny_bundle / "model.gguf"
    result = _run("measure", model, "--reference", tmp_path / "r.npz", "--json", tmp_path / "m")
    _error(result, "r.npz has no held-out sequences")
    assert not (tmp_path / "m").exists()


def test_json_files_can_be_read_again(tmp_path: Path) -> None:
    from edge_dtm.commands.common import read_json, write_json

    path = tmp_path / "x.json"
    write_json(path, {"a": [math.inf, 1.5, {"b": math.nan}], "c": (-math.inf, "d", None, True)})
    assert read_json(path) == {"a": [None, 1.5, {"b": None}], "c": [None, "d", None, True]}


def _is_whole(bundle: Path) -> bool:
    from edge_dtm.formats.archive import open_bundle, pack

    with open_bundle(bundle) as opened:
        opened.check()
    packed = bundle.with_name("whole.edge")
    pack(bundle, packed)
    with open_bundle(packed) as opened:
        return not {"report.html", "frontier.png"} & {p.name for p in opened.folder.iterdir()}


def test_no_command_puts_a_strange_file_into_a_bundle(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    plan = load_script("tiny_bundle").plan().to_json() | {
        "frontier": [{"size_bytes": 10**6 * n, "sigma": 1, "sdt": 0.1 / n, "fdt": n} for n in (1, 2)],
        "predicted": {"sigma": 1, "sdt": 0.1, "fdt": 1},
    }  # fmt: skip
    (tiny_bundle / "plan.json").write_text(json.dumps(plan))
    seal_bundle(tiny_bundle)
    model = tiny_bundle / "model.gguf"
    before = model.read_bytes()
    monkeypatch.chdir(tiny_bundle)
    for words in (
        ["frontier", tiny_bundle, "--png", "drawn.png"],
        ["frontier", ".", "--png", model],
        ["report", tiny_bundle, "-o", tiny_bundle / "page.html"],
        ["verify", tiny_bundle, "--json", "v.json"],
        ["verify", tiny_bundle, "--record", "v.npz"],
        ["measure", model, "--reference", tiny_bundle, "--json", "m.json"],
        ["bench", tiny_bundle, "--json", "b.json"],
        ["inspect", tiny_bundle, "--json", "i.json"],
        ["doctor", tiny_bundle, "--json", "d.json"],
        ["pack", tiny_bundle, "-o", "small.edge"],
    ):
        _error(_run(*words), "would lie in the bundle")
    assert {p.name for p in tiny_bundle.iterdir()} == {*BUNDLE_FILES, "manifest.json"}
    assert model.read_bytes() == before
    # Under these names it may lie there, and nothing comes of it.
    for words, name in (
        (["frontier", tiny_bundle], "../tiny-bundle-frontier.png"),
        (["frontier", tiny_bundle, "--png", "frontier.png"], "frontier.png"),
        (["report", tiny_bundle], "../tiny-bundle-report.html"),
        (["report", tiny_bundle, "-o", "report.html"], "report.html"),
    ):
        result = _run(*words)
        assert result.exit_code == 0, result.stderr
        assert (tiny_bundle / name).is_file()
    assert _is_whole(tiny_bundle)


_POINT = {"size_bytes": 10**6, "sigma": 1, "sdt": 0.1, "fdt": 1}


@pytest.mark.parametrize(
    ("points", "chosen"),
    [([], _POINT), (None, _POINT), ([_POINT, None], _POINT), ([_POINT | {"sdt": None}], _POINT),
     ([_POINT | {"fdt": "x"}], _POINT), ([_POINT], None), ([_POINT], {"sdt": 0.1, "fdt": None})],
)  # fmt: skip
def test_a_plan_without_a_readable_frontier(tmp_path: Path, points: Any, chosen: Any) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"frontier": points, "predicted": chosen}))
    _error(_run("frontier", tmp_path), "holds no frontier")


def test_a_drawing_that_breaks_off_leaves_the_bundle_whole(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from edge_dtm.core import files
    from edge_dtm.report.frontier_figure import draw_frontier

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    save = pyplot.Figure.savefig
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda *a, **k: (save(*a, **k), stopped()))
    point = {"size_bytes": 10**6, "sdt": 0.1, "fdt": 1.0}
    with pytest.raises(KeyboardInterrupt):
        draw_frontier([point], 10**6, point, tiny_bundle / "frontier.png")
    monkeypatch.setattr(files.os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tiny_bundle / "report.html", b"<html>")
    monkeypatch.undo()
    assert _is_whole(tiny_bundle)


def test_inspect_and_profiles(tiny_bundle: Path, tmp_path: Path) -> None:
    result = _run("inspect", tiny_bundle, "--json", tmp_path / "i.json")
    assert result.exit_code == 0 and "F32" in result.stdout
    data = json.loads((tmp_path / "i.json").read_text())
    assert data["size_bytes"] == (tiny_bundle / "model.gguf").stat().st_size
    packed = tmp_path / "tiny.edge"
    assert _run("pack", tiny_bundle, "-o", packed).exit_code == 0
    of_packed = _run("inspect", packed, "--json", tmp_path / "p.json")
    assert of_packed.exit_code == 0 and str(packed) in of_packed.stdout
    assert json.loads((tmp_path / "p.json").read_text()) == data
    packed.write_bytes(packed.read_bytes()[:-1000])
    _error(_run("inspect", packed), "")
    assert "raspberrypi" in _run("profiles", "list").stdout
    assert "ram_bytes" in _run("profiles", "show", "raspberrypi").stdout
    _error(_run("profiles", "show", "nosuch"), "nosuch")


# --- compress -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cli_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    out: Path = load_script("make_tiny_llama").make_tiny_llama(
        tmp_path_factory.mktemp("cli") / "hf", steps=0, layers=1, shards=2
    )
    return out


@pytest.fixture
def folder(cli_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(cli_folder, tmp_path / "hf"))


@pytest.fixture
def compress(tmp_path: Path) -> Callable[..., Result]:
    """Runs compress with a small prompts file: compress(model, *options)."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)

    def run(model: Path, *options: str | Path) -> Result:
        given: list[str | Path] = ["compress", model, "--tokens", "4", "--device", "cpu"]
        for name, value in (
            ("-o", tmp_path / "out"),
            ("--prompts", tmp_path / "prompts.txt"),
            ("--max-bytes", "9M"),
        ):
            if name not in options and not (name == "--max-bytes" and "--profile" in options):
                given += [name, value]
        return _run(*given, *options)

    return run


Compress = Callable[..., Result]


def test_models_that_cannot_be_used(
    compress: Compress, folder: Path, tmp_path: Path, tiny_gguf: Path
) -> None:
    _error(compress(tmp_path / "none"), "does not exist")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:-5000])
    _error(compress(cut), "cut.gguf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    _error(compress(folder), "GPT2LMHeadModel")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model-00002-of-00002.safetensors").unlink()
    _error(compress(folder), "model-00002-of-00002.safetensors")
    assert not (tmp_path / "out").exists()


def test_nan_weights(compress: Compress, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("up_proj.weight"):
                tensors[name][0, 0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    _error(compress(folder), "blk.0.ffn_up.weight has 1 NaN", notes=True)


def test_bad_prompts(compress: Compress, cli_folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{broken\n')
    _error(compress(cli_folder, "--prompts", bad), "line 2")
    _error(compress(cli_folder, "--prompts", tmp_path / "none.txt"), "none.txt does not exist")
    _error(compress(cli_folder, "--tokens", "600"), "do not fit the context of 512")


def test_bad_options(compress: Compress, cli_folder: Path, tmp_path: Path) -> None:
    _error(compress(cli_folder, "--profile", "nosuch"), "nosuch")
    _error(compress(cli_folder, "--max-bytes", "100K"), "smallest plan takes", notes=True)
    _usage(compress(cli_folder, "--types", "Q4_0,Q9_9"), "Q9_9")
    _usage(compress(cli_folder, "--types", ","), "--types")
    _usage(compress(cli_folder, "--sparsity", "0.96"), "--sparsity")
    _usage(compress(cli_folder, "--sparsity", "0.2", "--max-sdt", "0.1"), "--sparsity")
    _usage(compress(cli_folder, "--device", "tpu"), "--device")
    _usage(compress(cli_folder, "--sparsity", "0.2", "--min-fdt", "9"), "--sparsity")
    for also in (("--sparsity", "0.2"), ("--max-sdt", "0.1"), ("--min-fdt", "9")):
        _usage(compress(cli_folder, "--max-transfer", "5M", *also), "--max-transfer")
    _usage(compress(cli_folder, "--max-transfer", "much"), "--max-transfer")
    steps = ("--sparsity-steps", "3")
    for also in ((), ("--sparsity", "0.5"), ("--recover", "9")):
        _usage(compress(cli_folder, *steps, *also), "--sparsity-steps needs", "--recover")
    _usage(compress(cli_folder, "--mask-score", "luck"), "--mask-score")
    for share in ("2", "0", "1", "-0.1", "half", "nan"):
        _usage(compress(cli_folder, "--remove", share), "--remove", "is no share")
    _usage(compress(cli_folder, "--recover", "-1"), "--recover")
    _usage(compress(cli_folder, "--preset", "paper"), "--preset")
    for preset in ("paper-int8", "paper-sparse"):
        for also in (
            ("--types", "Q8_0"),
            ("--max-sdt", "0.1"),
            ("--min-fdt", "9"),
            ("--max-transfer", "5M"),
        ):
            _usage(compress(cli_folder, "--preset", preset, *also), "--preset sets the types")
    _usage(compress(cli_folder, "--int8-share", "0.5"), "--int8-share", "paper-int8")
    _usage(compress(cli_folder, "--preset", "paper-sparse", "--int8-share", "0.5"), "--int8-share")
    _usage(compress(cli_folder, "--preset", "paper-int8", "--int8-share", "1.5"), "--int8-share")
    _usage(compress(cli_folder, "--preset", "paper-int8", "--sparsity", "0.5"), "--sparsity")
    _usage(_run("compress", cli_folder), "-o")
    _usage(_run("measure", cli_folder), "--reference")
    _usage(_run("nosuch"), "nosuch")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """The Settings that compress is called with: asked(*options)."""
    given: list[Any] = []
    monkeypatch.setattr(
        "edge_dtm.host.compress.compress", lambda settings, _: given.append(settings)
    )

    def settings(*options: str) -> Any:
        given.clear()
        result = _run("compress", tmp_path, "-o", tmp_path / "out", *options)
        assert result.exit_code == 0, (result.output, result.exception)
        return given[0]

    return settings


def test_settings_of_the_presets(asked: Callable[..., Any]) -> None:
    s = asked("--preset", "paper-int8")
    assert (s.types, s.int8_share, s.zero_share) == (("F16", "Q8_0"), 0.8, 0)
    assert (s.equalize, s.feedback, s.unlimited) == (False, False, True)
    assert (s.recover_steps, s.sparsity_steps, s.sparse) == (0, 1, False)
    s = asked("--preset", "paper-int8", "--int8-share", "0", "--max-bytes", "5M")
    assert (s.int8_share, s.unlimited, s.max_bytes) == (0, False, 5_000_000)
    s = asked("--preset", "paper-sparse")
    assert (s.types, s.int8_share, s.zero_share) == (("F16",), None, 0.75)
    assert (s.equalize, s.feedback, s.unlimited) == (True, True, True)
    assert (s.recover_steps, s.sparsity_steps, s.sparse) == (500, 4, True)
    s = asked(
        "--preset", "paper-sparse", "--sparsity", "0.6", "--recover", "7", "--sparsity-steps", "2"
    )
    assert (s.zero_share, s.recover_steps, s.sparsity_steps) == (0.6, 7, 2)


def test_settings_without_a_preset(asked: Callable[..., Any]) -> None:
    from edge_dtm.formats.plan import CANDIDATE_TYPES

    s = asked()
    assert (s.types, s.int8_share, s.zero_share, s.unlimited) == (CANDIDATE_TYPES, None, 0, False)
    assert (s.remove, s.recover_steps, s.sparsity_steps, s.max_transfer) == (None, 0, 1, None)
    assert (s.mask_score, s.in_order, s.feedback, s.equalize) == ("activation", True, True, True)
    assert asked("--remove", "auto").remove == 0
    assert asked("--remove", "0.1").remove == 0.1
    s = asked("--max-transfer", "3M", "--mask-score", "saliency", "--no-in-order")
    assert (s.max_transfer, s.mask_score, s.in_order, s.sparse) == (3e6, "saliency", False, True)
    s = asked("--sparsity", "0.9", "--sparsity-steps", "3", "--recover", "20")
    assert (s.zero_share, s.sparsity_steps, s.recover_steps) == (0.9, 3, 20)


def test_imatrix_files_that_do_not_fit(
    compress: Compress, cli_folder: Path, tmp_path: Path
) -> None:
    """Known before anything is made or measured."""
    import numpy as np

    from edge_dtm.formats.imatrix import write_imatrix
    from edge_dtm.host.checkpoint.checkpoint import open_checkpoint

    components = open_checkpoint(cli_folder).components()
    right = {c.name: np.ones(c.row_length, np.float32) for c in components}
    wrong = right | {"blk.0.ffn_down": np.ones(256, np.float32)}
    few = {n: v for n, v in right.items() if n != "blk.0.attn_q"}
    path = tmp_path / "i.gguf"
    for vectors, word in ((wrong, "blk.0.ffn_down (256 values, not 512)"), (few, "blk.0.attn_q")):
        write_imatrix(path, vectors, 512, ["a"])
        _error(compress(cli_folder, "--imatrix", path), "does not fit this model", word)
    path.write_bytes(path.read_bytes()[:200])
    _error(compress(cli_folder, "--imatrix", path), "no whole imatrix file")
    _error(compress(cli_folder, "--imatrix", tmp_path / "none"), "none does not exist")
    assert not (tmp_path / "out").exists()


def test_recipes_of_what_is_no_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    _error(_run("recipe", tmp_path / "none"), "plan.json does not exist")
    _error(_run("recipe", tiny_bundle), "not a plan")  # its plan is {}
    plan = {"schema_version": 1, "fixed_bytes": 0, "components": []}
    (tiny_bundle / "plan.json").write_text(json.dumps(plan))
    _error(_run("recipe", tiny_bundle, "-o", tmp_path / "r"), "no importance vectors")
    assert not (tmp_path / "r").exists()


def test_cuda_without_a_gpu(compress: Compress, cli_folder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _error(compress(cli_folder, "--device", "cuda"), "torch sees no GPU")


def test_foreign_files_are_left_alone(compress: Compress, cli_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    _error(compress(cli_folder, "-o", out), "thesis.txt")
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    assert (out / "thesis.txt").read_text() == "years of work"
    _error(compress(cli_folder, "-o", out / "thesis.txt"), "is a file")


def test_without_a_model_the_default_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_DTM_CACHE", str(tmp_path / "cache"))
    _error(_run("compress", "-o", tmp_path / "out"), "tools/make_smollm2.py")


def test_a_quantized_source_is_warned_about(
    compress: Compress, cli_folder: Path, tmp_path: Path
) -> None:
    from edge_dtm.formats.plan import uniform
    from edge_dtm.host.checkpoint.checkpoint import open_checkpoint
    from edge_dtm.host.export import export_gguf, fixed_bytes

    checkpoint = open_checkpoint(cli_folder)
    plan = uniform(checkpoint.components(), "Q4_0", fixed_bytes(checkpoint))
    importance: dict[str, Any] = {}
    export_gguf(checkpoint, plan, tmp_path / "q4.gguf", importance)
    result = compress(tmp_path / "q4.gguf", "--max-bytes", "100K")
    _error(result, "smallest plan", notes=True)
    assert "warning: q4.gguf is already quantized (Q4_0)" in result.stderr
