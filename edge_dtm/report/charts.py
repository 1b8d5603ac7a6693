"""The page's figures: numbers in, inline SVG out.

They are drawn 360 units wide, about the pixels a phone has, so that their text is readable there;
colours are classes of report.css, and each series also has a number, for who cannot tell colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_dtm.report.tags import Markup, join, tag
from edge_dtm.report.words import megabytes, plural

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
class Measured:
    """A file's size in bytes and SDT, a share, with its interval where known."""

    label: str
    size_bytes: float
    sdt: float
    low: float | None = None
    high: float | None = None


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


def histogram(counts: Sequence[int], axis: str, zero: str) -> Markup:
    """Bars of how many sequences have each count. axis: what is counted; zero: what 0 means."""
    found = bins(counts)
    tallest = max(n for *_, n in found) or 1
    frame = _Frame((0, len(found)), (0, tallest * 1.08))
    parts: list[Markup] = [frame.grid_y([t for t in ticks(0, tallest) if t == int(t)], str_int)]
    width = (WIDTH - LEFT - RIGHT) / len(found)
    every = 1 if width >= 30 or all(low == high for low, high, _ in found) else 2
    for i, (low, high, n) in enumerate(found):
        x, y = frame.x(i) + width * 0.08, frame.y(n)
        name = str(low) if low == high else f"{low}–{high}"
        parts.append(
            tag(
                "rect",
                tag("title", f"{axis} {name}: {plural(n, 'sequence')}"),
                x=_n(x),
                y=_n(y),
                width=_n(width * 0.84),
                height=_n(frame.y(0) - y),
                class_="bar zero" if high == 0 else "bar",
            )
        )
        if n:
            parts.append(_label(x + width * 0.42, y - 4, n, "middle", "count"))
        if i % every == 0:
            parts.append(_label(x + width * 0.42, HEIGHT - BOTTOM + 14, name, "middle"))
    parts += [_label(4, 12, "sequences", "start"), _label(WIDTH - RIGHT, HEIGHT - 6, axis, "end")]
    none = found[0][2]
    summary = f"{none} of {plural(len(counts), 'sequence')} {'has' if none == 1 else 'have'} {zero}"
    return _figure(f"Histogram over {len(counts)} sequences: {axis}. {summary}.", parts, None)


def survival_curves(series: Sequence[Series]) -> Markup:
    """Share of sequences still identical against the position, a line each."""
    longest = max(max(s.lengths, default=1) for s in series)
    frame = _Frame((0, longest), (0, 1))
    parts: list[Markup] = [
        frame.grid_y([0, 0.25, 0.5, 0.75, 1], lambda v: f"{v:.0%}"),
        frame.ticks_x(ticks(0, longest), str_int),
    ]
    marks = []
    legend = []
    colour = 0
    for i, one in enumerate(series):
        curve = survival(one.first, one.lengths)
        points = [(0.0, 1.0)]
        for t in range(1, len(curve)):
            points += [(float(t), float(curve[t - 1])), (float(t), float(curve[t]))]
        name = "floor" if one.is_floor else f"s{colour % COLOURS}"
        colour += not one.is_floor
        path = "M" + "L".join(f"{_n(frame.x(x))} {_n(frame.y(y))}" for x, y in points)
        parts.append(tag("path", d=path, class_=f"line {name}"))
        # Marks of curves that lie on one another stand beside each other.
        at = min(longest * (i + 0.5) / len(series), len(curve) - 1)
        marks.append(_mark(frame.x(at), frame.y(float(curve[int(at)])), i + 1, name))
        legend.append((i + 1, name, one.label))
    parts += marks
    parts += [
        _label(4, 12, "still identical", "start"),
        _label(WIDTH - RIGHT, HEIGHT - 6, "position in tokens", "end"),
    ]
    words = "Survival curves, share of sequences still identical against the position in tokens: "
    ends = "; ".join(f"{s.label} ends at {survival(s.first, s.lengths)[-1]:.0%}" for s in series)
    return _figure(f"{words}{ends}.", parts, legend)


