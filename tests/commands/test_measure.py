"""measure: FDT and SDT of a GGUF against a bundle or a reference alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from cli_runner import assert_error, run
from fixtures.tiny_bundle import write_gguf


def test_measure(tiny_bundle: Path, tmp_path: Path) -> None:
    """Against a bundle's folder, with its near-ties, and against a reference alone."""
    results = {}
    for reference in (tiny_bundle, tiny_bundle / "reference.npz"):
        result = run("measure", tiny_bundle / "model.gguf", "--reference", reference,
                      "--threads", "1", "--json", tmp_path / "m.json")  # fmt: skip
        assert result.exit_code == 0, result.stderr
        # Six answers of 32, 32, 20, 1, 32 and 7 tokens.
        assert "of at most 20.7\n" in result.stdout
        results[reference] = json.loads((tmp_path / "m.json").read_text())
        assert ("near-ties (≤ 0.01)" in result.stdout) == (reference == tiny_bundle)
    whole, alone = results.values()
    assert whole["near_tie_margin"] == 0.01 and 0 <= whole["near_tie_share"] < 0.01
    assert alone["near_tie_margin"] is None and alone["near_tie_share"] is None
    assert whole["sdt"] == alone["sdt"]


def test_measure_counts_near_ties_as_the_bundle_does(
    tiny_bundle: Path, seal: Callable[..., None]
) -> None:
    """With weights of another model most tokens differ; at a wide margin all are near-ties."""
    other = tiny_bundle.with_name("other.gguf")
    write_gguf(other, 1, matrix_type="F32")
    shares = {}
    for margin in (0.0, 1e6):
        seal(tiny_bundle, measured={"noise_floor": {"near_tie_margin": margin}})
        path = tiny_bundle.with_name("m.json")
        done = run("measure", other, "--reference", tiny_bundle, "--threads", "1", "--json", path)
        assert done.exit_code == 0, done.stderr
        shares[margin] = json.loads(path.read_text())
    assert shares[0.0]["near_tie_share"] == 0
    assert shares[1e6]["near_tie_share"] == shares[1e6]["sdt"]["value"] > 0.5
    seal(tiny_bundle, measured={"noise_floor": {"near_tie_margin": -1}})
    assert_error(run("measure", other, "--reference", tiny_bundle), "noise floor")


def test_measure_needs_held_out_sequences(tiny_bundle: Path, tmp_path: Path) -> None:
    from edge_dtm.formats.reference import CALIBRATION, Reference

    reference = Reference.load(tiny_bundle / "reference.npz")
    split = reference.split * 0 + CALIBRATION
    dataclasses.replace(reference, split=split).save(tmp_path / "r.npz")
    model = tiny_bundle / "model.gguf"
    result = run("measure", model, "--reference", tmp_path / "r.npz", "--json", tmp_path / "m")
    assert_error(result, "r.npz has no held-out sequences")
    assert not (tmp_path / "m").exists()
