"""The page's charts: numbers in, inline SVG out.

They are drawn 360 units wide, about the pixels a phone has, so that their text is readable there;
colours are classes of report.css, and each series also has a number, for who cannot tell colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from edge_dtm.core.metrics import Interval
from edge_dtm.formats.verdict_file import ShareInterval
from edge_dtm.report.numbers import megabytes, plural

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 26, 38
COLOURS = 8  # classes s0 to s7 of report.css
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
    """A file's size in bytes and SDT, a share, with its interval."""

    label: str
    size_bytes: float
    sdt: Interval | ShareInterval


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
    t = np.arange(ends.max(initial=0))[:, None]
    at_risk = ((ends > t) & (where >= t)).sum(axis=1)
    diverged = ((where == t) & (where < ends)).sum(axis=1)[at_risk > 0]
    return np.array([1.0, *np.cumprod(1 - diverged / at_risk[at_risk > 0])])


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
    drawing = _Drawing((0, len(bars)), (0, tallest * 1.08))
    drawing.grid([(t, f"{t:.0f}") for t in ticks(0, tallest) if t == int(t)])
    width = (WIDTH - LEFT - RIGHT) / len(bars)
    every = 1 if width >= 30 or all(low == high for low, high, _ in bars) else 2
    for i, (low, high, n) in enumerate(bars):
        x, y = drawing.x(i) + width * 0.08, drawing.y(n)
        name = str(low) if low == high else f"{low}–{high}"
        drawing.add(
            '<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" class="{}">'
            "<title>{} {}: {}</title></rect>",
            *(x, y, width * 0.84, drawing.y(0) - y, "bar zero" if high == 0 else "bar"),
            *(axis, name, plural(n, "sequence")),
        )
        if n:
            drawing.label(x + width * 0.42, y - 4, n, class_="count")
        if i % every == 0:
            drawing.label(x + width * 0.42, HEIGHT - BOTTOM + 14, name)
    none = bars[0][2]
    summary = f"{none} of {plural(len(counts), 'sequence')} {'has' if none == 1 else 'have'} {zero}"
    words = f"Histogram over {len(counts)} sequences: {axis}. {summary}."
    return Chart(words, drawing.finished("sequences", axis))


def survival_curves(series: Sequence[Series]) -> Chart:
    """Share of sequences still identical against the position, a line each."""
    longest = max(max(s.lengths, default=1) for s in series)
    drawing = _Drawing((0, longest), (0, 1))
    drawing.grid([(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)])
    drawing.ticks_x([(t, f"{t:,.6g}") for t in ticks(0, longest)])
    marks, legend, ends, colour = [], [], [], 0
    for i, one in enumerate(series):
        curve = survival(one.first, one.lengths)
        points = [(0.0, 1.0)]
        for t in range(1, len(curve)):
            points += [(float(t), float(curve[t - 1])), (float(t), float(curve[t]))]
        name = "floor" if one.is_floor else f"s{colour % COLOURS}"
        colour += not one.is_floor
        drawing.path(points, name)
        # Marks of curves that lie on one another stand beside each other.
        at = min(longest * (i + 0.5) / len(series), len(curve) - 1)
        marks.append((at, float(curve[int(at)]), i + 1, name))
        legend.append((i + 1, name, one.label))
        ends.append(f"{one.label} ends at {curve[-1]:.0%}")
    for mark in marks:  # above all lines
        drawing.mark(*mark)
    return Chart(
        "Survival curves, share of sequences still identical against the position in tokens: "
        f"{'; '.join(ends)}.",
        drawing.finished("still identical", "position in tokens"),
        legend,
    )


