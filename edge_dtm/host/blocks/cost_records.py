"""The file of costs, a line a component, and what the costs of a sample of rows say of all rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dtm.host.blocks.fit import part_of

WHOLE_BLOCKS = 3  # on which costs are taken on all rows too, to correct those of the sample


def read_costs(results: Path) -> dict[str, dict[str, Any]]:
    """What was measured so far: component -> its costs, and where error feedback is used."""
    known: dict[str, dict[str, Any]] = {}
    if results.is_file():
        for line in results.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the run was killed
            known[record["name"]] = record
    return known


def corrected(known: Mapping[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Component -> costs, logits squared. Those of a sample of rows times the mean ratio, by matrix
    and treatment, of the local errors on all rows to those on the sample."""
    logs: dict[str, list[npt.NDArray[np.float64]]] = {}
    for name, record in known.items():
        if "ratios" in record:
            logs.setdefault(part_of(name), []).append(np.log(record["ratios"]))
    costs = {}
    for name, record in known.items():
        by_weights = np.array(record["by_weights"])
        if part_of(name) in logs and "ratios" not in record:
            by_weights = by_weights * np.exp(np.mean(logs[part_of(name)], axis=0))
        costs[name] = (by_weights + np.array(record["by_inputs"])).tolist()
    return costs


def whole_blocks(layers: int) -> set[int]:
    """Numbers of the blocks that are measured on all rows, spread evenly."""
    return {int(layers * (2 * i + 1) / (2 * WHOLE_BLOCKS)) for i in range(WHOLE_BLOCKS)}
