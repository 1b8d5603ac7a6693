"""How fast, how large and how hungry a model is on this device, against its profile's estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_dtm.core.machine import peak_rss_bytes
from edge_dtm.device.sensors import Sampler, condition, find_power
from edge_dtm.formats.profile import DeviceProfile
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp.gguf_header import Header, kv_bytes_per_token, read_header
from edge_dtm.llamacpp.runner import LlamaRunner, Timing
from edge_dtm.search.budget import estimate_decode_tokens_per_s

SCHEMA_VERSION = 1
PROMPT_TOKENS, DECODE_TOKENS = 128, 64
CONTEXT_TOKENS = PROMPT_TOKENS + DECODE_TOKENS
SWEEP_SECONDS = 2.0  # of decoding, for each number of threads
MOST_ROUNDS = 1000
# Measured against estimate: what differs by less is called equal, and a clock below 1 - this share
# of its maximum is named as a reason.
TOLERANCE = 0.1


@dataclass(frozen=True)
class ThreadSpeed:
    """Tokens per second with a number of threads."""

    threads: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Performance:
    """Rounds of a prompt and tokens decoded behind it, one a call.

    Speeds in tokens per second over all rounds. time_to_first_token_s: of a prompt of
    prompt_tokens, median of the rounds, the model being loaded. decode_ms_p50, decode_ms_p95:
    milliseconds of one decoded token. peak_rss_bytes: of the whole process. bytes_by_type: of the
    matrices, by GGML type. sweep: other numbers of threads that were tried, () without.
    energy_j_per_token, mean_power_w: of the power sensor's whole range, while decoding. clock_share:
    mean of the fastest CPU's clock while decoding, over its maximum. throttle_events: thermal ones
    of all cores during the run. None where absent says why.
    """

    model_bytes: int
    kv_bytes_per_token: int
    bytes_by_type: dict[str, int]
    threads: int
    prompt_tokens: int
    decoded_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_s: float
    decode_ms_p50: float
    decode_ms_p95: float
    peak_rss_bytes: int
    sweep: tuple[ThreadSpeed, ...]
    power_sensor: str | None
    energy_j_per_token: float | None
    mean_power_w: float | None
    temperatures_c_before: dict[str, float]
    temperatures_c_after: dict[str, float]
    throttled_before: list[str]
    throttled_after: list[str]
    throttle_events: int | None
    clock_share: float | None
    absent: list[str]

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "kind": "edge-dtm performance", **asdict(self)}


def measure(
    path: Path,
    settings: RunSettings,
    seconds: float,
    sweep: Sequence[int] = (),
    root: Path = Path("/"),
) -> Performance:
    """Load the model and decode for about so many seconds, a round at least.

    sweep: numbers of threads to try first; the fastest in decoding is then measured, instead of
    settings.threads. root: where the sensors are.
    """
    header = read_header(path)
    sensor, absent = find_power(root)
    before = condition(root)
    sampler = Sampler(sensor, root)
    with LlamaRunner(path, settings, CONTEXT_TOKENS) as runner:
        runner.time_decoding(16, 2)  # the first touch of the weights
        speeds = tuple(_thread_speed(runner, n) for n in sweep)
        if speeds:
            settings = replace(settings, threads=_fastest(speeds).threads)
            runner.set_threads(settings.threads)
        timings = _rounds(runner, seconds, sampler)
    after = condition(root)
    events = None
    if before.throttle_count is not None and after.throttle_count is not None:
        events = after.throttle_count - before.throttle_count
    if sampler.failure:
        absent.append(sampler.failure)
    if not sampler.clock_shares:
        absent.append("clock: not there (no cpufreq in sys/devices/system/cpu)")
    joules, (prefill, decode) = sampler.joules, _speeds(timings)
    each_s = np.array([second for timing in timings for second in timing.decode_s])
    return Performance(
        model_bytes=header.file_bytes,
        kv_bytes_per_token=kv_bytes_per_token(header, settings.kv_type),
        bytes_by_type=_bytes_by_type(header),
        threads=settings.threads,
        prompt_tokens=PROMPT_TOKENS,
        decoded_tokens=len(each_s),
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        time_to_first_token_s=float(np.median([t.prefill_s for t in timings])),
        decode_ms_p50=float(np.percentile(each_s, 50)) * 1e3,
        decode_ms_p95=float(np.percentile(each_s, 95)) * 1e3,
        peak_rss_bytes=peak_rss_bytes(),
        sweep=speeds,
        power_sensor=None if sensor is None or joules is None else sensor.name,
        energy_j_per_token=None if joules is None else joules / len(each_s),
        mean_power_w=None if joules is None else joules / sampler.seconds,
        temperatures_c_before=before.temperatures_c,
        temperatures_c_after=after.temperatures_c,
        throttled_before=before.throttled,
        throttled_after=after.throttled,
        throttle_events=events,
        clock_share=float(np.mean(sampler.clock_shares)) if sampler.clock_shares else None,
        absent=absent + before.absent,
    )


def _rounds(runner: LlamaRunner, seconds: float, sampler: Sampler | None = None) -> list[Timing]:
    """Prompts with decoding behind them, which takes about so many seconds."""
    timings: list[Timing] = []
    for _ in range(MOST_ROUNDS):
        timings.append(runner.time_decoding(PROMPT_TOKENS, DECODE_TOKENS, sampler))
        if sum(sum(t.decode_s) for t in timings) >= seconds:
            break
    return timings


def _thread_speed(runner: LlamaRunner, threads: int) -> ThreadSpeed:
    runner.set_threads(threads)
    runner.time_decoding(16, 2)
    return ThreadSpeed(threads, *_speeds(_rounds(runner, SWEEP_SECONDS)))


def _speeds(timings: Sequence[Timing]) -> tuple[float, float]:
    """Tokens per second of prompts and of decoding, over all rounds."""
    prefill_s, decode_s = sum(t.prefill_s for t in timings), sum(sum(t.decode_s) for t in timings)
    return PROMPT_TOKENS * len(timings) / prefill_s, DECODE_TOKENS * len(timings) / decode_s


def _fastest(sweep: Sequence[ThreadSpeed]) -> ThreadSpeed:
    return max(sweep, key=lambda speed: speed.decode_tokens_per_s)


def _bytes_by_type(header: Header) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size_bytes
    return dict(sorted(sizes.items()))


def estimated_tokens_per_s(performance: Performance, profile: DeviceProfile) -> float:
    """The profile's decoding speed for this file, at the mean fill of the KV cache here."""
    filled = performance.prompt_tokens + DECODE_TOKENS // 2
    return estimate_decode_tokens_per_s(
        profile, performance.model_bytes, performance.kv_bytes_per_token * filled
    )


