"""Verdicts on a tiny bundle, good and spoilt."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from edge_dtm.bundle import Thresholds, pack
from edge_dtm.device.runner import Record
from edge_dtm.device.verify import Verdict, print_verdict, top_kl, verify
from edge_dtm.errors import EdgeDtmError
from edge_dtm.reference import Reference

Seal = Callable[..., None]
SCRIPT = """
import sys
import edge_dtm.device.runner, edge_dtm.device.verify
for name in ("llama_cpp", "gguf"):
    assert name not in sys.modules, name
verdict = edge_dtm.device.verify.verify(sys.argv[1], threads=1)
edge_dtm.device.verify.print_verdict(verdict)
assert verdict.passed, verdict.reasons
found = sorted({"torch", "transformers"} & {name.partition(".")[0] for name in sys.modules})
assert not found, found
"""


def printed(verdict: Verdict) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    print_verdict(verdict, console)
    return console.file.getvalue().rstrip().splitlines()


def test_pass(tiny_bundle: Path) -> None:
    stages: dict[str, tuple[int, int]] = {}
    verdict = verify(
        tiny_bundle,
        threads=1,
        progress=lambda stage, done, total: stages.update({stage: (done, total)}),
    )
    assert verdict.passed
    assert len(verdict.reasons) == 4
    assert verdict.against_original.sdt.value < 0.01
    assert verdict.against_host.sdt.value == 0
    assert verdict.kl_vs_host == pytest.approx(0, abs=1e-6)
    assert verdict.against_original.near_tie_margin == 0.01
    assert verdict.prefill_tokens_per_s > 0
    assert verdict.decode_tokens_per_s > 0
    assert verdict.settings["threads"] == 1
    assert verdict.settings["batch_tokens"] == 64, "the host's settings are taken over"
    assert {stage: done == total for stage, (done, total) in stages.items()} == {
        "check": True,
        "replay": True,
    }
    tree = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert tree["passed"] is True
    assert tree["notes"] == []
    assert tree["noise_floor"] == {"near_tie_margin": 0.01, "sdt": 0.002}
    lines = printed(verdict)
    assert any(line.startswith("PASS") for line in lines)
    assert len(lines) < 30


def test_packed_bundle_and_fewer_sequences(tiny_bundle: Path, tmp_path: Path) -> None:
    pack(tiny_bundle, tmp_path / "tiny.edge")
    verdict = verify(tmp_path / "tiny.edge", threads=1, max_sequences=2)
    assert verdict.passed
    assert (verdict.sequences, verdict.sequences_in_bundle) == (2, 6)
    assert verdict.against_original.sequences == 2
    assert "first 2 of 6" in verdict.to_json()["notes"][0]
    assert verify(tiny_bundle, threads=1, max_sequences=100).sequences == 6


def test_generate(tiny_bundle: Path) -> None:
    verdict = verify(tiny_bundle, mode="generate", threads=1, max_sdt=0.0)
    assert verdict.passed
    assert len(verdict.reasons) == 1
    assert verdict.kl_vs_host is None
    assert verdict.against_original.identical_share == 1
    tree = verdict.to_json()
    assert tree["against_original"]["sdt"] is None
    assert tree["against_original"]["fdt"]["value"] == pytest.approx(124 / 6)
    assert "not" not in tree["reasons"][0]
    assert "no SDT or KL threshold is applied" in tree["notes"][0]
    assert not any("SDT vs" in line for line in printed(verdict))


def test_overridden_thresholds_fail(tiny_bundle: Path) -> None:
    verdict = verify(tiny_bundle, threads=1, min_fdt=31.5)
    assert not verdict.passed
    assert len(verdict.reasons) == 1
    assert "FDT against the original" in verdict.reasons[0]
    assert "31.5" in verdict.reasons[0]
    assert verdict.thresholds.min_fdt == 31.5
    assert printed(verdict)[-1].startswith("FAIL")
    with pytest.raises(EdgeDtmError, match=r"max_sdt is 1\.5"):
        verify(tiny_bundle, threads=1, max_sdt=1.5)


@pytest.mark.parametrize("mode", ["teacher_forced", "generate"])
def test_other_weights_fail(
    tiny_bundle: Path, seal: Seal, make_tiny_gguf: Callable[[Path, int], None], mode: str
) -> None:
    make_tiny_gguf(tiny_bundle / "model.gguf", 1)
    with pytest.raises(EdgeDtmError, match=r"model\.gguf is changed"):
        verify(tiny_bundle, threads=1)
    seal(tiny_bundle)
    verdict = verify(tiny_bundle, mode=mode, threads=1)  # type: ignore[arg-type]
    assert not verdict.passed
    assert len(verdict.reasons) == (4 if mode == "teacher_forced" else 1)
    assert verdict.against_original.fdt.value < 5
    assert verdict.against_host.fdt.value < 5
    if mode == "teacher_forced":
        assert verdict.against_original.sdt.value > 0.5
        assert verdict.kl_vs_host is not None
        assert verdict.kl_vs_host > 0.5


def test_only_the_host_differs(tiny_bundle: Path, seal: Seal) -> None:
    """Broken kernels show against the host even where the original's tokens come out right."""
    host = Record.load(tiny_bundle / "host.npz")
    ids = host.ids.copy()
    ids[0, :8] = (ids[0, :8] + 1) % 259
    dataclasses.replace(host, ids=ids, top_logits=host.top_logits * 2).save(
        tiny_bundle / "host.npz"
    )
    seal(tiny_bundle)
    verdict = verify(tiny_bundle, threads=1)
    assert not verdict.passed
    assert [reason.split()[0] for reason in verdict.reasons] == ["SDT", "KL"]
    assert all("host" in reason for reason in verdict.reasons)
    assert verdict.against_host.divergent_tokens == 8


