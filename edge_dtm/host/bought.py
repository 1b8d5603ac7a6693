"""What a treatment bought: a model and its twin without the treatment, measured side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edge_dtm.device.probe import probe
from edge_dtm.formats.record import RunSettings
from edge_dtm.formats.transfer import packed_bytes

ROUNDS = 3  # taken in turns, so that whatever else the machine does hits all alike
SAME = 0.03  # medians of three rounds differ by this much between equal files


@dataclass(frozen=True)
class Weighed:
    """Bytes of the file, of the file after zstd, peak resident bytes, tokens per second: medians
    of the rounds, for decoding their extremes too."""

    file_bytes: int
    packed_bytes: int
    peak_rss_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    slowest_decode_tokens_per_s: float
    fastest_decode_tokens_per_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def weigh(
    models: Mapping[str, Path],
    settings: RunSettings,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Weighed]:
    """Each model in processes of its own, ROUNDS times in turns. progress: called with rounds."""
    rounds = []
    for _ in range(ROUNDS):
        rounds.append({name: probe(path, settings) for name, path in models.items()})
        if progress:
            progress(1)
    return {
        name: Weighed(
            path.stat().st_size,
            packed_bytes(path),
            round(median(r[name].peak_rss_bytes for r in rounds)),
            median(r[name].prefill_tokens_per_s for r in rounds),
            median(r[name].decode_tokens_per_s for r in rounds),
            min(r[name].decode_tokens_per_s for r in rounds),
            max(r[name].decode_tokens_per_s for r in rounds),
        )
        for name, path in models.items()
    }


def in_words(what: str, with_it: Weighed, without: Weighed) -> str:
    """One sentence: what it bought of each currency."""

    # Rounds that overlap tell no difference.
    overlap = (
        with_it.slowest_decode_tokens_per_s <= without.fastest_decode_tokens_per_s
        and without.slowest_decode_tokens_per_s <= with_it.fastest_decode_tokens_per_s
    )

    def bought(
        label: str, here: float, there: float, unit: str, scale: float, same: bool = False
    ) -> str:
        change = here / there - 1
        values = f"{here / scale:,.1f} {unit} against {there / scale:,.1f}"
        if abs(change) < SAME:
            return f"{label} is the same ({values})"
        if same:
            return f"{label} is the same within the spread of its rounds ({values})"
        return f"{label} is {abs(change):.0%} {'lower' if change < 0 else 'higher'} ({values})"

    parts = [
        bought("what travels after zstd", with_it.packed_bytes, without.packed_bytes, "MB", 1e6),
        bought("the file", with_it.file_bytes, without.file_bytes, "MB", 1e6),
        bought("peak memory", with_it.peak_rss_bytes, without.peak_rss_bytes, "MB", 1e6),
        bought(
            "decoding",
            with_it.decode_tokens_per_s,
            without.decode_tokens_per_s,
            "tokens/s",
            1,
            overlap,
        ),
    ]  # fmt: skip
    return f"Measured against the same model without {what}: {'; '.join(parts)}."
