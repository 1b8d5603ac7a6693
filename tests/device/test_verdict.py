"""The verdict's pure parts: each comparison against plain loops, each situation its diagnosis."""

import dataclasses
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.tiny_bundle import BAD_KERNEL, GOOD_KERNEL, THRESHOLDS, divergence, evidence, verdict
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.core.metrics import Interval, compare
from edge_dtm.device.judge import evidence_of, judge, limits_of_part
from edge_dtm.formats.thresholds import Tolerance, thresholds_from
from edge_dtm.formats.verdict import KernelsCompared
from edge_dtm.formats.verdict_file import VerdictFile

EXACT = Tolerance(0.0, math.inf)  # of devices that round as the host does


@st.composite
def replays(draw):
    """(reference, host, device ids, margins, kl, lengths) of few sequences and a small vocabulary.

    Margins and KL are multiples of powers of two, so that loops and numpy agree to the last bit.
    """
    s, n = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def ids():
        return st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=s, max_size=s)

    arrays = [np.array(draw(ids())) for _ in range(5)]
    lengths = np.array(draw(st.lists(st.integers(1, n), min_size=s, max_size=s)))
    return *arrays[:3], arrays[3] * 0.75, arrays[4] * 0.75, lengths


def judged(
    reference, host, device, margins, kl, lengths, decided_margin=1.0, mode="teacher_forced"
):
    """The evidence of these arrays; near-ties have a margin of up to 0.75."""
    top = np.stack([margins + 3, np.full(margins.shape, 3.0)], axis=-1)
    original = SimpleNamespace(generated_ids=reference, generated_lengths=lengths, margins=margins)
    runs = [
        SimpleNamespace(ids=ids, top_logits=top, lengths=lengths, mode=mode)
        for ids in (host, device)
    ]
    return evidence_of(original, *runs, None if mode == "generate" else kl, 0.75, decided_margin)


def counted(lengths):
    return [(s, i) for s, n in enumerate(lengths) for i in range(n)]


# --- thresholds -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(replays(), st.booleans())
def test_the_host_meets_the_thresholds_made_from_it(replay, quantized):
    reference, host, _, _, _, lengths = replay
    divergence = compare(reference, host, lengths)
    thresholds = thresholds_from(divergence, EXACT, quantized)
    assert min(divergence.sdt.high, 1) <= thresholds.max_sdt <= 1
    assert 0 <= thresholds.min_fdt <= divergence.fdt.low
    assert thresholds.max_sdt >= divergence.sdt.value and thresholds.min_fdt <= divergence.fdt.value


def test_the_room_is_one_and_a_half_half_widths():
    host = dataclasses.replace(
        divergence(0, 0), sdt=Interval(0.10, 0.08, 0.14), fdt=Interval(20.0, 16.0, 26.0)
    )
    thresholds = thresholds_from(host, EXACT, quantized=True)
    assert thresholds.max_sdt == pytest.approx(0.16) and thresholds.min_fdt == pytest.approx(14.0)


@given(st.floats(0, 1), st.floats(0, 1e4), st.booleans())
def test_the_users_own_thresholds_are_kept(max_sdt, min_fdt, quantized):
    host = divergence(0.05, 40.0, spread=0.01)
    plain = thresholds_from(host, EXACT, quantized)
    assert thresholds_from(host, EXACT, quantized, max_sdt, min_fdt) == dataclasses.replace(
        plain, max_sdt=max_sdt, min_fdt=min_fdt
    )
    assert thresholds_from(host, EXACT, quantized, max_sdt=max_sdt).min_fdt == plain.min_fdt
    assert thresholds_from(host, EXACT, quantized, min_fdt=min_fdt).max_sdt == plain.max_sdt


def test_no_threshold_is_tighter_than_what_healthy_devices_do():
    host = divergence(0.01, 80.0)  # an interval without width, as that of a file like the original
    thresholds = thresholds_from(host, Tolerance(0.03, 55.0), quantized=False)
    assert (thresholds.max_sdt, thresholds.min_fdt) == (0.03, 55.0)
    assert thresholds_from(host, Tolerance(0.005, 85.0), False) == thresholds_from(
        host, EXACT, False
    )


