"""The frontier of a plan: what plan.json says of it, and its picture as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_dtm.core import strict_json
from edge_dtm.core.strict_json import Amount, Count, Share, StrictModel, validated
from edge_dtm.formats.plan import Plan

Point = tuple[int, float, float]  # file size in bytes, SDT (share), mean FDT (tokens)
Curve = tuple[str, str, Sequence[Point]]  # label, matplotlib's format of the line, points


class Prediction(StrictModel):
    """sigma in logits, sdt a share, fdt in tokens."""

    sigma: Amount
    sdt: Share
    fdt: Amount


class FrontierPoint(Prediction):
    size_bytes: Count


class ComponentCosts(StrictModel):
    """costs: treatment's text -> logits squared."""

    name: str
    costs: dict[str, Amount | None]


class Choice(StrictModel, extra="ignore"):
    """What a plan was chosen from: the least divergence of every size, and all costs."""

    predicted: Prediction | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    costs: tuple[ComponentCosts, ...] = ()


def read_plan_file(path: Path) -> tuple[Plan, Choice]:
    """EdgeDtmError for one that compress did not write."""
    tree = strict_json.read(path)
    choice = validated(Choice, tree, str(path), "make the bundle again")
    return Plan.from_json(tree), choice


def draw_frontier(
    points: Sequence[FrontierPoint], chosen_bytes: int, chosen: Prediction, path: Path
) -> None:
    """File size in MB against predicted SDT (share, log scale) and mean FDT (tokens)."""
    curves: list[Curve] = [
        ("predicted frontier", "C0-", [(p.size_bytes, p.sdt, p.fdt) for p in points]),
        ("this plan, predicted", "C3o", [(chosen_bytes, chosen.sdt, chosen.fdt)]),
    ]
    draw([("", curves, None)], path)


def draw(
    models: Sequence[tuple[str, Sequence[Curve], tuple[float, float] | None]], path: Path
) -> None:
    """File size against SDT (log scale) and mean FDT, a row of two panels a model.

    models: name, curves, and SDT and mean FDT of the noise floor.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, rows = pyplot.subplots(
        len(models), 2, figsize=(10, 4 * len(models)), layout="constrained", squeeze=False
    )
    for (name, curves, floor), row in zip(models, rows, strict=True):
        for which, axis in enumerate(row):
            for label, style, points in curves:
                sizes, values = [p[0] / 1e6 for p in points], [p[1 + which] for p in points]
                axis.plot(sizes, values, style, label=label, markerfacecolor="none")
            if floor is not None:
                axis.axhline(floor[which], color="black", linestyle=":", label="noise floor (F16)")
            axis.set(title=name, xlabel="file size (MB)")
            axis.grid(alpha=0.3)
            axis.legend()
        row[0].set(ylabel="SDT (share of divergent tokens)")
        row[0].set_yscale("log", nonpositive="clip")
        row[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        row[0].yaxis.set_minor_formatter(NullFormatter())
        row[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
        row[1].set(ylabel="mean FDT (tokens)")
    # Hidden: a bundle with half a picture in it would not be as it was made.
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(path)
