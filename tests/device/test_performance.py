"""Speed, memory and energy of a model, and what `bench` says about them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_dtm.cli import main
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.device import performance as module
from edge_dtm.device.performance import Performance, ThreadSpeed, estimated_tokens_per_s, in_words
from edge_dtm.formats.archive import pack
from edge_dtm.formats.profile import DeviceProfile, load_profile
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp.gguf_header import kv_bytes_per_token, read_header

SETTINGS = RunSettings(threads=1, parallel_sequences=1)


@pytest.fixture
def performance() -> Performance:
    """Of a Raspberry Pi 5 that is as fast as estimated: 9.8e9 / (98e6 + 160 x 12,500) = 98."""
    return Performance(
        model_bytes=98_000_000,
        kv_bytes_per_token=12_500,
        bytes_by_type={"Q8_0": 90_000_000},
        threads=4,
        prompt_tokens=128,
        decoded_tokens=64,
        prefill_tokens_per_s=300.0,
        decode_tokens_per_s=98.0,
        time_to_first_token_s=0.4,
        decode_ms_p50=10.0,
        decode_ms_p95=12.0,
        peak_rss_bytes=200_000_000,
        sweep=(),
        power_sensor=None,
        energy_j_per_token=None,
        mean_power_w=None,
        temperatures_c_before={},
        temperatures_c_after={},
        throttled_before=[],
        throttled_after=[],
        throttle_events=None,
        clock_share=None,
        absent=[],
    )


@pytest.fixture
def pi() -> DeviceProfile:
    return load_profile("raspberrypi")


def test_the_estimate_is_bandwidth_over_bytes(performance: Performance, pi: DeviceProfile) -> None:
    assert estimated_tokens_per_s(performance, pi) == pytest.approx(9.8e9 / 100e6)
    (sentence,) = in_words(performance, pi)
    assert "as estimated" in sentence and "98.0 tokens/s, estimated 98.0 (100%)" in sentence
    assert in_words(performance, None) == []


def test_why_it_may_be_slower(performance: Performance, pi: DeviceProfile) -> None:
    slow = dataclasses.replace(
        performance,
        decode_tokens_per_s=4.9,
        bytes_by_type={"Q4_1": 60, "Q8_0": 40},
        threads=2,
        clock_share=0.6,
        throttled_after=["voltage too low"],
        throttle_events=3,
        absent=["temperature: not there"],
    )
    text = "\n".join(in_words(slow, pi))
    for part in (
        "slower than estimated",
        "4.9 tokens/s, estimated 98.0 (5%)",
        "60% of the matrices' bytes are of types without fast kernels there (Q4_1)",
        "meant for 4 threads, here ran 2",
        "clock was at 60%",
        "misses the 5.2 tokens/s",
        "The device reports: voltage too low.",
        "throttled for heat 3 times",
        "Absent: temperature: not there.",
    ):
        assert part in text
    fast = dataclasses.replace(slow, decode_tokens_per_s=200.0)
    text = "\n".join(in_words(fast, pi))
    assert "faster than estimated" in text
    assert "Q4_1" not in text and "misses" not in text


def test_measured_here(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sys/class/powercap/intel-rapl:0"
    folder.mkdir(parents=True)
    for name, text in [("name", "package-0"), ("energy_uj", "5"), ("max_energy_range_uj", "9")]:
        (folder / name).write_text(text)  # a counter that stands still
    p = module.measure(tiny_gguf, SETTINGS, 1e-6, root=tmp_path)
    assert p.model_bytes == tiny_gguf.stat().st_size < p.peak_rss_bytes
    assert p.decoded_tokens == module.DECODE_TOKENS
    # 2 layers x (K and V) x 2 KV heads x 64 x 2 bytes
    assert p.kv_bytes_per_token == 2 * 2 * 2 * 64 * 2
    assert set(p.bytes_by_type) == {"F32"}
    assert 0 < p.decode_ms_p50 <= p.decode_ms_p95
    assert p.prefill_tokens_per_s == pytest.approx(p.prompt_tokens / p.time_to_first_token_s)
    assert p.energy_j_per_token == 0 and p.power_sensor == "RAPL, CPU packages"
    assert p.sweep == ()
    assert {a.split(":")[0] for a in p.absent} == {"clock", "temperature", "throttling"}


def test_a_sweep_measures_the_fastest(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_SECONDS", 1e-6)
    real = module._thread_speed
    slower = {1: 1.0, 2: 1e9, 3: 2.0}
    monkeypatch.setattr(
        module,
        "_thread_speed",
        lambda runner, n: dataclasses.replace(real(runner, n), decode_tokens_per_s=slower[n]),
    )
    p = module.measure(tiny_gguf, SETTINGS, 1e-6, [1, 2, 3], tmp_path)
    assert [s.threads for s in p.sweep] == [1, 2, 3] and p.threads == 2
    assert "2 of 1, 2, 3 threads decode fastest." in in_words(p, None)
    assert p.energy_j_per_token is None and p.mean_power_w is None and p.power_sensor is None


@pytest.fixture
def fake_measure(
    monkeypatch: pytest.MonkeyPatch, performance: Performance
) -> list[tuple[object, ...]]:
    """The command without its measuring; the calls to it."""
    asked: list[tuple[object, ...]] = []

    def measure(path: Path, *args: object) -> Performance:
        assert read_header(path).tensors
        asked.append(args)
        return dataclasses.replace(performance, sweep=(ThreadSpeed(1, 8.0, 7.0),))

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr("edge_dtm.device.first_decode.first_decode_in_child", lambda: None)
    return asked


@pytest.mark.parametrize("kind", ["gguf", "folder", "packed"])
def test_bench_takes_a_model_in_any_form(
    tiny_gguf: Path, tiny_bundle: Path, tmp_path: Path, fake_measure: list[tuple[object, ...]],
    kind: str,
) -> None:  # fmt: skip
    source = {"gguf": tiny_gguf, "folder": tiny_bundle, "packed": tmp_path / "tiny.edge"}[kind]
    if kind == "packed":
        pack(tiny_bundle, source)
    out = tmp_path / "out.json"
    words = ["bench", str(source), "--profile", "raspberrypi", "--seconds", "3", "--threads", "2"]
    result = CliRunner().invoke(main, [*words, "--threads-sweep", "--json", str(out)])
    assert result.exit_code == 0, result.output
    settings, seconds, sweep = fake_measure[0]
    assert settings == dataclasses.replace(SETTINGS, threads=2)
    assert seconds == 3 and sweep == range(1, 3)
    assert "98.0" in result.output and "as estimated" in " ".join(result.output.split())
    data = json.loads(out.read_text())
    assert data["profile"] == "raspberrypi"
    assert data["estimated_decode_tokens_per_s"] == pytest.approx(98)
    assert data["sentences"]


def test_bench_takes_the_bundles_own_profile(
    tiny_bundle: Path, fake_measure: list[tuple[object, ...]]
) -> None:
    manifest = tiny_bundle / "manifest.json"
    data = json.loads(manifest.read_text())
    for name, shown in [("rk3588", True), ("../rk3588", False), (["x"], False)]:
        data["provenance"]["profile"] = name
        manifest.write_text(json.dumps(data))
        result = CliRunner().invoke(main, ["bench", str(tiny_bundle)])
        assert result.exit_code == 0, result.output
        assert ("rk3588" in result.output) is shown
    assert fake_measure[0][2] == ()


def test_bench_refuses_in_one_line(tiny_gguf: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with (tiny_bundle / "model.gguf").open("ab") as file:
        file.write(b"x")
    for words in (
        [str(tmp_path / "none.gguf")],
        [str(tiny_gguf), "--profile", "toaster"],
        [str(tiny_gguf), "--json", str(tmp_path / "no" / "folder.json")],
        [str(tiny_bundle)],
    ):
        result = CliRunner().invoke(main, ["bench", *words])
        assert result.exit_code == 1
        assert result.output.count("\n") == 1 and result.output.startswith("error: ")


@pytest.mark.parametrize("wrong", ["three", 2.5, -1, (1, 2)])
def test_numbers_of_a_head_that_are_none(tiny_gguf: Path, wrong: Any) -> None:
    header = read_header(tiny_gguf)
    broken = dataclasses.replace(header, values={**header.values, "llama.block_count": wrong})
    with pytest.raises(EdgeDtmError, match="block_count' is no whole number"):
        kv_bytes_per_token(broken, "F16")