def test_f16_leaves_less_room_than_quantized_types():
    host = divergence(0.05, 40.0)
    quantized, f16 = (thresholds_from(host, EXACT, kind) for kind in (True, False))
    assert f16.max_kl_vs_host < quantized.max_kl_vs_host / 10
    assert dataclasses.replace(f16, max_kl_vs_host=quantized.max_kl_vs_host) == quantized


# --- device against host --------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(replays(), st.sampled_from([0.0, 0.75, 1.0, 1.5, 9.0]))
def test_against_host_is_what_loops_count(replay, decided_margin):
    reference, host, device, margins, kl, lengths = replay
    result = judged(reference, host, device, margins, kl, lengths, decided_margin).host
    places = counted(lengths)
    sure = [at for at in places if margins[at] >= decided_margin]
    other = [at for at in places if host[at] != device[at]]
    assert result.kl_vs_host_nats == pytest.approx(
        sum(min(kl[at], 1) for at in places) / len(places)
    )
    assert result.decided_sdt_vs_host == (len(set(sure) & set(other)) / len(sure) if sure else 0)
    assert result.largest_margin_vs_host == max((margins[at] for at in other), default=0)


def test_one_position_cannot_decide_over_thousands():
    ids, kl = np.zeros((1, 1000), dtype=int), np.zeros((1, 1000))
    kl[0, 0] = 1e6
    result = judged(ids, ids, ids, ids, kl, np.array([1000]))
    assert result.host.kl_vs_host_nats == 1e-3


@settings(deadline=None, max_examples=60)
@given(replays(), st.sampled_from(["teacher_forced", "generate"]))
def test_divergences_are_what_loops_count(replay, mode):
    reference, host, device, margins, kl, lengths = replay
    evidence = judged(reference, host, device, margins, kl, lengths, mode=mode)
    original, against = evidence.against_original, evidence.against_host
    first = evidence.first_divergent_tokens

    def first_other(a, b, row, length):
        return next((i for i in range(length) if a[row, i] != b[row, i]), length)

    rows, places = range(len(lengths)), counted(lengths)
    assert first == [first_other(reference, device, s, lengths[s]) for s in rows]
    assert all(type(i) is int for i in first)
    assert original.fdt.value == pytest.approx(sum(first) / len(first))
    other = [at for at in places if reference[at] != device[at]]
    assert original.sdt.value == float(Fraction(len(other), len(places)))
    ties = [at for at in other if margins[at] <= 0.75]
    assert original.near_tie_share == float(Fraction(len(ties), len(places)))
    if mode == "generate":
        # Its own first divergence is the last position where the host saw the device's text.
        lengths = [min(first_other(reference, host, s, lengths[s]) + 1, lengths[s]) for s in rows]
    assert against.tokens == sum(lengths)
    assert against.divergent_tokens == sum(host[at] != device[at] for at in counted(lengths))


# --- the limits of a part -------------------------------------------------------------------


def test_the_room_of_a_part_grows_with_the_root():
    limits = dataclasses.replace(THRESHOLDS, max_sdt=0.16, min_fdt=14.0)
    host, part = divergence(0.10, 20.0), divergence(0.05, 35.0)
    host = dataclasses.replace(host, sequences=100)
    moved = limits_of_part(limits, host, dataclasses.replace(part, sequences=25))
    assert moved.max_sdt == pytest.approx(0.05 + 2 * 0.06)
    assert moved.min_fdt == pytest.approx(35.0 - 2 * 6.0)
    same = {"max_sdt": limits.max_sdt, "min_fdt": limits.min_fdt}
    assert dataclasses.replace(moved, **same) == limits  # nothing else moves


