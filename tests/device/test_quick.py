"""verify --quick's verdict: early where it can be, and at the end exactly the plain one."""

import dataclasses

import numpy as np
import pytest
from conftest import THRESHOLDS
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.core.metrics import compare
from edge_dtm.device.judge import against_host, divergences, judge
from edge_dtm.device.quick import CERTAINTY, QuickVerdict
from edge_dtm.formats.thresholds import EXACT, thresholds_from
from edge_dtm.formats.verdict import Evidence

SEQUENCES, TOKENS = 133, 96
MARGIN = 1.5  # from which on the host is sure


def host_run(seed=0, sdt=0.04):
    """(reference, host ids, the host's margins, lengths): sequences that differ in difficulty."""
    random = np.random.default_rng(seed)
    shape = (SEQUENCES, TOKENS)
    reference = random.integers(0, 1000, shape)
    host = reference.copy()
    other = random.random(shape) < sdt * random.gamma(1, 1, (SEQUENCES, 1))
    host[other] += 1000
    lengths = np.where(random.random(SEQUENCES) < 0.2, random.integers(5, TOKENS), TOKENS)
    return reference, host, random.gamma(1.5, 2, shape), lengths


def replay(run, device, kl, thresholds, step=1):
    """(verdict, sequences taken): until it is certain, `step` sequences at a time."""
    quick = QuickVerdict(*run, thresholds)
    taken = 0
    while taken < len(device) and quick.passed is None:
        rows = quick.order[taken : taken + step]
        quick.add(rows, device[rows], kl[rows])
        taken += len(rows)
    return quick, taken


def plain(run, device, kl, thresholds):
    """What judge says to all sequences."""
    reference, host, margins, lengths = run
    top = np.stack([margins, np.zeros(margins.shape)], axis=-1)
    original, against, first = divergences(
        reference, host, device, lengths, margins, 0.0, "teacher_forced"
    )
    there = against_host(host, top, device, kl, lengths, thresholds.decided_margin)
    evidence = Evidence(
        "teacher_forced", original, against, there, None, [], first, [int(n) for n in lengths]
    )
    return evidence, judge(evidence, thresholds, host_meets=True)[0]


def limits(run):
    reference, host, _, lengths = run
    return thresholds_from(compare(reference, host, lengths), EXACT, quantized=True)


# --- devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_device_identical_to_the_host_passes(seed):
    run = host_run(seed)
    kl = np.zeros((SEQUENCES, TOKENS))
    quick, _ = replay(run, run[1], kl, limits(run), step=8)
    assert quick.passed is True and all(quick.met.values())
    assert plain(run, run[1], kl, limits(run))[1]


def test_a_healthy_device_passes():
    """It differs where the margin is small, for the better as often as for the worse."""
    run = host_run()
    reference, host, margins, _ = run
    random = np.random.default_rng(1)
    device = host.copy()
    near = (margins < 0.5) & (random.random(host.shape) < 0.1)
    device[near] = np.where(host == reference, host + 5000, reference)[near]
    kl = np.full(host.shape, 0.007)
    assert (device != host).any()
    assert replay(run, device, kl, limits(run), step=8)[0].passed is True


def test_thresholds_with_room_let_a_healthy_device_pass_early():
    run = host_run()
    tight = limits(run)
    wide = dataclasses.replace(
        tight,
        max_sdt=tight.max_sdt + 0.1,
        min_fdt=0.0,
        max_kl_vs_host=0.2,
        max_decided_sdt_vs_host=0.1,
    )
    quick, taken = replay(run, run[1], np.full((SEQUENCES, TOKENS), 0.007), wide)
    assert quick.passed is True and quick.by == "statistics"
    assert taken < SEQUENCES / 2


def random_argmaxes(run, random):
    return random.integers(5000, 6000, run[1].shape), np.ones(run[1].shape)


def a_broken_block(run, random):
    device = run[1].copy()
    device[random.random(device.shape) < 0.3] = 7000
    return device, np.full(device.shape, 0.6)


def other_probabilities(run, random):
    """The same argmaxes, by luck."""
    return run[1].copy(), np.full(run[1].shape, 0.3)


@pytest.mark.parametrize(
    ("device", "missed", "most"),
    [
        (random_argmaxes, {"decided", "sdt", "fdt", "kl"}, 2),
        (a_broken_block, {"decided", "sdt", "kl"}, 4),
        (other_probabilities, {"kl"}, 6),
    ],
)
def test_a_broken_device_fails_after_few_sequences(device, missed, most):
    for seed in range(3):
        run = host_run(seed)
        ids, kl = device(run, np.random.default_rng(seed))
        quick, taken = replay(run, ids, kl, limits(run))
        assert quick.passed is False and taken <= most
        assert quick.by in ("arithmetic", "statistics")
        named = {name for name, met in quick.met.items() if not met}
        assert named and named <= missed
        assert not plain(run, ids, kl, limits(run))[1]


def test_a_fail_names_the_check_and_judge_blames_that_one():
    run = host_run()
    ids, kl = other_probabilities(run, None)
    quick, taken = replay(run, ids, kl, limits(run))
    assert quick.met == {"fdt": True, "sdt": True, "kl": False, "decided": True}
    rows = quick.order[:taken]
    part = tuple(a[rows] for a in run)
    evidence, _ = plain(part, ids[rows], kl[rows], limits(run))
    passed, reasons, diagnosis = judge(evidence, limits(run), True, quick.met)
    assert not passed and diagnosis.code == "broken_kernels"
    assert len(reasons) == 1 and reasons[0].startswith("KL against the host's run")