def frontier(
    points: Sequence[tuple[float, float]],
    chosen: tuple[float, float] | None,
    measured: Sequence[Measured],
    floor: float | None,
) -> Markup:
    """File size in bytes against SDT, log scale.

    points: the predicted frontier; chosen: size and prediction of this plan; measured: this file
    first; floor: the noise floor's SDT.
    """
    drawn = _thinned([(s, d) for s, d in points if d > 0])
    sizes = [s for s, _ in drawn] + [m.size_bytes for m in measured]
    shares = [d for _, d in drawn] + [m.sdt for m in measured if m.sdt > 0]
    shares += [v for m in measured for v in (m.low, m.high) if v]
    if chosen:
        sizes.append(chosen[0])
        shares += [chosen[1]] if chosen[1] > 0 else []
    if floor:
        shares.append(floor)
    low, high = min(shares, default=0.01), max(shares, default=0.1)
    span = (max(sizes) - min(sizes)) or max(sizes) * 0.1 or 1.0
    frame = _Frame(
        (min(sizes) - 0.03 * span, max(sizes) + 0.05 * span), (low / 1.25, high * 1.25), log_y=True
    )
    inside = ticks(min(sizes) / 1e6, max(sizes) / 1e6, 5)
    parts: list[Markup] = [
        frame.grid_y(log_ticks(low / 1.25, high * 1.25), lambda v: f"{v * 100:.3g} %"),
        frame.ticks_x([t * 1e6 for t in inside], lambda v: f"{v / 1e6:,.6g}"),
    ]
    legend: list[tuple[int | None, str, str]] = []
    if floor:
        y = _n(frame.y(floor))
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="line floor"))
        legend.append((None, "floor", "noise floor: the uncompressed model in llama.cpp"))
    if drawn:
        path = "M" + "L".join(f"{_n(frame.x(s))} {_n(frame.y(d))}" for s, d in drawn)
        parts.append(tag("path", d=path, class_="line s0"))
        legend.append((None, "s0", "predicted frontier: the least SDT at each size"))
    if chosen and chosen[1] > 0:
        parts.append(
            tag(
                "circle",
                cx=_n(frame.x(chosen[0])),
                cy=_n(frame.y(chosen[1])),
                r=6,
                class_="ring s0",
            )
        )
        legend.append((None, "ring s0", "this plan, predicted"))
    for i, one in enumerate(measured):
        name = f"s{i % COLOURS}"
        # What never diverged has no place on a log scale; it stands on the lower edge.
        x, y_value = frame.x(one.size_bytes), frame.y(max(one.sdt, low / 1.25))
        if one.low is not None and one.high:
            ends = [_n(frame.y(max(v, low / 1.25))) for v in (one.low, one.high)]
            parts.append(
                tag("line", x1=_n(x), x2=_n(x), y1=ends[0], y2=ends[1], class_=f"line {name}")
            )
        parts.append(_mark(x, y_value, i + 1, name))
        legend.append(
            (i + 1, name, f"{one.label}: {megabytes(one.size_bytes)}, {one.sdt * 100:.2f} %")
        )
    parts += [
        _label(4, 12, "SDT, log scale", "start"),
        _label(WIDTH - RIGHT, HEIGHT - 6, "file size in MB", "end"),
    ]
    words = "; ".join(label for *_, label in legend)
    return _figure(f"File size against SDT. {words}.", parts, legend)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high, about so many."""
    span = max(high - low, 1e-12)
    raw = span / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * s for s in (1, 2, 5, 10) if size * s >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high, only the powers over many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 500 else (1,)
    found = [f * 10.0**p for p in powers for f in factors]
    return [t for t in found if low <= t <= high]


def str_int(value: float) -> str:
    return f"{value:,.6g}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    ordered = sorted(points)
    if len(ordered) <= FRONTIER_POINTS:
        return ordered
    keep = np.linspace(0, len(ordered) - 1, FRONTIER_POINTS).round().astype(int)
    return [ordered[i] for i in keep]


class _Frame:
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

    def grid_y(self, values: Sequence[float], name: Callable[[float], str]) -> Markup:
        return join(
            [
                [
                    tag(
                        "line",
                        x1=LEFT,
                        x2=WIDTH - RIGHT,
                        y1=_n(self.y(v)),
                        y2=_n(self.y(v)),
                        class_="grid",
                    ),
                    _label(LEFT - 5, self.y(v) + 4, name(v), "end"),
                ]
                for v in values
            ]
        )

    def ticks_x(self, values: Sequence[float], name: Callable[[float], str]) -> Markup:
        return join([_label(self.x(v), HEIGHT - BOTTOM + 14, name(v), "middle") for v in values])


def _n(value: float) -> str:
    """Two decimals: below what any screen shows."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _label(x: float, y: float, words: object, anchor: str, class_: str | None = None) -> Markup:
    return tag("text", words, x=_n(x), y=_n(y), text_anchor=anchor, class_=class_)


def _mark(x: float, y: float, number: int, name: str) -> Markup:
    return tag(
        "g",
        tag("circle", cx=_n(x), cy=_n(y), r=7.5, class_="dot"),
        tag("text", number, x=_n(x), y=_n(y + 3.6), text_anchor="middle", class_="in-dot"),
        class_=name,
    )


def _figure(
    words: str, parts: Sequence[Markup], legend: Sequence[tuple[int | None, str, str]] | None
) -> Markup:
    """words: the figure for who cannot see it; legend: number, class and label of each series."""
    drawing = tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=words)
    items = [
        tag(
            "li",
            tag("span", "" if n is None else n, class_=f"{'swatch' if n is None else 'disc'} {c}"),
            label,
        )
        for n, c, label in legend or ()
    ]
    return join(drawing, tag("ul", items, class_="legend") if items else None)
