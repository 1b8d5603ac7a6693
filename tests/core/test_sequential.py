"""Early verdicts: exact where they claim arithmetic, rarely wrong where they claim statistics."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core.sequential import MeanCheck, Sequential, order

SEQUENCES, LENGTH = 133, 96
COMPARE = {"at most": lambda mean, limit: mean <= limit, "at least": lambda m, limit: m >= limit}


def stop(values, rows, **check):
    """Feed the values in this order until the state is no longer open: (number seen, check)."""
    it = MeanCheck(**check)
    for row in rows:
        if it.state != "open":
            break
        it.update(int(row), values[row])
    return it.seen, it


def replayed(random, sdt=0.018, other=0.005):
    """Divergent positions of 133 sequences on the host, and on a healthy device that differs from
    the host at a share `other` of positions, as often for the worse as for the better."""
    host = np.minimum(random.negative_binomial(2, 2 / (2 + sdt * LENGTH), SEQUENCES), LENGTH)
    worse = random.binomial(LENGTH - host, other / 2 / (1 - sdt))
    better = random.binomial(host, other / 2 / sdt)
    return host.astype(float), (host + worse - better).astype(float)


def sdt_check(host, slack, **more):
    weights = np.full(len(host), float(LENGTH))
    return {
        "limit": host.sum() / weights.sum() + slack,
        "predicted": host,
        "low": np.zeros(len(host)),
        "high": weights,
        "weights": weights,
    } | more


# --- arithmetic -----------------------------------------------------------------------------


@given(st.data())
def test_arithmetic_is_exactly_what_all_completions_agree_on(data):
    n = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    values = [data.draw(st.integers(0, length)) for length in lengths]
    predicted = [data.draw(st.integers(0, length)) for length in lengths]
    # Quarters and thirds, so that a mean often equals the limit exactly.
    limit = data.draw(st.integers(-1, 13)) / data.draw(st.sampled_from([4, 6, 12]))
    relation = data.draw(st.sampled_from(list(COMPARE)))
    weights = data.draw(st.sampled_from([lengths, [1] * n]))
    # Alphas so small that statistics never speak.
    check = MeanCheck(limit, predicted, [0] * n, lengths, relation, alpha=1e-300, weights=weights)
    rows = data.draw(st.permutations(range(n)))
    for seen in range(n + 1):
        rest = rows[seen:]
        verdicts = set()
        for completion in itertools.product(*(range(lengths[row] + 1) for row in rest)):
            total = sum(values[row] for row in rows[:seen]) + sum(completion)
            mean = float(Fraction(total, sum(weights)))
            verdicts.add(COMPARE[relation](mean, limit))
        wanted = "open" if len(verdicts) == 2 else "met" if True in verdicts else "missed"
        assert check.state == wanted
        assert check.by == (None if wanted == "open" else "arithmetic")
        if rest:
            check.update(rest[0], values[rest[0]])


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12),
    st.floats(-0.1, 1.1),
    st.sampled_from(list(COMPARE)),
    st.integers(0, 9),
)
def test_when_all_was_seen_the_verdict_is_the_plain_one(pairs, limit, relation, seed):
    predicted, values = map(np.array, zip(*pairs, strict=True))
    n = len(values)
    check = MeanCheck(limit, predicted, np.zeros(n), np.ones(n), relation)
    for row in order(n, seed):
        check.update(int(row), values[row])
    mean = float(sum(map(Fraction, values)) / n)
    if abs(mean - limit) > 1e-12:
        assert check.state == ("met" if COMPARE[relation](mean, limit) else "missed")
    assert check.by == "arithmetic"


def test_without_an_upper_bound_only_the_end_shows_that_a_limit_is_met():
    n = 30
    endless = {"low": np.zeros(n), "high": np.full(n, np.inf)}
    seen, check = stop(
        np.full(n, 0.1), order(n, 0), limit=0.5, predicted=np.full(n, 0.1), **endless
    )
    assert (seen, check.state) == (n, "met")
    seen, check = stop(
        np.full(n, 9.0), order(n, 0), limit=0.5, predicted=np.full(n, 0.1), **endless
    )
    assert seen < 4 and check.state == "missed"


def test_at_least_mirrors_at_most():
    random = np.random.default_rng(1)
    h, y = random.uniform(0, 9, 60), random.uniform(0, 9, 60)
    low, high, rows = np.zeros(60), np.full(60, 9.0), order(60, 2)
    for limit in (2.0, 4.0, 4.6, 6.0):
        a = stop(y, rows, limit=limit, predicted=h, low=low, high=high)
        b = stop(-y, rows, limit=-limit, predicted=-h, low=-high, high=-low, relation="at least")
        assert (a[0], a[1].state, a[1].by) == (b[0], b[1].state, b[1].by)


# --- statistics -----------------------------------------------------------------------------


def just_missed():
    """Populations of y in 0..1, 40 each, whose mean is just above the limit 0.25 (its sum 10)."""
    n, over = 40, 1e-6
    few = np.zeros(n)
    few[:10] = 1.0
    one = np.full(n, 0.23)
    one[0] = 1.0
    one[1:] += (10 - one.sum()) / (n - 1)
    coin = np.tile([0.0, 0.5], n // 2)
    drift = np.linspace(0.0, 0.5, n)
    worlds = {"few": few, "one": one, "coin": coin, "drift": drift}
    for y in worlds.values():
        y[-1 if y[-1] < 0.9 else 0] += over
    return worlds


PREDICTIONS = {
    "optimist": lambda y: np.minimum(y, 0.2),  # the worst case: all is as foreseen but for a few
    "blind": lambda y: np.full(len(y), 0.1),
}


def error_rate(wrong, y, check, runs):
    random = np.random.default_rng(7)
    return np.mean(
        [stop(y, random.permutation(len(y)), **check)[1].state == wrong for _ in range(runs)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", list(just_missed()))
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("wrong", ["met", "missed"])
def test_a_wrong_verdict_is_as_rare_as_promised(world, prediction, wrong):
    y = np.clip(just_missed()[world], 0, 1 + 1e-6)
    h = PREDICTIONS[prediction](y)
    n, runs, alpha = len(y), 400, 0.1
    limit = 0.25 if wrong == "met" else y.sum() / n + 1e-9
    check = {"limit": limit, "predicted": h, "low": np.zeros(n), "high": np.full(n, 1 + 1e-6)}
    rate = error_rate(wrong, y, check | {"alpha": alpha}, runs)
    assert rate <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)


def test_these_worlds_would_show_a_test_that_peeks():
    """A normal interval, valid at a time fixed before, is wrong too often if looked at always."""
    y = just_missed()["few"]
    random, wrong, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        seen = y[random.permutation(len(y))]
        wrong += any(
            seen[:t].mean() + 1.28 * seen[:t].std() / np.sqrt(t) < 0.25 for t in range(5, 41)
        )
    assert wrong / runs > 0.1 + 3 * np.sqrt(0.1 * 0.9 / runs)


@pytest.mark.parametrize("bad", [1, 2, 5])
def test_no_device_is_passed_before_the_bound_that_no_method_beats(bad):
    """If `bad` whole sequences use up the slack, passing after t of N sequences that were all as
    foreseen is wrong with the probability that none of the `bad` is among them."""
    n = 100
    check = {
        "limit": bad / n, "predicted": np.zeros(n), "low": np.zeros(n), "high": np.ones(n)
    }  # fmt: skip
    seen, it = stop(np.zeros(n), order(n, 0), **check)
    assert it.state == "met"
    missed_all = np.prod([(n - bad - i) / (n - i) for i in range(seen)])
    assert missed_all <= 0.05
    # And not much later: the bet is the best one, but for the hundredth part that is held back.
    before = np.prod([(n - bad - i) / (n - i) for i in range(seen - 2)])
    assert before > 0.05 * 0.8


@pytest.mark.parametrize(("slack", "most"), [(0.02, 100), (0.05, 55), (0.1, 30)])
def test_a_healthy_device_with_room_passes_early(slack, most):
    for seed in range(3):
        host, device = replayed(np.random.default_rng(seed))
        seen, check = stop(device, order(SEQUENCES, seed), **sdt_check(host, slack))
        assert check.state == "met" and check.by == "statistics"
        assert seen <= most


def test_a_tight_limit_is_decided_late_however_healthy_the_device():
    """Three tenths of a point are 38 positions: a single sequence of 96 could use them up."""
    host, device = replayed(np.random.default_rng(0))
    seen, check = stop(device, order(SEQUENCES, 0), **sdt_check(host, 0.003))
    assert check.state == "met" and seen > SEQUENCES * 0.95


@pytest.mark.parametrize(("sdt", "most"), [(0.06, 40), (0.1, 20), (0.3, 7), (1.0, 4)])
def test_a_broken_device_fails_after_few_sequences(sdt, most):
    for seed in range(3):
        random = np.random.default_rng(seed)
        host, _ = replayed(random)
        device = random.binomial(LENGTH, sdt, SEQUENCES).astype(float)
        seen, check = stop(
            device, order(SEQUENCES, seed), **sdt_check(host, 0.003, alpha_missed=0.01)
        )
        assert check.state == "missed" and seen <= most


def test_a_prediction_makes_the_verdict_earlier():
    """Sequences differ much, device and host little: the difference is what to look at."""
    random = np.random.default_rng(3)
    host = random.uniform(0, 1, 300)
    device = np.clip(host + random.normal(0, 0.01, 300), 0, 1)
    bounds = {"low": np.zeros(300), "high": np.ones(300)}
    limit = host.mean() - 0.05  # missed by more than the device's noise, less than the spread
    with_it, check = stop(device, order(300, 0), limit=limit, predicted=host, **bounds)
    assert check.state == "missed"
    without, _ = stop(device, order(300, 0), limit=limit, predicted=np.full(300, 0.5), **bounds)
    assert with_it < 0.75 * without


# --- several checks -------------------------------------------------------------------------


def two_checks(slack):
    host, device = replayed(np.random.default_rng(4))
    fdt_host = np.maximum(LENGTH - 10 * host, 0)
    fdt = np.maximum(LENGTH - 10 * device, 0)
    zeros, lengths = np.zeros(SEQUENCES), np.full(SEQUENCES, float(LENGTH))
    checks = {
        "sdt": sdt_check(host, slack),
        "fdt": {
            "limit": fdt_host.mean() - 25, "predicted": fdt_host, "low": zeros, "high": lengths,
            "relation": "at least",
        },
    }  # fmt: skip
    return checks, device, fdt


def test_all_must_be_met_to_pass():
    checks, sdt, fdt = two_checks(0.05)
    both, alone = Sequential(checks), {name: MeanCheck(**c) for name, c in checks.items()}
    for row in order(SEQUENCES, 0):
        values = {"sdt": sdt[row], "fdt": fdt[row]}
        passed = both.update(int(row), values)
        for name, check in alone.items():
            check.update(int(row), values[name])
        assert (passed is True) == all(c.state == "met" for c in alone.values())
        if passed is not None:
            break
    assert passed is True and both.by == "statistics"
    assert 10 < alone["sdt"].seen < SEQUENCES


def test_one_missed_check_is_enough_to_fail_and_each_has_a_share_of_alpha():
    checks, _, fdt = two_checks(0.05)
    both, alone = Sequential(checks), MeanCheck(**checks["sdt"], alpha_missed=0.025)
    for row in order(SEQUENCES, 0):
        passed = both.update(int(row), {"sdt": 30.0, "fdt": fdt[row]})
        alone.update(int(row), 30.0)
        assert (passed is False) == (alone.state == "missed")
        if passed is not None:
            break
    assert passed is False and both.checks["fdt"].state == "open"
    assert both.by == "statistics" and alone.seen < 10


def test_arithmetic_corrects_statistics_in_the_end():
    """A verdict by statistics may be wrong; with all sequences seen it is not."""
    n = 100
    values = np.zeros(n)
    values[:6] = 1
    check = MeanCheck(0.05, np.zeros(n), np.zeros(n), np.ones(n))
    states = [check.update(row, values[row]) for row in reversed(range(n))]
    assert "met" in states and check.state == "missed" and check.by == "arithmetic"


# --- order and misuse -----------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(0, 2**32))
def test_order_is_a_permutation_that_the_seed_fixes(n, seed):
    rows = order(n, seed)
    assert sorted(rows) == list(range(n))
    np.testing.assert_array_equal(rows, order(n, seed))


def test_orders_of_different_seeds_are_uniform():
    first = np.bincount([order(5, seed)[0] for seed in range(2000)], minlength=5)
    # Five standard deviations of a binomial around 400.
    assert (np.abs(first - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"predicted": [0.5]}, {"predicted": [0.5, 1.5]}, {"predicted": [0.5, np.nan]},
        {"low": [0.0, 0.6]}, {"weights": [0.0, 0.0]}, {"weights": [1.0, -1.0]}, {"alpha": 0.0},
        {"alpha_missed": 1.0}, {"limit": np.nan}, {"relation": "below"},
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change):
    fine = {"limit": 0.5, "predicted": [0.5, 0.5], "low": [0.0, 0.0], "high": [1.0, 1.0]}
    MeanCheck(**fine)
    with pytest.raises(ValueError, match="fit|within its bounds|finite|relation|out of range"):
        MeanCheck(**(fine | change))


def test_a_sequence_counts_once_and_within_its_bounds():
    check = MeanCheck(0.5, [0.5, 0.5], [0.0, 0.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="outside its bounds"):
        check.update(0, 1.5)
    with pytest.raises(ValueError, match="outside its bounds"):
        check.update(0, float("nan"))
    check.update(0, 0.7)
    for row in (0, 2, -1):
        with pytest.raises(ValueError, match="seen before or does not exist"):
            check.update(row, 0.5)
    with pytest.raises(ValueError, match="no checks"):
        Sequential({})
    both = Sequential({"a": {"limit": 0.5, "predicted": [0.5], "low": [0.0], "high": [1.0]}})
    with pytest.raises(ValueError, match="wanted for"):
        both.update(0, {"b": 0.5})
