"""The frontier as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_frontier(
    points: Sequence[Mapping[str, float]],
    chosen_bytes: int,
    chosen: Mapping[str, float],
    path: Path,
) -> None:
    """File size in MB against predicted SDT (share, log scale) and mean FDT (tokens), as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    megabytes = [p["size_bytes"] / 1e6 for p in points]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in (
        (left, "sdt", "predicted SDT (share of divergent tokens)"),
        (right, "fdt", "predicted mean FDT (tokens)"),
    ):
        axis.plot(megabytes, [p[key] for p in points], color="tab:blue")
        axis.plot(chosen_bytes / 1e6, chosen[key], "o", color="tab:red", label="this plan")
        axis.set_xlabel("file size (MB)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(path)
