"""SmolLM2-135M, whole: compress, verify, pack, and verify what was packed."""

from __future__ import annotations

import json
from pathlib import Path

import make_smollm2
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner, Result

from edge_dtm.cli import main
from edge_dtm.core.files import default_model_dir
from edge_dtm.host.trajectory import reference

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 110_000_000
LINES = [
    "The capital of France is",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "List three uses of a lemon.",
    "Why is the sky blue?",
    "Once upon a time there was",
    "The opposite of hot is",
    "A good recipe for bread starts with",
    "Dear Mr. Smith,",
    "SELECT name FROM users",
    "In 1969, humans first",
    "To boil an egg,",
]


def _run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.mark.slow
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (default_model_dir() / "config.json").is_file():
        assert make_smollm2.main([]) == 0
    for name in ("SAMPLED_PROMPTS", "PACKAGED_PROMPTS"):
        monkeypatch.setattr(reference, name, 4)
    prompts, bundle, packed = (tmp_path / n for n in ("p.txt", "bundle", "b.tar.zst"))
    prompts.write_text("\n".join(LINES) + "\n")
    options = [
        "--prompts",
        prompts,
        "--tokens",
        "16",
        "--calibration-tokens",
        "200",
        "--max-bytes",
        "110M",
        "--device",
        "cpu",
    ]
    options += ["--types", "Q8_0,Q5_0,Q4_0"]  # of each type all matrices are rounded
    _run("compress", "-o", bundle, *options)
    size = (bundle / "model.gguf").stat().st_size
    assert 0.95 * MAX_BYTES < size <= MAX_BYTES
    measured = json.loads((bundle / "manifest.json").read_text())["measured"]
    assert measured["size_bytes"] == size
    assert measured["noise_floor"]["sdt"]["value"] < 0.05
    assert measured["sdt"]["value"] < 0.3
    _run("verify", bundle, "--json", tmp_path / "folder.json")
    _run("pack", bundle, "-o", packed)
    _run("verify", packed, "--json", tmp_path / "packed.json")
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("folder", "packed"))
    assert first["passed"] and second["passed"]
    assert first["against_original"] == second["against_original"]
