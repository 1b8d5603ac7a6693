"""What a treatment bought: the words for it, and the numbers behind them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_dtm.device.probe import Probed
from edge_dtm.formats.record import RunSettings
from edge_dtm.formats.transfer import packed_bytes
from edge_dtm.host import bought as module
from edge_dtm.host.bought import ROUNDS, SAME, Weighed, in_words, weigh

PLAIN = Weighed(100_000_000, 90_000_000, 200_000_000, 500.0, 40.0, 39.0, 41.0)


def _with(**changes: Any) -> Weighed:
    return dataclasses.replace(PLAIN, **changes)


def _parts(with_it: Weighed, without: Weighed = PLAIN) -> list[str]:
    text = in_words("zeros", with_it, without)
    head = "Measured against the same model without zeros: "
    assert text.startswith(head) and text.endswith(".") and "\n" not in text
    parts = text.removeprefix(head).removesuffix(".").split("; ")
    assert len(parts) == 4
    return parts


def test_nothing_bought() -> None:
    assert _parts(PLAIN) == [
        "what travels after zstd is the same (90.0 MB against 90.0)",
        "the file is the same (100.0 MB against 100.0)",
        "peak memory is the same (200.0 MB against 200.0)",
        "decoding is the same (40.0 tokens/s against 40.0)",
    ]


def test_lower_and_higher() -> None:
    packed, file, peak, speed = _parts(
        _with(
            packed_bytes=45_000_000,
            file_bytes=150_000_000,
            peak_rss_bytes=180_000_000,
            decode_tokens_per_s=60.0,
            slowest_decode_tokens_per_s=58.0,
            fastest_decode_tokens_per_s=61.0,
        )
    )
    assert packed == "what travels after zstd is 50% lower (45.0 MB against 90.0)"
    assert file == "the file is 50% higher (150.0 MB against 100.0)"
    assert peak == "peak memory is 10% lower (180.0 MB against 200.0)"
    assert speed == "decoding is 50% higher (60.0 tokens/s against 40.0)"


@pytest.mark.parametrize("sign", [-1, 1])
def test_what_noise_may_be_is_the_same(sign: int) -> None:
    for change, same in ((0.9 * SAME, True), (1.1 * SAME, False)):
        parts = _parts(_with(peak_rss_bytes=round(200e6 * (1 + sign * change))))
        assert parts[2].startswith("peak memory is the same") == same
        assert same or ("higher" if sign > 0 else "lower") in parts[2]


@pytest.mark.parametrize(
    ("slowest", "fastest", "overlaps"),
    [(50.0, 70.0, False), (40.0, 70.0, True), (41.5, 70.0, False)],
)
def test_rounds_that_overlap_tell_no_difference(
    slowest: float, fastest: float, overlaps: bool
) -> None:
    other = _with(
        decode_tokens_per_s=60.0,
        slowest_decode_tokens_per_s=slowest,
        fastest_decode_tokens_per_s=fastest,
    )
    for a, b, word in ((other, PLAIN, "higher"), (PLAIN, other, "lower")):
        text = _parts(a, b)[3]
        assert (
            (word not in text and "the same within the spread" in text)
            if overlaps
            else word in text
        )


def test_medians_of_rounds_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ROUNDS == 3
    paths = {n: tmp_path / n for n in ("a", "b")}
    for n, path in paths.items():
        path.write_bytes(n.encode() * 1000)
    asked: list[str] = []
    speeds = iter([5.0, 50.0, 9.0, 10.0, 7.0, 90.0])

    def measured(path: Path, settings: RunSettings) -> Probed:
        asked.append(path.name)
        return Probed(len(asked), 2.0 * len(asked), next(speeds))

    monkeypatch.setattr(module, "probe", measured)
    done: list[int] = []
    found = weigh(paths, RunSettings(threads=1), done.append)
    assert asked == ["a", "b"] * 3 and done == [1] * 3
    a = found["a"]
    assert (a.slowest_decode_tokens_per_s, a.decode_tokens_per_s) == (5, 7)
    assert (a.fastest_decode_tokens_per_s, a.peak_rss_bytes, a.prefill_tokens_per_s) == (9, 3, 6)
    assert (found["b"].decode_tokens_per_s, found["b"].peak_rss_bytes) == (50, 4)
    assert a.file_bytes == 1000 and a.packed_bytes == packed_bytes(paths["a"])
    assert json.loads(json.dumps(a.to_json())) == dataclasses.asdict(a)


def test_two_models(
    tiny_gguf: Path,
    make_tiny_gguf: Callable[[Path, int], None],
    tiny_settings: RunSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real thing, of two models that differ in nothing but their numbers."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    make_tiny_gguf(tmp_path / "other.gguf", 1)
    found = weigh({"with": tiny_gguf, "without": tmp_path / "other.gguf"}, tiny_settings)
    assert list(found) == ["with", "without"]
    for w in found.values():
        assert 0 < w.packed_bytes < w.file_bytes < w.peak_rss_bytes
        assert (
            0
            < w.slowest_decode_tokens_per_s
            <= w.decode_tokens_per_s
            <= w.fastest_decode_tokens_per_s
        )
        assert w.prefill_tokens_per_s > 0
    parts = _parts(found["with"], found["without"])
    assert all("is the same" in p for p in parts[:3])
