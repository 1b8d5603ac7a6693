"""The verdict at a terminal: PASS or FAIL last, with every reason, whatever is in a name."""

import dataclasses
import io
import re

import pytest
from fixtures.tiny_bundle import BAD_KERNEL, GOOD_KERNEL, THRESHOLDS
from fixtures.tiny_bundle import evidence as made_up_evidence
from fixtures.tiny_bundle import verdict as made_up_verdict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from edge_dtm.device.judge import judge
from edge_dtm.formats.verdict import KernelsCompared
from edge_dtm.report.verdict_table import print_verdict

KERNELS = [GOOD_KERNEL, dataclasses.replace(BAD_KERNEL, worst_relative_error=3e-3, ok=True)]
WRONG = [GOOD_KERNEL, BAD_KERNEL]


def shown_verdict(**changes):
    """Of evidence with these changes, judged."""
    evidence = made_up_evidence(kernels=changes.pop("kernels", KERNELS), **changes)
    passed, reasons, diagnosis = judge(evidence, THRESHOLDS, True)
    floor = {"sdt": {"value": 0.0021}, "fdt": {"value": 85.8, "low": 80.0}}
    return dataclasses.replace(
        made_up_verdict(),
        passed=passed,
        reasons=reasons,
        diagnosis=diagnosis,
        evidence=evidence,
        noise_floor=floor,
    )


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
        ("FAIL", {"sdt": 0.5, "kl": 0.5, "kernels": WRONG}, 3),
        ("PASS", {"mode": "generate"}, 3),
    ],
)
def test_the_last_line_is_the_verdict_with_all_reasons(word, changes, reasons):
    shown = shown_verdict(**changes)
    text = printed(shown)
    assert text.endswith("\n") and not text.endswith("\n\n")
    lines = text.splitlines()
    assert lines[-1].split()[0] == word
    assert lines[-1] == f"{word} {' '.join(shown.reasons)}"
    assert len(shown.reasons) == reasons
    # The diagnosis says what to do where something is wrong, and nothing else.
    assert (shown.diagnosis.words in lines) == (word == "FAIL")


def test_the_table_has_each_figure_with_its_threshold_and_floor():
    text = printed(shown_verdict())
    assert "2 of 2 sequences; FDT in tokens, of at most 100.0" in text
    assert row(text, "SDT vs original") == ["5.00%", "4.1% to 5.9%", "≤ 10.00%", "0.21%"]
    assert row(text, "FDT vs original") == ["30.0", "29.1 to 30.9", "≥ 20.0", "85.8"]
    assert row(text, "identical vs original") == ["25.0%", "", "", ""]
    assert row(text, "near-ties (≤ 0.01)")[0] == "0.10%"
    assert row(text, "SDT vs host")[:3] == ["1.00%", "1.0% to 1.0%", ""]
    assert row(text, "KL vs host, nats") == ["0.005", "", "≤ 0.01", ""]
    assert row(text, "SDT vs host where sure (≥ 1)") == ["0.10%", "", "≤ 0.20%", ""]
    assert row(text, "KL vs host, small F16 model") == ["1e-05", "", "≤ 0.001", ""]
    assert row(text, "kernels that agree with numpy")[0] == "2 of 2"
    assert row(text, "time to first token, s")[0] == "0.10"
    assert row(text, "peak memory, MB")[0] == "100"
    assert (
        row(printed(shown_verdict(kernels=WRONG)), "kernels that agree with numpy")[0] == "1 of 2"
    )


def test_generation_shows_no_sdt_and_no_kl():
    text = printed(shown_verdict(mode="generate"))
    assert row(text, "FDT vs original")[0] == "30.0"
    assert "SDT" not in text and "near-ties" not in text and "KL vs host, nats" not in text


def test_what_was_not_measured_has_no_row():
    shown = shown_verdict()
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
    text = printed(dataclasses.replace(shown_verdict(), kernels_compare=compared))
    assert words in text.splitlines()[-2]
    assert "repacked weights" not in printed(shown_verdict())


@settings(deadline=None, max_examples=30)
@example(":warning:")
@example("[bold]x[/bold] [/] a[/red] [link=x]")
@given(st.text(st.sampled_from("[]/\\ab=:# é"), min_size=1, max_size=12))
def test_no_text_breaks_the_output(text):
    shown = dataclasses.replace(shown_verdict(), notes=(text,), reasons=(f"Because of {text}.",))
    lines = printed(shown).splitlines()
    assert f"Note: {text}." in lines and lines[-1] == f"PASS Because of {text}."
