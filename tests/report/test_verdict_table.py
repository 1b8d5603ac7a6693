"""The verdict at a terminal: PASS or FAIL last, with every reason, whatever is in a name."""

import dataclasses
import io
import re

import pytest
from fixtures.tiny_bundle import THRESHOLDS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from edge_dtm.core.metrics import Divergence, Interval
from edge_dtm.device.judge import judge
from edge_dtm.formats.verdict import (
    AgainstHost,
    Evidence,
    KernelCheck,
    KernelsCompared,
    Verdict,
)
from edge_dtm.report.verdict_table import print_verdict


def divergence(sdt, fdt):
    return Divergence(
        sdt=Interval(sdt, 0.041, 0.059),
        fdt=Interval(fdt, 21.5, 38.5),
        identical_share=0.125,
        sequences=8,
        tokens=640,
        divergent_tokens=32,
        near_tie_share=0.0031,
        near_tie_margin=0.01,
    )


def verdict(sdt=0.05, kl=0.005, component="blk.0.attn_q", ok=True, mode="teacher_forced", **more):
    evidence = Evidence(
        mode=mode,
        against_original=divergence(sdt, 30.0),
        against_host=divergence(0.01, 60.0),
        host=None if mode == "generate" else AgainstHost(kl, 0.0012, 0.25),
        kl_probe_nats=2.5e-5,
        kernels=[
            KernelCheck("Q8_0", "plain", 1, 2e-3, "blk.0.attn_q", True),
            KernelCheck("Q4_K", "repacked", 32, 3e-3 if ok else 0.7, component, ok),
        ],
        first_divergent_tokens=[30] * 8,
        lengths=[80] * 8,
    )
    passed, reasons, diagnosis = judge(evidence, THRESHOLDS, True)
    plain = Verdict(
        passed=passed,
        reasons=reasons,
        diagnosis=diagnosis,
        evidence=evidence,
        sequences=8,
        sequences_in_bundle=33,
        thresholds=THRESHOLDS,
        noise_floor={"sdt": {"value": 0.0021}, "fdt": {"value": 85.8, "low": 80.0}},
        bundle={"name": "tiny", "key_id": None},
        performance={
            "prefill_tokens_per_s": 31.5,
            "decode_tokens_per_s": 7.25,
            "time_to_first_token_s": 0.376,
            "peak_rss_bytes": 123_456_789,
        },
        settings={},
        runtime={},
    )
    return dataclasses.replace(plain, **more)


def printed(shown, width=120):
    file = io.StringIO()
    print_verdict(shown, Console(file=file, width=width))
    return file.getvalue()


def row(text, label):
    """The cells of the table's row with this label."""
    line = next(line for line in text.splitlines() if re.search(rf"│ {re.escape(label)} +│", line))
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


@pytest.mark.parametrize(
    ("word", "changes", "reasons"),
    [
        ("PASS", {}, 6),
        ("FAIL", {"sdt": 0.5}, 1),
        ("FAIL", {"sdt": 0.5, "kl": 0.5, "ok": False}, 3),
        ("PASS", {"mode": "generate"}, 3),
    ],
)
def test_the_last_line_is_the_verdict_with_all_reasons(word, changes, reasons):
    shown = verdict(**changes)
    text = printed(shown)
    assert text.endswith("\n") and not text.endswith("\n\n")
    lines = text.splitlines()
    assert lines[-1].split()[0] == word
    assert lines[-1] == f"{word} {' '.join(shown.reasons)}"
    assert len(shown.reasons) == reasons
    # The diagnosis says what to do where something is wrong, and nothing else.
    assert (shown.diagnosis.words in lines) == (word == "FAIL")


def test_the_table_has_each_figure_with_its_threshold_and_floor():
    text = printed(verdict())
    assert "8 of 33 sequences; FDT in tokens, of at most 80.0" in text
    assert row(text, "SDT vs original") == ["5.00%", "4.1% to 5.9%", "≤ 10.00%", "0.21%"]
    assert row(text, "FDT vs original") == ["30.0", "21.5 to 38.5", "≥ 20.0", "85.8"]
    assert row(text, "identical vs original") == ["12.5%", "", "", ""]
    assert row(text, "near-ties (≤ 0.01)")[0] == "0.31%"
    assert row(text, "SDT vs host")[:3] == ["1.00%", "4.1% to 5.9%", ""]
    assert row(text, "KL vs host, nats") == ["0.005", "", "≤ 0.01", ""]
    assert row(text, "SDT vs host where sure (≥ 1)") == ["0.12%", "", "≤ 0.20%", ""]
    assert row(text, "KL vs host, small F16 model") == ["2.5e-05", "", "≤ 0.001", ""]
    assert row(text, "kernels that agree with numpy")[0] == "2 of 2"
    assert row(text, "time to first token, s")[0] == "0.38"
    assert row(text, "peak memory, MB")[0] == "123"
    assert row(printed(verdict(ok=False)), "kernels that agree with numpy")[0] == "1 of 2"


def test_generation_shows_no_sdt_and_no_kl():
    text = printed(verdict(mode="generate"))
    assert row(text, "FDT vs original")[0] == "30.0"
    assert "SDT" not in text and "near-ties" not in text and "KL vs host, nats" not in text


def test_what_was_not_measured_has_no_row():
    shown = verdict()
    evidence = dataclasses.replace(shown.evidence, kernels=[], kl_probe_nats=None)
    bare = {"evidence": evidence, "performance": {}, "noise_floor": {"sdt": True, "fdt": None}}
    text = printed(dataclasses.replace(shown, **bare))
    for label in ("small F16", "kernels", "tokens/s", "peak memory"):
        assert label not in "\n".join(text.splitlines()[:-1])
    assert row(text, "SDT vs original")[3] == "" and row(text, "FDT vs original")[3] == ""


@pytest.mark.parametrize(
    ("compared", "words"),
    [
        (KernelsCompared(2000, 3, 0.004), "3 of 2,000 tokens differ, mean KL 0.004"),
        (KernelsCompared(2000, 0, 0.004), "the same tokens at all 2,000 positions, mean KL 0.004"),
        (KernelsCompared(2000, 0, 0.0), "the same logits at all 2,000 positions"),
    ],
)
def test_kernels_compared(compared, words):
    text = printed(verdict(kernels_compare=compared))
    assert words in text.splitlines()[-2]
    assert "repacked weights" not in printed(verdict())


@settings(deadline=None, max_examples=30)
@example(":warning:")
@example("[bold]x[/bold] [/] a[/red] [link=x]")
@given(st.text(st.sampled_from("[]/\\ab=:# é"), min_size=1, max_size=12))
def test_no_text_breaks_the_output(text):
    shown = verdict(notes=(text,), reasons=(f"Because of {text}.",))
    lines = printed(shown).splitlines()
    assert f"Note: {text}." in lines and lines[-1] == f"PASS Because of {text}."
