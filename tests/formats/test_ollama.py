"""The folder for Ollama: the GGUF and a Modelfile with the parameters of greedy decoding."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_dtm.cli import main
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import modelfile
from edge_dtm.formats.profile import profiles_dir


def test_the_modelfile_is_greedy() -> None:
    lines = [line.split(" ") for line in modelfile.modelfile(1000).splitlines() if line]
    assert [words for words in lines if words[0] != "#"] == [
        ["FROM", "./model.gguf"],
        ["PARAMETER", "temperature", "0"],
        ["PARAMETER", "repeat_penalty", "1"],
        ["PARAMETER", "num_ctx", "1000"],
    ]


def test_the_context_of_a_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    assert modelfile.model_context(tiny_gguf) == 512
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(EdgeDtmError, match="junk"):
        modelfile.model_context(tmp_path / "junk")


def test_the_folder(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tiny-bundle-ollama"

    def run() -> Any:
        return CliRunner().invoke(main, ["pack", str(tiny_bundle), "--for", "ollama"])

    for expected_links in (True, False):  # again, and where no link can be made
        result = run()
        assert result.exit_code == 0, result.output
        assert "ollama create NAME" in result.stdout
        assert {p.name for p in out.iterdir()} == {"Modelfile", "model.gguf"}
        assert (out / "model.gguf").samefile(tiny_bundle / "model.gguf") is expected_links
        assert (out / "model.gguf").read_bytes() == (tiny_bundle / "model.gguf").read_bytes()
        assert (out / "Modelfile").read_text() == modelfile.modelfile(512)

        def no_link(source: Path, target: Path) -> None:
            raise OSError("another file system")

        monkeypatch.setattr(os, "link", no_link)
    assert {p.name for p in tmp_path.iterdir()} == {
        "tiny-bundle", "tiny-bundle.edge", "tiny-bundle-ollama"
    }  # fmt: skip
    (out / "notes").write_text("mine")
    result = run()
    assert result.exit_code == 1
    assert "holds other files" in result.stderr
    assert (out / "notes").read_text() == "mine"
    shutil.rmtree(out)


def test_the_context_that_was_planned_for() -> None:
    assert modelfile.planned_context({"profile": "raspberrypi4"}) == 2048
    assert modelfile.planned_context({"profile": "my-board"}) == 4096
    assert modelfile.planned_context({}) == 4096


def test_the_profile_that_a_bundle_names_is_never_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = profiles_dir() / "raspberrypi4.toml"
    shutil.copy(packaged, tmp_path / "mine.toml")
    monkeypatch.chdir(tmp_path)
    for name in ("mine.toml", "./mine.toml", str(tmp_path / "mine.toml"), str(packaged),
                 "../device_profiles/raspberrypi4.toml", ["raspberrypi4"], 4):  # fmt: skip
        assert modelfile.planned_context({"profile": name}) == 4096
