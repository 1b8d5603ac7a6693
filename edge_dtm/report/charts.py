"""The page's charts: numbers in, inline SVG out.

They are drawn 360 units wide, about the pixels a phone has, so that their text is readable there;
colours are classes of report.css, and each series also has a number, for who cannot tell colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from edge_dtm.report.numbers import megabytes, plural

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 26, 38
COLOURS = 8  # classes s0 to s7 of report.css
FRONTIER_POINTS = 160  # more cannot be seen
_BARS = 12


@dataclass(frozen=True)
class Series:
    """What one file or device did, sequence by sequence.

    first: index of the first divergent token, the length where there is none; lengths: tokens.
    """

    label: str
    first: Sequence[int]
    lengths: Sequence[int]
    is_floor: bool = False


@dataclass(frozen=True)
class MeasuredFile:
    """A file's size in bytes and SDT, a share, with its interval where known."""

    label: str
    size_bytes: float
    sdt: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """words: the chart for who cannot see it; legend: number (None where the series has none),
    class and label of each series."""

    words: str
    drawing: Markup
    legend: Sequence[tuple[int | None, str, str]] = ()


def survival(first: Sequence[int], lengths: Sequence[int]) -> npt.NDArray[np.float64]:
    """Share of sequences still identical after 0, 1, 2, ... tokens.

    Sequences end at different lengths without having diverged, so this is the product-limit
    estimate (Kaplan and Meier 1958); with equal lengths it is the plain share. It stops where no
    sequence is left.
    """
    where, ends = np.asarray(first, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    out = [1.0]
    for t in range(int(ends.max(initial=0))):
        at_risk = int(((ends > t) & (where >= t)).sum())
        if not at_risk:
            break
        diverged = int(((where == t) & (where < ends)).sum())
        out.append(out[-1] * (1 - diverged / at_risk))
    return np.array(out)


def bins(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """(lowest, highest, how many) of counts, 0 by itself, the others in at most 11 equal steps."""
    largest = max(counts, default=0)
    step = next(
        s * 10**e for e in range(12) for s in (1, 2, 5) if largest <= s * 10**e * (_BARS - 1)
    )
    edges = [(0, 0)] + [(low, low + step - 1) for low in range(1, largest + 1, step)]
    return [(low, high, sum(low <= c <= high for c in counts)) for low, high in edges]


def histogram(counts: Sequence[int], axis: str, zero: str) -> Chart:
    """Bars of how many sequences have each count. axis: what is counted; zero: what 0 means."""
    bars = bins(counts)
    tallest = max(n for *_, n in bars) or 1
    scale = _Scale((0, len(bars)), (0, tallest * 1.08))
    parts = [scale.grid_y([t for t in ticks(0, tallest) if t == int(t)], whole)]
    width = (WIDTH - LEFT - RIGHT) / len(bars)
    every = 1 if width >= 30 or all(low == high for low, high, _ in bars) else 2
    for i, (low, high, n) in enumerate(bars):
        x, y = scale.x(i) + width * 0.08, scale.y(n)
        name = str(low) if low == high else f"{low}–{high}"
        parts.append(
            _svg(
                '<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" class="{}">'
                "<title>{} {}: {}</title></rect>",
                *(x, y, width * 0.84, scale.y(0) - y, "bar zero" if high == 0 else "bar"),
                *(axis, name, plural(n, "sequence")),
            )
        )
        if n:
            parts.append(_label(x + width * 0.42, y - 4, n, "middle", "count"))
        if i % every == 0:
            parts.append(_label(x + width * 0.42, HEIGHT - BOTTOM + 14, name, "middle"))
    none = bars[0][2]
    summary = f"{none} of {plural(len(counts), 'sequence')} {'has' if none == 1 else 'have'} {zero}"
    return Chart(
        f"Histogram over {len(counts)} sequences: {axis}. {summary}.",
        _joined([*parts, _axis_names("sequences", axis)]),
    )


def survival_curves(series: Sequence[Series]) -> Chart:
    """Share of sequences still identical against the position, a line each."""
    longest = max(max(s.lengths, default=1) for s in series)
    scale = _Scale((0, longest), (0, 1))
    lines = [
        scale.grid_y([0, 0.25, 0.5, 0.75, 1], lambda v: f"{v:.0%}"),
        scale.ticks_x(ticks(0, longest), whole),
    ]
    marks, legend, ends, colour = [], [], [], 0
    for i, one in enumerate(series):
        curve = survival(one.first, one.lengths)
        points = [(0.0, 1.0)]
        for t in range(1, len(curve)):
            points += [(float(t), float(curve[t - 1])), (float(t), float(curve[t]))]
        name = "floor" if one.is_floor else f"s{colour % COLOURS}"
        colour += not one.is_floor
        lines.append(scale.line(points, name))
        # Marks of curves that lie on one another stand beside each other.
        at = min(longest * (i + 0.5) / len(series), len(curve) - 1)
        marks.append(_mark(scale.x(at), scale.y(float(curve[int(at)])), i + 1, name))
        legend.append((i + 1, name, one.label))
        ends.append(f"{one.label} ends at {curve[-1]:.0%}")
    return Chart(
        "Survival curves, share of sequences still identical against the position in tokens: "
        f"{'; '.join(ends)}.",
        _joined([*lines, *marks, _axis_names("still identical", "position in tokens")]),
        legend,
    )


def frontier(
    points: Sequence[tuple[float, float]],
    chosen: tuple[float, float] | None,
    files: Sequence[MeasuredFile],
    floor: float | None,
) -> Chart:
    """File size in bytes against SDT, log scale.

    points: the predicted frontier; chosen: size and prediction of this plan; files: measured
    ones, this file first; floor: the noise floor's SDT.
    """
    points = _thinned([(size, sdt) for size, sdt in points if sdt > 0])
    sizes = [size for size, _ in [*points, *([chosen] if chosen else [])]]
    sizes += [f.size_bytes for f in files]
    shares = [sdt for _, sdt in points] + [v for f in files for v in (f.sdt, f.low, f.high) if v]
    shares += [v for v in (chosen[1] if chosen else 0, floor) if v]
    scale, lowest, axes = _frontier_axes(sizes, shares)
    parts = [axes]
    legend: list[tuple[int | None, str, str]] = []
    if floor:
        y = scale.y(floor)
        parts.append(_line(LEFT, WIDTH - RIGHT, y, y, "line floor"))
        legend.append((None, "floor", "noise floor: the uncompressed model in llama.cpp"))
    if points:
        parts.append(scale.line(points, "s0"))
        legend.append((None, "s0", "predicted frontier: the least SDT at each size"))
    if chosen and chosen[1] > 0:
        parts.append(
            _svg(
                '<circle cx="{:.2f}" cy="{:.2f}" r="6" class="ring s0"/>',
                scale.x(chosen[0]),
                scale.y(chosen[1]),
            )
        )
        legend.append((None, "ring s0", "this plan, predicted"))
    for i, file in enumerate(files):
        name, x = f"s{i % COLOURS}", scale.x(file.size_bytes)
        # What never diverged has no place on a log scale; it stands on the lower edge.
        if file.low is not None and file.high:
            low, high = (scale.y(max(v, lowest)) for v in (file.low, file.high))
            parts.append(_line(x, x, low, high, f"line {name}"))
        parts.append(_mark(x, scale.y(max(file.sdt, lowest)), i + 1, name))
        label = f"{file.label}: {megabytes(file.size_bytes)}, {file.sdt * 100:.2f} %"
        legend.append((i + 1, name, label))
    return Chart(
        f"File size against SDT. {'; '.join(label for *_, label in legend)}.",
        _joined([*parts, _axis_names("SDT, log scale", "file size in MB")]),
        legend,
    )


def _frontier_axes(sizes: Sequence[float], shares: Sequence[float]) -> tuple[_Scale, float, Markup]:
    """The scale, the share at its lower edge, and grid and ticks."""
    lowest, highest = min(shares, default=0.01) / 1.25, max(shares, default=0.1) * 1.25
    left, right = min(sizes), max(sizes)
    span = (right - left) or right * 0.1 or 1.0
    scale = _Scale((left - 0.03 * span, right + 0.05 * span), (lowest, highest), log_y=True)
    inside = [t * 1e6 for t in ticks(left / 1e6, right / 1e6)]
    grid = scale.grid_y(log_ticks(lowest, highest), lambda v: f"{v * 100:.3g} %")
    return scale, lowest, grid + scale.ticks_x(inside, lambda v: whole(v / 1e6))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about five."""
    raw = max(high - low, 1e-12) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * s for s in (1, 2, 5, 10) if size * s >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high, only the powers over many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 500 else (1,)
    return [t for p in powers for f in factors if low <= (t := f * 10.0**p) <= high]


def whole(value: float) -> str:
    return f"{value:,.6g}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    ordered = sorted(points)
    if len(ordered) <= FRONTIER_POINTS:
        return ordered
    keep = np.linspace(0, len(ordered) - 1, FRONTIER_POINTS).round().astype(int)
    return [ordered[i] for i in keep]


class _Scale:
    """Data to units of the drawing."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], log_y: bool = False) -> None:
        self._x, self._log = x, log_y
        self._y = (math.log(y[0]), math.log(y[1])) if log_y else y

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        value = math.log(value) if self._log else value
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Sequence[tuple[float, float]], name: str) -> Markup:
        path = "L".join(f"{self.x(x):.2f} {self.y(y):.2f}" for x, y in points)
        return _svg('<path d="M{}" class="line {}"/>', path, name)

    def grid_y(self, values: Sequence[float], name: Callable[[float], str]) -> Markup:
        parts = []
        for value in values:
            y = self.y(value)
            parts.append(_line(LEFT, WIDTH - RIGHT, y, y, "grid"))
            parts.append(_label(LEFT - 5, y + 4, name(value), "end"))
        return _joined(parts)

    def ticks_x(self, values: Sequence[float], name: Callable[[float], str]) -> Markup:
        y = HEIGHT - BOTTOM + 14
        return _joined([_label(self.x(v), y, name(v), "middle") for v in values])


def _svg(template: str, *values: object) -> Markup:
    """The template with the values in it, escaped."""
    return Markup(template).format(*values)


def _joined(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def _line(x1: float, x2: float, y1: float, y2: float, class_: str) -> Markup:
    return _svg(
        '<line x1="{:.2f}" x2="{:.2f}" y1="{:.2f}" y2="{:.2f}" class="{}"/>', x1, x2, y1, y2, class_
    )


def _label(x: float, y: float, words: object, anchor: str, class_: str = "label") -> Markup:
    template = '<text x="{:.2f}" y="{:.2f}" text-anchor="{}" class="{}">{}</text>'
    return _svg(template, x, y, anchor, class_, words)


def _axis_names(y: str, x: str) -> Markup:
    return _label(4, 12, y, "start") + _label(WIDTH - RIGHT, HEIGHT - 6, x, "end")


def _mark(x: float, y: float, number: int, name: str) -> Markup:
    return _svg(
        '<g class="{}"><circle cx="{:.2f}" cy="{:.2f}" r="7.5" class="dot"/>{}</g>',
        *(name, x, y, _label(x, y + 3.6, number, "middle", "in-dot")),
    )
