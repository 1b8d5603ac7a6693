"""plan.json with what the plan was chosen from, as compress writes it."""

from __future__ import annotations

from pathlib import Path

from edge_dtm.core import strict_json
from edge_dtm.core.validation import Amount, Count, Share, StrictModel, validated
from edge_dtm.formats.plan import Plan


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