@settings(deadline=None, max_examples=60)
@given(replays(), st.floats(0, 1), st.floats(0, 6), st.data())
def test_the_hosts_own_run_of_a_part_meets_the_limits_of_it(replay, max_sdt, min_fdt, data):
    reference, host_ids, _, _, _, lengths = replay
    limits = dataclasses.replace(THRESHOLDS, max_sdt=max_sdt, min_fdt=min_fdt)
    total = len(lengths)
    taken = data.draw(st.integers(1, total))
    host = compare(reference, host_ids, lengths)
    part = compare(reference[:taken], host_ids[:taken], lengths[:taken])
    moved = limits_of_part(limits, host, part)
    if taken == total:
        assert moved == limits
    else:
        # A limit that the host misses on all is the user's own, and does not move.
        if host.sdt.value <= max_sdt:
            assert part.sdt.value <= moved.max_sdt <= 1
        else:
            assert moved.max_sdt == max_sdt
        if host.fdt.value >= min_fdt:
            assert 0 <= moved.min_fdt <= part.fdt.value
        else:
            assert moved.min_fdt == min_fdt


# --- judging --------------------------------------------------------------------------------

BROKEN, BAD_PLAN, TOO_CLOSE = "broken_kernels", "bad_plan", "too_close"
# What is wrong, whether the host meets the thresholds, code, a part of the words.
SITUATIONS = {
    "healthy": ({}, True, "healthy", "computes what the host computed"),
    "healthy although the host would miss": ({}, False, "healthy", "computes what the host"),
    "no kernels checked": ({"kernels": [], "probe": None}, True, "healthy", "computes what"),
    "a wrong kernel": ({"kernels": [GOOD_KERNEL, BAD_KERNEL]}, True, BROKEN, "Q4_K (repacked)"),
    "F16 differs": ({"probe": 0.01}, True, BROKEN, "not quantization"),
    "KL": ({"kl": 0.02}, True, BROKEN, "attention"),
    "sure tokens differ": ({"decided": 0.01}, True, BROKEN, "attention"),
    "KL, nothing checked singly": (
        {"kl": 0.02, "kernels": [], "probe": None}, True, BROKEN, "products were not checked"
    ),
    "machine and plan": ({"sdt": 0.9, "kl": 0.02}, False, BROKEN, "doctor"),
    "SDT, as on the host": ({"sdt": 0.2}, False, BAD_PLAN, "--max-bytes"),
    "FDT, as on the host": ({"fdt": 3.0}, False, BAD_PLAN, "--max-bytes"),
    "SDT, not on the host": ({"sdt": 0.11}, True, TOO_CLOSE, "just meets"),
    "FDT, not on the host": ({"fdt": 19.0}, True, TOO_CLOSE, "just meets"),
    "generated": ({"mode": "generate"}, True, "healthy", "computes what"),
    "generated, no SDT": ({"mode": "generate", "sdt": 0.9}, True, "healthy", "computes what"),
    "generated, FDT": ({"mode": "generate", "fdt": 3.0}, True, BAD_PLAN, "without --mode generate"),
    "generated, wrong kernel": (
        {"mode": "generate", "fdt": 3.0, "kernels": [BAD_KERNEL]}, True, BROKEN, "Q4_K (repacked)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("situation", list(SITUATIONS))
def test_every_situation_has_its_diagnosis(situation):
    wrong, host_meets, code, words = SITUATIONS[situation]
    passed, reasons, diagnosis = judge(evidence(**wrong), THRESHOLDS, host_meets)
    assert passed == (code == "healthy")
    assert diagnosis.code == code and words in diagnosis.words
    # Only what was looked at is right.
    assert "single products are right" not in diagnosis.words or wrong.get("kernels", [1])
    assert reasons and all(reason.endswith(".") for reason in reasons)
    assert all((", but wanted" in r or "wrong products" in r) != passed for r in reasons)


MISSED = {  # what to change, and how the reason begins
    "fdt": ({"fdt": 1.0}, "FDT against the original is 1.00 tokens"),
    "sdt": ({"sdt": 0.5}, "SDT against the original is 50.000%"),
    "kl": ({"kl": 0.5}, "KL against the host's run of this file is 0.5 nats"),
    "decided": ({"decided": 0.5}, "The share of other tokens where the host was sure"),
    "probe": ({"probe": 0.5}, "KL of the small F16 model against the host's is 0.5 nats"),
    "kernels": ({"kernels": [GOOD_KERNEL, BAD_KERNEL]}, "1 of 2 kernels compute wrong products"),
}


@given(st.sets(st.sampled_from(list(MISSED))), st.booleans())
def test_the_reasons_are_the_checks_missed_or_else_all_that_are_met(names, host_meets):
    changes = {k: v for name in names for k, v in MISSED[name][0].items()}
    passed, reasons, diagnosis = judge(evidence(**changes), THRESHOLDS, host_meets)
    assert passed == (not names) == (diagnosis.code == "healthy")
    if names:
        wanted = [start for name, (_, start) in MISSED.items() if name in names]
        assert len(reasons) == len(wanted)
        assert all(r.startswith(w) for r, w in zip(reasons, wanted, strict=True))
    else:
        assert len(reasons) == len(MISSED) and not any("but wanted" in r for r in reasons)


@pytest.mark.parametrize(
    ("name", "limit", "worse"),
    [
        ("sdt", THRESHOLDS.max_sdt, 1),
        ("fdt", THRESHOLDS.min_fdt, 0),
        ("kl", THRESHOLDS.max_kl_vs_host, 1),
        ("decided", THRESHOLDS.max_decided_sdt_vs_host, 1),
        ("probe", THRESHOLDS.max_kl_probe, 1),
    ],
)
def test_a_limit_is_met_up_to_the_last_bit(name, limit, worse):
    assert judge(evidence(**{name: limit}), THRESHOLDS, True)[0]
    assert not judge(evidence(**{name: math.nextafter(limit, worse)}), THRESHOLDS, True)[0]


@pytest.mark.parametrize("name", ["sdt", "fdt", "kl", "decided", "probe"])
def test_what_is_no_number_fails(name):
    passed, reasons, _ = judge(evidence(**{name: math.nan}), THRESHOLDS, True)
    assert not passed and len(reasons) == 1 and "nan" in reasons[0]


def test_the_worst_kernel_is_named_even_where_a_right_one_rounds_more():
    coarse = dataclasses.replace(GOOD_KERNEL, worst_relative_error=0.9)
    hopeless = dataclasses.replace(
        BAD_KERNEL, type="Q6_K", component="blk.7.ffn_up", worst_relative_error=math.inf
    )
    _, (reason,), _ = judge(evidence(kernels=[BAD_KERNEL, coarse]), THRESHOLDS, True)
    assert reason.startswith("1 of 2") and "Q4_K repacked, 32 columns, blk.1.ffn_down" in reason
    kernels = [BAD_KERNEL, coarse, hopeless]
    _, (reason,), diagnosis = judge(evidence(kernels=kernels), THRESHOLDS, True)
    assert reason.startswith("2 of 3")
    assert "Q6_K repacked, 32 columns, blk.7.ffn_up" in reason and "inf" in reason
    assert "Q4_K (repacked), Q6_K (repacked)" in diagnosis.words


# --- JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["teacher_forced", "generate"])
def test_generation_has_no_sdt_and_no_kl(mode):
    data = dataclasses.replace(verdict(), evidence=evidence(mode=mode)).to_json()
    VerdictFile.model_validate_json(json.dumps(data))
    figures = [
        data[name][figure]
        for name in ("against_original", "against_host")
        for figure in ("sdt", "divergent_tokens", "near_tie_share")
    ]
    names = ("kl_vs_host_nats", "decided_sdt_vs_host", "largest_margin_vs_host")
    figures += [data[name] for name in names]
    assert all((figure is None) == (mode == "generate") for figure in figures)
    assert data["against_original"]["fdt"]["value"] == 30.0 and data["kl_probe_nats"] == 1e-5


def test_what_json_cannot_say_is_null():
    endless = dataclasses.replace(BAD_KERNEL, worst_relative_error=math.inf)
    data = dataclasses.replace(
        verdict(),
        evidence=evidence(kernels=[endless], probe=None),
        performance={"prefill_tokens_per_s": math.nan, "decode_tokens_per_s": None},
        # A token that the other run thinks impossible, which no cap hides divergence.
        kernels_compare=KernelsCompared(9, 1, math.inf),
    ).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["kernels"][0]["worst_relative_error"] is None and data["kl_probe_nats"] is None
    assert data["performance"] == {"prefill_tokens_per_s": None, "decode_tokens_per_s": None}
    assert data["kernels_compare"]["kl_nats"] is None