def in_words(performance: Performance, profile: DeviceProfile | None) -> list[str]:
    """Sentences: the speed against the estimate and the wish, what may slow it, what is absent."""
    out = []
    p = performance
    if profile is not None:
        estimate = estimated_tokens_per_s(p, profile)
        share = p.decode_tokens_per_s / estimate
        values = f"{p.decode_tokens_per_s:.1f} tokens/s, estimated {estimate:.1f} ({share:.0%})"
        slower = share < 1 - TOLERANCE
        word = "slower than" if slower else "faster than" if share > 1 + TOLERANCE else "as"
        out.append(
            f"Decoding is {word} estimated from the memory bandwidth of profile {profile.name}: "
            f"{values}."
        )
        if slower:
            out += _reasons(p, profile)
        if p.decode_tokens_per_s < profile.wanted_tokens_per_s:
            out.append(
                f"It misses the {profile.wanted_tokens_per_s:g} tokens/s that the profile wants."
            )
    if p.throttled_after:
        out.append(f"The device reports: {', '.join(p.throttled_after)}.")
    if p.throttle_events:
        out.append(f"Its cores were throttled for heat {p.throttle_events} times during the run.")
    if p.sweep:
        numbers = ", ".join(str(s.threads) for s in p.sweep)
        out.append(f"{_fastest(p.sweep).threads} of {numbers} threads decode fastest.")
    return out + [f"Absent: {each}." for each in p.absent]


def _reasons(p: Performance, profile: DeviceProfile) -> list[str]:
    out = []
    slow = {t: n for t, n in p.bytes_by_type.items() if t not in profile.fast_types}
    if slow:
        share = sum(slow.values()) / sum(p.bytes_by_type.values())
        out.append(
            f"{share:.0%} of the matrices' bytes are of types without fast kernels there "
            f"({', '.join(slow)})."
        )
    if p.threads != profile.threads:
        out.append(f"The profile is meant for {profile.threads} threads, here ran {p.threads}.")
    if p.clock_share is not None and p.clock_share < 1 - TOLERANCE:
        out.append(f"The clock was at {p.clock_share:.0%} of its maximum.")
    return out
