"""File size against SDT and FDT as a PNG: the frontier of a plan, and measured files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Point = tuple[int, float, float]  # file size in bytes, SDT (share), mean FDT (tokens)


def draw_frontier(
    points: Sequence[Mapping[str, float]],
    chosen_bytes: int,
    chosen: Mapping[str, float],
    path: Path,
) -> None:
    """File size in MB against predicted SDT (share, log scale) and mean FDT (tokens)."""
    figure, ((left, right),) = _panels(1)
    megabytes = [p["size_bytes"] / 1e6 for p in points]
    for axis, key in ((left, "sdt"), (right, "fdt")):
        axis.plot(megabytes, [p[key] for p in points], color="tab:blue")
        axis.plot(chosen_bytes / 1e6, chosen[key], "o", color="tab:red", label="this plan")
        axis.legend()
    left.set_ylabel("predicted SDT (share of divergent tokens)")
    right.set_ylabel("predicted mean FDT (tokens)")
    _save(figure, path)


def draw_comparison(
    models: Sequence[tuple[str, Mapping[str, Sequence[Point]], tuple[float, float]]], path: Path
) -> None:
    """File size against measured SDT (log scale) and mean FDT, a row of two panels a model.

    models: name, points of each kind of file by its label, and SDT and mean FDT of the noise
    floor. Kinds are drawn in their order, the last one, ours, as a line.
    """
    styles = (("s", "tab:gray"), ("^", "tab:orange"), ("o", "tab:blue"))
    figure, rows = _panels(len(models))
    for (name, series, floor), row in zip(models, rows, strict=True):
        row[0].set_ylabel("SDT (share of divergent tokens)")
        row[1].set_ylabel("mean FDT (tokens)")
        for which, axis in enumerate(row):
            for i, ((label, points), (marker, color)) in enumerate(
                zip(series.items(), styles, strict=False)
            ):
                ordered = sorted(points)
                axis.plot(
                    [p[0] / 1e6 for p in ordered],
                    [p[1 + which] for p in ordered],
                    marker,
                    color=color,
                    label=label,
                    linestyle="-" if i == len(series) - 1 else "none",
                    # Presets that the importance does not change lie on one another.
                    markerfacecolor="none" if i == 0 else color,
                    markersize=9 if i == 0 else 6,
                )
            axis.axhline(floor[which], color="black", linestyle=":", label="noise floor (F16)")
            axis.set_title(name)
            axis.legend()
    _save(figure, path)


def _panels(rows: int) -> tuple[Any, Any]:
    """A figure and its axes, shape (rows, 2): file size against an SDT and an FDT."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = pyplot.subplots(
        rows, 2, figsize=(10, 4 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_xlabel("file size (MB)")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_yscale("log", nonpositive="clip")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    # Hidden: a bundle with half a picture in it would not be as it was made.
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(path)
