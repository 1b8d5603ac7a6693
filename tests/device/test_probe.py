"""Memory and speed of a model, measured in a process that has seen nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.device import probe as module
from edge_dtm.device.probe import probe, probe_here
from edge_dtm.formats.record import RunSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where edge-dtm is not installed


def test_a_child_measures(tiny_gguf: Path, tiny_settings: RunSettings) -> None:
    found = probe(tiny_gguf, tiny_settings)
    assert found.prefill_tokens_per_s > 0 and found.decode_tokens_per_s > 0
    # Python with numpy and llama.cpp, and the model; but not this process with torch.
    assert tiny_gguf.stat().st_size < found.peak_rss_bytes < 600e6
    here = probe_here(tiny_gguf, tiny_settings)
    assert here.peak_rss_bytes > found.peak_rss_bytes


def test_its_one_line_is_json_and_it_needs_no_torch(
    tiny_gguf: Path, tiny_settings: RunSettings
) -> None:
    code = (
        "import sys, runpy\n"
        "for m in ('torch', 'transformers', 'safetensors'): sys.modules[m] = None\n"
        "runpy.run_module('edge_dtm.device.probe', run_name='__main__')\n"
        "assert not any(m.startswith('edge_dtm.host') for m in sys.modules)\n"
    )
    settings = json.dumps(tiny_settings.to_json())
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_gguf), settings],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert set(json.loads(line)) == set(asdict(module.Probed(1, 1, 1)))


@pytest.mark.parametrize("kind", ["none", "empty", "junk", "cut", "flipped"])
def test_a_broken_model_is_one_line(
    tiny_gguf: Path, tiny_settings: RunSettings, tmp_path: Path, kind: str
) -> None:
    path, data = tmp_path / "m.gguf", tiny_gguf.read_bytes()
    broken = {"empty": b"", "junk": b"junk" * 50, "cut": data[:-5000]}
    broken["flipped"] = data[:8] + b"\xff" * 8 + data[16:]
    if kind != "none":
        path.write_bytes(broken[kind])
    with pytest.raises(EdgeDtmError) as caught:
        probe(path, tiny_settings)
    text = str(caught.value)
    assert text.startswith(f"{path} could not be measured: ")
    assert "\n" not in text and "error:" not in text and "Traceback" not in text
    with pytest.raises(EdgeDtmError) as here:
        probe_here(path, tiny_settings)
    assert text.endswith(str(here.value))


@pytest.mark.parametrize(
    ("stdout", "stderr", "code", "said"),
    [
        ("", "", -9, "exit status -9"),
        ("loading\n", "warning\nKilled\n", 1, "Killed"),
        ("[1, 2]\n", "odd\n", 0, "odd"),
        ('{"peak": 3}\n', "", 0, "exit status 0"),
    ],
)
def test_a_child_that_dies(
    monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str, code: int, said: str
) -> None:
    def run(words: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(words, code, stdout, stderr)

    monkeypatch.setattr(module.subprocess, "run", run)
    with pytest.raises(EdgeDtmError, match=f"m.gguf could not be measured: {said}$"):
        probe(Path("m.gguf"), RunSettings(threads=1))


def test_words_before_the_numbers_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(asdict(module.Probed(5, 6.5, 7.5)))
    asked: list[list[str]] = []

    def run(words: list[str], **_: Any) -> Any:
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, f"llama says hello\n{line}\n", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    settings = RunSettings(threads=3, kv_type="Q8_0")
    assert probe(Path("m.gguf"), settings) == module.Probed(5, 6.5, 7.5)
    assert RunSettings(**json.loads(asked[0][-1])) == settings