def test_wrong_tokenization_is_an_error(tiny_bundle: Path, seal: Seal) -> None:
    reference = Reference.load(tiny_bundle / "reference.npz")
    texts = reference.texts.copy()
    texts[[1, 3]] = "other"
    dataclasses.replace(reference, texts=texts).save(tiny_bundle / "reference.npz")
    seal(tiny_bundle)
    with pytest.raises(EdgeDtmError, match=r"from 2 of 6 prompts .*first: prompt 2, token 2"):
        verify(tiny_bundle, threads=1)
    assert verify(tiny_bundle, threads=1, max_sequences=1).passed


def test_what_does_not_belong_together_is_an_error(tiny_bundle: Path, seal: Seal) -> None:
    host = Record.load(tiny_bundle / "host.npz")
    host.rows(np.arange(5)).save(tiny_bundle / "host.npz")
    seal(tiny_bundle)
    with pytest.raises(EdgeDtmError, match="does not belong to its reference"):
        verify(tiny_bundle, threads=1)
    dataclasses.replace(host, top_ids=host.top_ids + 1000).save(tiny_bundle / "host.npz")
    seal(tiny_bundle)
    with pytest.raises(EdgeDtmError, match="outside the vocabulary"):
        verify(tiny_bundle, threads=1)


def test_a_broken_model_is_an_error(tiny_bundle: Path, seal: Seal) -> None:
    model = tiny_bundle / "model.gguf"
    model.write_bytes(model.read_bytes()[:-1000])
    seal(tiny_bundle)
    with pytest.raises(EdgeDtmError, match="truncated"):
        verify(tiny_bundle, threads=1)


def test_wrong_arguments(tiny_bundle: Path, seal: Seal) -> None:
    with pytest.raises(EdgeDtmError, match="unknown mode"):
        verify(tiny_bundle, mode="guess")  # type: ignore[arg-type]
    with pytest.raises(EdgeDtmError, match="max_sequences"):
        verify(tiny_bundle, max_sequences=0)
    seal(tiny_bundle, measured={"noise_floor": {"near_tie_margin": "small"}})
    with pytest.raises(EdgeDtmError, match="noise floor"):
        verify(tiny_bundle, threads=1)
    loose = Thresholds(max_sdt=1, min_fdt=0, max_sdt_vs_host=1, max_kl_vs_host=100)
    seal(tiny_bundle, measured={}, thresholds=loose)
    assert verify(tiny_bundle, threads=1).noise_floor == {}


def test_kl_is_that_of_the_renormalized_top(tiny_bundle: Path) -> None:
    host = Record.load(tiny_bundle / "host.npz")
    assert top_kl(host, host.top_logits + 5) == pytest.approx(0, abs=1e-6)
    flat = np.zeros_like(host.top_logits)
    total, count = 0.0, 0
    for row, length in enumerate(host.lengths):
        for p in np.exp(host.top_logits[row, :length].astype(float)):
            p = p / p.sum()
            total, count = total + float((p * np.log(p * len(p))).sum()), count + 1
    assert top_kl(host, flat) == pytest.approx(total / count)


def test_device_modules_never_import_torch(tiny_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_bundle)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout
