"""Verdicts on a tiny bundle, good and spoilt."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.tiny_bundle import THRESHOLDS, write_gguf
from rich.console import Console

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.files import Advance, StageProgress, no_progress
from edge_dtm.device.verify import Limits, Options, _notes
from edge_dtm.device.verify import verify as verify_with
from edge_dtm.formats.archive import pack
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import Reference
from edge_dtm.formats.verdict import Verdict
from edge_dtm.report.verdict_table import print_verdict

Seal = Callable[..., None]


def verify(path: Path, progress: StageProgress = no_progress, **options: Any) -> Verdict:
    return verify_with(path, Options(**options), progress)[0]


def printed(verdict: Verdict) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    print_verdict(verdict, console)
    return console.file.getvalue().rstrip().splitlines()


def test_pass(tiny_bundle: Path) -> None:
    left: dict[str, int] = {}

    def progress(stage: str, total: int) -> Advance:
        left[stage] = total
        return lambda amount: left.update({stage: left[stage] - amount})

    verdict = verify(tiny_bundle, threads=1, progress=progress)
    assert verdict.passed
    assert len(verdict.reasons) == 6
    assert verdict.diagnosis.code == "healthy"
    assert verdict.evidence.against_original.sdt.value < 0.01
    assert verdict.evidence.against_host.sdt.value == 0
    assert verdict.evidence.host is not None
    assert verdict.evidence.host.kl_vs_host_nats == pytest.approx(0, abs=1e-6)
    assert verdict.evidence.kl_probe_nats == pytest.approx(0, abs=1e-6)
    assert {k.type for k in verdict.evidence.kernels} == {"F32"}
    assert verdict.bundle["key_id"] is None
    assert verdict.evidence.against_original.near_tie_margin == 0.01
    assert verdict.performance["prefill_tokens_per_s"] > 0
    assert verdict.performance["decode_tokens_per_s"] > 0
    assert verdict.settings["threads"] == 1
    assert verdict.settings["batch_tokens"] == 64, "the host's settings are taken over"
    assert left == {"check": 0, "replay": 0}
    tree = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert tree["passed"] is True
    assert tree["notes"] == []
    assert tree["noise_floor"] == {"near_tie_margin": 0.01, "sdt": 0.002}
    lines = printed(verdict)
    assert any(line.startswith("PASS") for line in lines)
    assert len(lines) < 36


def test_packed_bundle_and_fewer_sequences(tiny_bundle: Path, tmp_path: Path) -> None:
    pack(tiny_bundle, tmp_path / "tiny.edge")
    verdict = verify(tmp_path / "tiny.edge", threads=1, max_sequences=2)
    assert verdict.passed
    assert (verdict.sequences, verdict.sequences_in_bundle) == (2, 6)
    assert verdict.evidence.against_original.sequences == 2
    assert "first 2 of 6" in verdict.notes[0]
    assert verify(tiny_bundle, threads=1, max_sequences=100).sequences == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "FDT and SDT"),
        ({"max_sdt": 0.2}, "FDT"),
        ({"min_fdt": 2.0}, "SDT"),
        ({"max_sdt": 0.2, "min_fdt": 2.0}, "none"),
        ({"mode": "generate"}, "FDT"),
        ({"mode": "generate", "min_fdt": 2.0}, "none"),
    ],
    ids=str,
)
def test_the_note_says_which_threshold_moved(options: dict[str, Any], words: str) -> None:
    asked = dataclasses.replace(THRESHOLDS, max_sdt=0.2, min_fdt=2.0)
    moved = {"max_sdt": 0.3, "min_fdt": 1.0}
    applied = dataclasses.replace(asked, **(moved | {k: options[k] for k in moved if k in options}))
    note = _notes(Options(**options), 2, 6, Limits(asked, applied, True))[-1]
    assert "first 2 of 6 sequences" in note and note.endswith(f": {words}")


def test_a_threshold_that_the_host_misses_does_not_move(tiny_bundle: Path, seal: Seal) -> None:
    seal(tiny_bundle, thresholds=dataclasses.replace(THRESHOLDS, min_fdt=31.5))
    verdict = verify(tiny_bundle, threads=1, max_sequences=2, kernels="skip")
    assert verdict.thresholds.min_fdt == 31.5
    assert verdict.notes[-1].endswith(": SDT")


def test_generate(tiny_bundle: Path) -> None:
    verdict = verify(tiny_bundle, mode="generate", threads=1, max_sdt=0.0)
    assert verdict.passed
    assert len(verdict.reasons) == 3  # FDT, the small F16 model, the kernels
    assert verdict.evidence.host is None
    assert verdict.evidence.against_original.identical_share == 1
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
    with pytest.raises(EdgeDtmError, match=r"max_sdt: is 1\.5"):
        verify(tiny_bundle, threads=1, max_sdt=1.5)


@pytest.mark.parametrize("mode", ["teacher_forced", "generate"])
def test_other_weights_fail(tiny_bundle: Path, seal: Seal, mode: str) -> None:
    write_gguf(tiny_bundle / "model.gguf", 1, matrix_type="F32")
    with pytest.raises(EdgeDtmError, match=r"model\.gguf is changed"):
        verify(tiny_bundle, threads=1)
    seal(tiny_bundle)
    verdict = verify(tiny_bundle, mode=mode, threads=1)  # type: ignore[arg-type]
    assert not verdict.passed
    assert len(verdict.reasons) == (4 if mode == "teacher_forced" else 1)
    assert verdict.diagnosis.code == ("broken_kernels" if mode == "teacher_forced" else "bad_plan")
    assert verdict.evidence.against_original.fdt.value < 5
    assert verdict.evidence.against_host.fdt.value < 5
    if mode == "teacher_forced":
        assert verdict.evidence.against_original.sdt.value > 0.5
        assert verdict.evidence.host is not None
        assert verdict.evidence.host.kl_vs_host_nats > 0.3


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
    assert [reason.split()[0] for reason in verdict.reasons] == ["KL", "The"]
    assert all("host" in reason for reason in verdict.reasons)
    assert verdict.diagnosis.code == "broken_kernels"
    assert verdict.evidence.against_host.divergent_tokens == 8


def test_wrong_tokenization_is_an_error(tiny_bundle: Path, seal: Seal) -> None:
    reference = Reference.load(tiny_bundle / "reference.npz")
    texts = reference.texts.copy()
    texts[[1, 3]] = "other"
    dataclasses.replace(reference, texts=texts).save(tiny_bundle / "reference.npz")
    seal(tiny_bundle)
    with pytest.raises(EdgeDtmError, match=r"from 2 of 6 prompts .*first: prompt 2, token 2"):
        verify(tiny_bundle, threads=1)


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


def test_wrong_arguments(tiny_bundle: Path, seal: Seal) -> None:
    with pytest.raises(EdgeDtmError, match="teacher_forced"):
        verify(tiny_bundle, mode="generate", kernels="compare")
    seal(tiny_bundle, measured={"noise_floor": {"near_tie_margin": "small"}})
    with pytest.raises(EdgeDtmError, match="noise floor"):
        verify(tiny_bundle, threads=1)


def test_a_bad_plan_is_told_from_broken_kernels(tiny_bundle: Path, seal: Seal) -> None:
    """Device and host agree, and both are far from the original."""
    reference = Reference.load(tiny_bundle / "reference.npz")
    ids = (reference.generated_ids + 1) % 259
    dataclasses.replace(reference, generated_ids=ids).save(tiny_bundle / "reference.npz")
    from edge_dtm.formats.record import RunSettings
    from edge_dtm.llamacpp.runner import LlamaRunner

    changed = Reference.load(tiny_bundle / "reference.npz")
    with LlamaRunner(tiny_bundle / "model.gguf", RunSettings(1, 64), 256) as llama:
        llama.teacher_forced(changed).save(tiny_bundle / "host.npz", {})
    seal(tiny_bundle)
    verdict = verify(tiny_bundle, threads=1)
    assert not verdict.passed
    assert verdict.diagnosis.code == "bad_plan"
    assert verdict.diagnosis.words in " ".join(printed(verdict))


def test_a_probe_that_differs_is_broken_kernels(tiny_bundle: Path, seal: Seal) -> None:
    probe = Record.load(tiny_bundle / "probe.npz")
    dataclasses.replace(probe, top_logits=probe.top_logits * 1.2).save(tiny_bundle / "probe.npz")
    seal(tiny_bundle)
    verdict = verify(tiny_bundle, threads=1)
    assert not verdict.passed
    assert verdict.diagnosis.code == "broken_kernels"
    assert "not quantization" in verdict.diagnosis.words
    assert verify(tiny_bundle, threads=1, kernels="skip").passed
    probe.rows(np.arange(2)).save(tiny_bundle / "probe.npz")
    seal(tiny_bundle)
    with pytest.raises(EdgeDtmError, match="probe record"):
        verify(tiny_bundle, threads=1)


def test_kernels_compared(tiny_bundle: Path) -> None:
    verdict = verify(tiny_bundle, threads=1, kernels="compare")
    assert verdict.passed
    assert verdict.kernels_compare is not None
    assert verdict.kernels_compare.positions == 124
    assert verdict.kernels_compare.differing_tokens == 0  # F32 is never repacked