def test_a_plan_worse_than_the_thresholds_fails_for_the_original_only():
    run = host_run()
    strict = dataclasses.replace(limits(run), max_sdt=0.001, min_fdt=90.0)
    quick, taken = replay(run, run[1], np.zeros(run[1].shape), strict)
    assert quick.passed is False and taken < SEQUENCES / 4
    named = {name for name, met in quick.met.items() if not met}
    assert named and named <= {"sdt", "fdt"}


def test_a_host_that_is_sure_of_nothing():
    run = (*host_run()[:2], np.zeros((SEQUENCES, TOKENS)), host_run()[3])
    kl = np.zeros((SEQUENCES, TOKENS))
    quick, _ = replay(run, run[1], kl, limits(run), step=8)
    assert quick.passed is True and "decided" not in quick.met
    device, kl = random_argmaxes(run, np.random.default_rng(0))
    quick, taken = replay(run, device, kl, limits(run))
    assert quick.passed is False and taken <= 4


def test_nothing_is_certain_before_the_first_sequence_but_what_no_device_can_miss():
    run = host_run()
    assert QuickVerdict(*run, limits(run)).passed is None
    anything = dataclasses.replace(
        THRESHOLDS, max_sdt=1.0, min_fdt=0.0, max_kl_vs_host=1.0, max_decided_sdt_vs_host=1.0
    )
    quick = QuickVerdict(*run, anything)
    assert quick.passed is True and quick.by == "arithmetic"


def test_what_lies_beyond_a_sequences_end_does_not_count():
    run = host_run()
    beyond = np.arange(TOKENS)[None, :] >= run[3][:, None]
    assert beyond.any()
    device, kl = run[1].copy(), np.zeros(run[1].shape)
    device[beyond], kl[beyond] = -1, 7.0
    quick, taken = replay(run, device, kl, limits(run), step=8)
    clean, wanted = replay(run, run[1], np.zeros(kl.shape), limits(run), step=8)
    assert (quick.passed, quick.met, taken) == (clean.passed, clean.met, wanted)


# --- the end is the plain verdict -----------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_with_all_sequences_it_is_the_plain_verdict(data):
    """Values are multiples of powers of two and limits are often reached exactly."""
    s, n = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))

    def array(largest):
        row = st.lists(st.integers(0, largest), min_size=n, max_size=n)
        return np.array(data.draw(st.lists(row, min_size=s, max_size=s)))

    reference, host, device = array(1), array(1), array(1)
    margins, kl = array(3) * 0.75, array(6) * 0.25
    lengths = np.array(data.draw(st.lists(st.integers(1, n), min_size=s, max_size=s)))
    total = int(lengths.sum())
    share = st.integers(0, total).map(lambda k: k / total)
    thresholds = dataclasses.replace(
        THRESHOLDS,
        max_sdt=data.draw(share),
        min_fdt=data.draw(st.integers(0, s * n)) / s,
        max_kl_vs_host=data.draw(st.integers(0, 4 * total)) / (4 * total),
        max_decided_sdt_vs_host=data.draw(st.integers(0, 4)) / data.draw(st.integers(4, 9)),
        decided_margin=MARGIN,
    )
    run = (reference, host, margins, lengths)
    quick = QuickVerdict(*run, thresholds)
    step = data.draw(st.integers(1, s))
    for start in range(0, s, step):
        rows = quick.order[start : start + step]
        quick.add(rows, device[rows], kl[rows])
    evidence, passed = plain(run, device, kl, thresholds)
    assert quick.passed == passed and quick.by == "arithmetic"
    met = {
        "fdt": evidence.against_original.fdt.value >= thresholds.min_fdt,
        "sdt": evidence.against_original.sdt.value <= thresholds.max_sdt,
        "kl": evidence.host.kl_nats <= thresholds.max_kl_vs_host,
        "decided": evidence.host.decided_sdt <= thresholds.max_decided_sdt_vs_host,
    }
    if not evidence.host.decided_positions:
        assert met.pop("decided")
    assert quick.met == met


@pytest.mark.slow
def test_a_device_just_over_a_threshold_rarely_passes():
    """The random order is fixed, so it is the device's wrong sequences that are shuffled."""
    n, bad, runs, wrong = 40, 5, 100, 0
    run = (*(a[:n] for a in host_run()[:3]), np.full(n, TOKENS))
    # Five whole sequences at a KL of 1 are just over 4.9 of 40.
    limit = dataclasses.replace(
        limits(run), max_sdt=1.0, min_fdt=0.0, max_kl_vs_host=4.9 / n, max_decided_sdt_vs_host=1.0
    )
    random = np.random.default_rng(5)
    for _ in range(runs):
        kl = np.zeros((n, TOKENS))
        kl[random.permutation(n)[:bad]] = 1.0
        wrong += replay(run, run[1], kl, limit)[0].passed is True
    assert not plain(run, run[1], kl, limit)[1]
    alpha = 1 - CERTAINTY
    assert wrong / runs <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60))
def test_every_sequence_comes_once(sequences):
    ids = np.zeros((sequences, 2), dtype=int)
    lengths = np.full(sequences, 2)
    first, second = (
        QuickVerdict(ids, ids, np.ones(ids.shape), lengths, THRESHOLDS).order for _ in range(2)
    )
    assert sorted(first) == list(range(sequences))
    np.testing.assert_array_equal(first, second)
