"""Healthy devices drawn in another way, through the verdict that is made for them."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.core.metrics import compare, top_kl
from edge_dtm.device.judge import evidence_of, judge
from edge_dtm.formats.thresholds import thresholds_from, tolerance_of_kernels

SEQUENCES, TOKENS, K = 40, 32, 8


def host_run(seed):
    """(top ids, top logits falling, lengths) of a host; margins as a language model has them."""
    random = np.random.default_rng(seed)
    gaps = random.gamma(0.8, 2.5, (SEQUENCES, TOKENS, K)).astype(np.float32)
    gaps[..., 0] = 0
    logits = 20 - np.cumsum(gaps, axis=-1)
    ids = random.permuted(np.broadcast_to(np.arange(100), (SEQUENCES, TOKENS, 100)), axis=-1)[
        ..., :K
    ]
    return ids, logits, random.integers(TOKENS // 2, TOKENS + 1, SEQUENCES)


def device(ids, logits, sigma, seed):
    """What a device says whose logits are off by sigma: (ids, KL of each position)."""
    noise = np.random.default_rng(seed).normal(0, sigma, logits.shape)
    said = np.take_along_axis(ids, (logits + noise).argmax(-1)[..., None], -1)[..., 0]
    return said, top_kl(logits, logits + noise)


def verdict(reference, ids, logits, lengths, sigma, seed, quantized=False):
    said, kl = device(ids, logits, sigma, seed)
    host = ids[..., 0]
    found = compare(reference, host, lengths)
    limits = thresholds_from(
        found, tolerance_of_kernels(reference, ids, logits, lengths), quantized
    )
    margins = logits[..., 0] - logits[..., 1]
    original = SimpleNamespace(generated_ids=reference, generated_lengths=lengths, margins=margins)
    runs = [
        SimpleNamespace(ids=i, top_logits=logits, lengths=lengths, mode="teacher_forced")
        for i in (host, said)
    ]
    evidence = evidence_of(original, *runs, kl, 0.0, limits.decided_margin)
    return *judge(evidence, limits, host_meets=True)[::2], evidence.host.kl_vs_host_nats


def test_healthy_f16_devices_pass_and_worse_ones_fail():
    """A file like the original: the host never differs from it, so its own interval has no width."""
    ids, logits, lengths = host_run(0)
    healthy = [verdict(ids[..., 0], ids, logits, lengths, 0.03, seed) for seed in range(20)]
    assert all(passed for passed, _, _ in healthy)
    assert 5e-5 < np.mean([kl for _, _, kl in healthy]) < 4e-4
    worse = [verdict(ids[..., 0], ids, logits, lengths, 0.3, seed) for seed in range(20)]
    assert not any(passed for passed, _, _ in worse)
    assert {diagnosis.code for _, diagnosis, _ in worse} == {"broken_kernels"}


@pytest.mark.parametrize("kl_nats", [1e-5, 4e-4, 5e-3])
def test_the_noise_has_the_kl_that_was_asked_for(kl_nats):
    """Devices found by trying sigmas until their KL is right lie within the range as often as said."""
    ids, logits, lengths = host_run(1)
    counted = np.arange(TOKENS)[None] < lengths[:, None]
    low, high = 1e-5, 3.0
    for _ in range(40):
        sigma = (low * high) ** 0.5
        mean = np.mean([device(ids, logits, sigma, s)[1][counted].mean() for s in range(5)])
        low, high = (sigma, high) if mean < kl_nats else (low, sigma)
    limits = tolerance_of_kernels(ids[..., 0], ids, logits, lengths, kl_nats)
    runs = [compare(ids[..., 0], device(ids, logits, sigma, 100 + s)[0], lengths)
            for s in range(200)]  # fmt: skip
    assert 0.95 <= np.mean([r.sdt.value <= limits.sdt for r in runs]) <= 1
    assert 0.95 <= np.mean([r.fdt.value >= limits.fdt for r in runs]) <= 1
    # And it is no more room than that takes.
    assert limits.sdt <= max(r.sdt.value for r in runs) * 1.1
    assert limits.fdt >= min(r.fdt.value for r in runs) * 0.9


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(0, 0.5))
def test_without_noise_it_is_the_hosts_own_figures(seed, share):
    ids, logits, lengths = host_run(seed)
    random = np.random.default_rng(seed)
    reference = np.where(random.random(ids.shape[:2]) < share, 1000, ids[..., 0])
    logits[..., 1:] -= 1e-3  # no exact ties
    own = compare(reference, ids[..., 0], lengths)
    found = tolerance_of_kernels(reference, ids, logits, lengths, kl_nats=0.0)
    assert (found.sdt, found.fdt) == pytest.approx((own.sdt.value, own.fdt.value))


def test_more_noise_is_more_room_and_the_same_seed_the_same():
    ids, logits, lengths = host_run(2)
    found = [
        tolerance_of_kernels(ids[..., 0], ids, logits, lengths, kl) for kl in (0, 1e-4, 1e-3, 1e-2)
    ]
    assert [f.sdt for f in found] == sorted({f.sdt for f in found})
    assert [f.fdt for f in found] == sorted({f.fdt for f in found}, reverse=True)
    assert found[2] == tolerance_of_kernels(ids[..., 0], ids, logits, lengths, 1e-3)


def test_a_host_that_is_always_sure_leaves_no_room():
    ids, logits, lengths = host_run(3)
    logits[..., 1:] = -1e4
    found = tolerance_of_kernels(ids[..., 0], ids, logits, lengths)
    assert found.sdt == 0 and found.fdt == lengths.mean()
