"""Numbers as people read them, and numbers out of free-form JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

NOTHING = "–"
# Label, key in a verdict's performance, scale, digits.
SPEEDS = (
    ("prefill, tokens/s", "prefill_tokens_per_s", 1, 1),
    ("decode, tokens/s", "decode_tokens_per_s", 1, 1),
    ("time to first token, s", "time_to_first_token_s", 1, 2),
    ("decoded token, ms, p50", "p50_ms", 1, 1),
    ("decoded token, ms, p95", "p95_ms", 1, 1),
    ("peak memory, MB", "peak_rss_bytes", 1e-6, 0),
)


def number(data: object, *path: str) -> float | None:
    """The finite number at a path of a JSON object, None where there is none."""
    for name in path:
        if not isinstance(data, Mapping):
            return None
        data = data.get(name)
    if isinstance(data, bool) or not isinstance(data, (int, float)) or not math.isfinite(data):
        return None
    return float(data)


def share(value: float | None, digits: int = 2) -> str:
    # No line may break before the sign.
    return NOTHING if value is None else f"{value * 100:.{digits}f}\u00a0%"


def plain(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """Two significant digits, for figures over many orders."""
    return NOTHING if value is None else f"{value:.2g}"


def megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB"


def interval(data: object, name: str, percent: bool) -> tuple[str, str]:
    """(value, `2.20 to 3.05`), the second empty where there is no interval."""
    value, low, high = (number(data, name, key) for key in ("value", "low", "high"))
    shown = share(value) if percent else plain(value)
    return shown, "" if low is None or high is None else between(low, high, percent)


def between(low: float, high: float, percent: bool) -> str:
    """`2.20 to 3.05`."""
    scale, digits = (100, 2) if percent else (1, 1)
    return f"{low * scale:.{digits}f} to {high * scale:.{digits}f}"


def plural(count: int, one: str) -> str:
    return f"{count:,} {one if count == 1 else one + 's'}"


def spelled(value: Any) -> str:
    """A value of free-form JSON in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