def frontier(
    points: Sequence[tuple[float, float]],
    predicted: float | None,
    files: Sequence[MeasuredFile],
    floor: float | None,
) -> Chart:
    """File size in bytes against SDT, log scale.

    points: the predicted frontier; files: measured ones, this file first; predicted: this file's
    SDT; floor: the noise floor's.
    """
    points = sorted((size, sdt) for size, sdt in points if sdt > 0)
    shares = [sdt for _, sdt in points] + [
        v for f in files for v in (f.sdt.value, f.sdt.low, f.sdt.high)
    ]
    shares = [v for v in (*shares, predicted, floor) if v]
    lowest, highest = min(shares, default=0.01) / 1.25, max(shares, default=0.1) * 1.25
    sizes = [size for size, _ in points] + [f.size_bytes for f in files]
    left, right = min(sizes), max(sizes)
    span = (right - left) or right * 0.1
    limits_x = (left - 0.03 * span, right + 0.05 * span)
    drawing = _Drawing(limits_x, (lowest, highest), log_y=True)
    drawing.grid([(v, f"{v * 100:.3g} %") for v in log_ticks(lowest, highest)])
    drawing.ticks_x([(t * 1e6, f"{t:,.6g}") for t in ticks(left / 1e6, right / 1e6)])
    legend: list[tuple[int | None, str, str]] = []
    if floor:
        drawing.path([(limits_x[0], floor), (limits_x[1], floor)], "floor")
        legend.append((None, "floor", "noise floor: the uncompressed model in llama.cpp"))
    if points:
        drawing.path(points, "s0")
        legend.append((None, "s0", "predicted frontier: the least SDT at each size"))
    if predicted:
        drawing.add(
            '<circle cx="{:.2f}" cy="{:.2f}" r="6" class="ring s0"/>',
            drawing.x(files[0].size_bytes),
            drawing.y(predicted),
        )
        legend.append((None, "ring s0", "this plan, predicted"))
    for i, file in enumerate(files):
        name = f"s{i % COLOURS}"
        # What never diverged has no place on a log scale; it stands on the lower edge.
        sdt, low, high = (max(v, lowest) for v in (file.sdt.value, file.sdt.low, file.sdt.high))
        drawing.path([(file.size_bytes, low), (file.size_bytes, high)], name)
        drawing.mark(file.size_bytes, sdt, i + 1, name)
        label = f"{file.label}: {megabytes(file.size_bytes)}, {file.sdt.value * 100:.2f} %"
        legend.append((i + 1, name, label))
    return Chart(
        f"File size against SDT. {'; '.join(label for *_, label in legend)}.",
        drawing.finished("SDT, log scale", "file size in MB"),
        legend,
    )


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


class _Drawing:
    """The elements of one chart, and the scales from data to its units."""

    def __init__(
        self, limits_x: tuple[float, float], limits_y: tuple[float, float], log_y: bool = False
    ) -> None:
        self._limits_x, self._limits_y = limits_x, limits_y
        self._log = math.log if log_y else float
        self._elements: list[Markup] = []

    def x(self, value: float) -> float:
        low, high = self._limits_x
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high, value = map(self._log, (*self._limits_y, value))
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def add(self, template: str, *values: object) -> None:
        """The template with the values in it, escaped."""
        self._elements.append(Markup(template).format(*values))

    def label(
        self, x: float, y: float, words: object, anchor: str = "middle", class_: str = "label"
    ) -> None:
        """x, y: in units of the drawing."""
        template = '<text x="{:.2f}" y="{:.2f}" text-anchor="{}" class="{}">{}</text>'
        self.add(template, x, y, anchor, class_, words)

    def path(self, points: Sequence[tuple[float, float]], name: str) -> None:
        steps = "L".join(f"{self.x(x):.2f} {self.y(y):.2f}" for x, y in points)
        self.add('<path d="M{}" class="line {}"/>', steps, name)

    def mark(self, x: float, y: float, number: int, name: str) -> None:
        x, y = self.x(x), self.y(y)
        self.add('<g class="{}"><circle cx="{:.2f}" cy="{:.2f}" r="7.5" class="dot"/>', name, x, y)
        self.label(x, y + 3.6, number, class_="in-dot")
        self.add("</g>")

    def grid(self, values: Sequence[tuple[float, str]]) -> None:
        """Lines across at values of y, with their names."""
        for value, name in values:
            y = self.y(value)
            self.add('<path d="M{} {:.2f}H{}" class="grid"/>', LEFT, y, WIDTH - RIGHT)
            self.label(LEFT - 5, y + 4, name, "end")

    def ticks_x(self, values: Sequence[tuple[float, str]]) -> None:
        for value, name in values:
            self.label(self.x(value), HEIGHT - BOTTOM + 14, name)

    def finished(self, name_y: str, name_x: str) -> Markup:
        """All elements, with the names of the axes."""
        self.label(4, 12, name_y, "start")
        self.label(WIDTH - RIGHT, HEIGHT - 6, name_x, "end")
        return Markup("").join(self._elements)
