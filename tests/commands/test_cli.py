"""The command line: one line for every error, the exit status, and what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from cli_runner import assert_error, assert_usage, run
from fixtures.tiny_bundle import FILES, seal
from fixtures.tiny_bundle import plan as any_plan

from edge_dtm.cli import main
from edge_dtm.commands.common import size_bytes
from edge_dtm.commands.device import EXIT_VERIFIED_AND_FAILED

ROOT = Path(__file__).resolve().parents[2]


# --- help and imports -----------------------------------------------------------------------


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    members = command.commands.items() if isinstance(command, click.Group) else ()
    return [path, *(p for name, inner in members for p in _commands(inner, (*path, name)))]


@pytest.mark.parametrize("path", _commands(main), ids=" ".join)
def test_help(path: tuple[str, ...]) -> None:
    result = run(*path, "-h")
    assert result.exit_code == 0 and not result.stderr
    assert result.stdout.startswith("Usage: ")


def test_version() -> None:
    from edge_dtm import __version__

    assert __version__ in run("--version").stdout


def test_wrong_usage(tmp_path: Path) -> None:
    assert_usage(run("compress", tmp_path), "-o")
    assert_usage(run("measure", tmp_path), "--reference")
    assert_usage(run("nosuch"), "nosuch")


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_command_line_imports_next_to_nothing() -> None:
    heavy = {"torch", "transformers", "numpy", "rich", "gguf", "llama_cpp", "zstandard", "pydantic"}
    done = _python("import edge_dtm.cli, sys\nprint(*sys.modules)")
    assert "click" in done.stdout.split() and not heavy & set(done.stdout.split())


def test_verify_without_torch(tiny_bundle: Path) -> None:
    code = "import sys\nfor m in ('torch', 'transformers'): sys.modules[m] = None\n"
    code += "from edge_dtm.cli import main\nmain(sys.argv[1:])"
    assert _python(code, "verify", str(tiny_bundle), "--threads", "1").returncode == 0
    done = _python(code, "compress", str(tiny_bundle / "model.gguf"), "-o", "new")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: this command needs torch: pip install")


# --- the device's commands ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("105000000", 105_000_000), ("105M", 105_000_000), ("4.2G", 4_200_000_000), ("64k", 64_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "-3", "0", "1e99", "nan", "inf", "12X", "M"])
def test_bad_sizes(text: str, tmp_path: Path) -> None:
    assert_usage(
        run("compress", tmp_path, "-o", tmp_path / "o", "--max-bytes", text), "--max-bytes"
    )


def test_verify_passes_and_fails(tiny_bundle: Path, tmp_path: Path) -> None:
    passed = run("verify", tiny_bundle, "--threads", "1")
    assert passed.exit_code == 0, passed.stderr
    failed = run(
        "verify", tiny_bundle, "--threads", "1", "--min-fdt", "1000", "--json", tmp_path / "v.json"
    )
    assert failed.exit_code == EXIT_VERIFIED_AND_FAILED
    verdict = json.loads((tmp_path / "v.json").read_text())
    assert not verdict["passed"] and "FDT" in verdict["reasons"][0]


def test_bundles_that_are_none(tiny_bundle: Path, tmp_path: Path) -> None:
    assert_error(run("verify", tmp_path / "none"), "does not exist")
    (tmp_path / "empty").mkdir()
    assert_error(run("verify", tmp_path / "empty"))
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    assert_error(run("verify", tmp_path / "junk"))
    assert_error(run("unpack", tmp_path / "junk", "-o", tmp_path / "u"))
    assert_error(run("frontier", tmp_path / "empty"), "plan.json")
    assert_error(run("frontier", tiny_bundle), "holds no frontier")
    (tiny_bundle / "report.md").write_text("spoilt")
    assert_error(run("verify", tiny_bundle), "report.md")
    assert_error(run("pack", tmp_path / "empty", "-o", tmp_path / "p.tar.zst"), progress=True)
    assert not (tmp_path / "u").exists() and not (tmp_path / "p.tar.zst").exists()


def test_truncated_model_for_the_other_commands(tiny_bundle: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((tiny_bundle / "model.gguf").read_bytes()[:-5000])
    assert_error(run("inspect", cut), "truncated")
    assert_error(run("measure", cut, "--reference", tiny_bundle), "truncated")
    assert_error(
        run("measure", tiny_bundle / "model.gguf", "--reference", tmp_path / "no.npz"), "no.npz"
    )


def _is_whole(bundle: Path) -> bool:
    from edge_dtm.formats.archive import open_bundle, pack

    with open_bundle(bundle) as opened:
        opened.check()
    packed = bundle.with_name("whole.edge")
    pack(bundle, packed)
    with open_bundle(packed) as opened:
        return not {"report.html", "frontier.png"} & {p.name for p in opened.folder.iterdir()}


_POINT = {"size_bytes": 10**6, "sigma": 1, "sdt": 0.1, "fdt": 1}
_PREDICTED = {"sigma": 1, "sdt": 0.1, "fdt": 1}


def test_no_command_puts_a_strange_file_into_a_bundle(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    plan = any_plan().to_json()
    plan |= {"frontier": [_POINT, _POINT | {"size_bytes": 2 * 10**6}], "predicted": _PREDICTED}
    (tiny_bundle / "plan.json").write_text(json.dumps(plan))
    seal(tiny_bundle)
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
        assert_error(run(*words), "would lie in the bundle")
    assert {p.name for p in tiny_bundle.iterdir()} == {*FILES, "manifest.json"}
    assert model.read_bytes() == before
    # Under these names it may lie there, and nothing comes of it.
    for words, name in (
        (["frontier", tiny_bundle], "../tiny-bundle-frontier.png"),
        (["frontier", tiny_bundle, "--png", "frontier.png"], "frontier.png"),
        (["report", tiny_bundle], "../tiny-bundle-report.html"),
        (["report", tiny_bundle, "-o", "report.html"], "report.html"),
    ):
        result = run(*words)
        assert result.exit_code == 0, result.stderr
        assert (tiny_bundle / name).is_file()
    assert _is_whole(tiny_bundle)


@pytest.mark.parametrize(
    ("points", "chosen"),
    [([], _PREDICTED), (None, _PREDICTED), ([_POINT, None], _PREDICTED), ([_POINT], None),
     ([_POINT | {"sdt": None}], _PREDICTED), ([_POINT | {"fdt": "x"}], _PREDICTED),
     ([_POINT], _PREDICTED | {"fdt": None})],
)  # fmt: skip
def test_a_plan_without_a_readable_frontier(tmp_path: Path, points: Any, chosen: Any) -> None:
    plan = any_plan().to_json() | {"frontier": points, "predicted": chosen}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert_error(run("frontier", tmp_path), "plan.json", "make the bundle again")


def test_a_drawing_that_breaks_off_leaves_the_bundle_whole(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from edge_dtm.core import files
    from edge_dtm.report.frontier import FrontierPoint, draw_frontier

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    save = pyplot.Figure.savefig
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda *a, **k: (save(*a, **k), stopped()))
    point = FrontierPoint(**_POINT)
    with pytest.raises(KeyboardInterrupt):
        draw_frontier([point], 10**6, point, tiny_bundle / "frontier.png")
    monkeypatch.setattr(files.os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tiny_bundle / "report.html", b"<html>")
    monkeypatch.undo()
    assert _is_whole(tiny_bundle)


def test_inspect_and_profiles(tiny_bundle: Path, tmp_path: Path) -> None:
    result = run("inspect", tiny_bundle, "--json", tmp_path / "i.json")
    assert result.exit_code == 0 and "F32" in result.stdout
    data = json.loads((tmp_path / "i.json").read_text())
    assert data["size_bytes"] == (tiny_bundle / "model.gguf").stat().st_size
    packed = tmp_path / "tiny.edge"
    assert run("pack", tiny_bundle, "-o", packed).exit_code == 0
    of_packed = run("inspect", packed, "--json", tmp_path / "p.json")
    assert of_packed.exit_code == 0 and str(packed) in of_packed.stdout
    assert json.loads((tmp_path / "p.json").read_text()) == data
    packed.write_bytes(packed.read_bytes()[:-1000])
    assert_error(run("inspect", packed), "")
    assert "raspberrypi" in run("profiles", "list").stdout
    assert "ram_bytes" in run("profiles", "show", "raspberrypi").stdout
    assert_error(run("profiles", "show", "nosuch"), "nosuch")


def test_recipes_of_what_is_no_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    assert_error(run("recipe", tmp_path / "none"), "plan.json")
    (tiny_bundle / "plan.json").write_text("{}")
    assert_error(run("recipe", tiny_bundle), "the plan")
    plan = {"schema_version": 1, "fixed_bytes": 0, "components": []}
    (tiny_bundle / "plan.json").write_text(json.dumps(plan))
    assert_error(run("recipe", tiny_bundle, "-o", tmp_path / "r"), "no importance vectors")
    assert not (tmp_path / "r").exists()
