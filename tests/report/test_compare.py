"""Verdicts of several devices beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runner import run
from click.testing import Result
from fixtures.made_up import generated_verdict, verdict
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.report.compare import compare, outliers

# KL of healthy devices, from emulated ARM kernels: between 0.006 and 0.008.
HEALTHY = [("a72", 0.0062), ("a76", 0.0071), ("i8mm", 0.0078), ("again", 0.0071)]


def _named(kls: list[tuple[str, float]], **changes: Any) -> list[tuple[Path, dict[str, Any]]]:
    return [(Path(f"{name}.json"), verdict(kl_vs_host_nats=kl, **changes)) for name, kl in kls]


def test_none_is_odd_among_healthy_ones() -> None:
    compared = compare(_named(HEALTHY))
    assert compared["odd"] == []
    assert compared["words"] == "Odd one out: none."
    assert [r["kl_vs_host_nats"] for r in compared["verdicts"]] == [kl for _, kl in HEALTHY]


def test_the_odd_one_is_named_though_it_passes() -> None:
    compared = compare(_named([*HEALTHY, ("loose", 0.03), ("same-cpu-as-host", 0.0)]))
    assert [o["file"] for o in compared["odd"]] == ["loose"]
    assert "loose: KL from the host is 0.03 nats, the median is 0.0071" in compared["words"]


def test_odd_by_its_argmaxes() -> None:
    others = {"sdt": {"value": 0.4, "low": 0.3, "high": 0.5}}
    compared = compare([*_named(HEALTHY), *_named([("other", 0.007)], against_host=others)])
    assert [o["file"] for o in compared["odd"]] == ["other"]
    assert "40.00%" in compared["words"]


def test_the_very_same_figures() -> None:
    same = _named([("a", 0.007), ("b", 0.007), ("c", 0.007), ("d", 0.5)])
    assert [o["file"] for o in compare(same)["odd"]] == ["d"]


@pytest.mark.parametrize("count", [2, 3])
def test_two_cannot_tell(count: int) -> None:
    verdicts = _named([("a", 0.001), ("b", 0.9), ("c", 0.001)][:count])
    compared = compare([*verdicts, (Path("g.json"), generated_verdict())])
    assert ("cannot tell" in compared["words"]) == (count == 2)
    assert [o["file"] for o in compared["odd"]] == ([] if count == 2 else ["b"])
    assert "the modes differ" in compared["notes"][0]


@given(
    values=st.lists(st.floats(0, 10, allow_nan=False), max_size=12),
    room=st.floats(0, 1, exclude_min=True),
)
def test_outliers_are_few_and_above_all_others(values: list[float], room: float) -> None:
    odd = {name: x for name, x, _ in outliers([(str(i), v) for i, v in enumerate(values)], room)}
    assert len(odd) <= len(values) // 2
    rest = [v for i, v in enumerate(values) if str(i) not in odd]
    assert all(x > max(rest) for x in odd.values())
    shifted = outliers([(str(i), v + 5) for i, v in enumerate(values)], room + 1e-9)
    assert {name for name, *_ in shifted} <= set(odd)


def test_different_bundles_are_refused() -> None:
    other = verdict(bundle={"manifest_sha256": "c" * 64})
    with pytest.raises(EdgeDtmError, match=r"a.json: bundle aaaaaaaaaaaa; b.json: bundle cccc"):
        compare([(Path("a.json"), verdict()), (Path("b.json"), other)])
    with pytest.raises(EdgeDtmError, match="two or more"):
        compare([(Path("a.json"), verdict())])
    with pytest.raises(EdgeDtmError, match="twice"):
        compare([(Path("a.json"), verdict())] * 2)


def test_names_are_told_apart() -> None:
    compared = compare([(Path("pi/v.json"), verdict()), (Path("rk/v.json"), verdict())])
    assert [r["file"] for r in compared["verdicts"]] == ["pi/v.json", "rk/v.json"]


def _run(folder: Path, *verdicts: dict[str, Any], more: tuple[str, ...] = ()) -> Result:
    paths = []
    for i, data in enumerate(verdicts):
        paths.append(folder / f"device-{i}.json")
        paths[-1].write_text(json.dumps(data))
    return run("compare", *paths, *more)


def test_the_command(tmp_path: Path) -> None:
    healthy = verdict()
    broken = verdict(
        passed=False, kl_vs_host_nats=0.42, diagnosis={"code": "broken_kernels", "words": "Broken."}
    )
    out = tmp_path / "all.json"
    result = _run(tmp_path, healthy, healthy, broken, more=("--json", str(out)))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[-1].startswith("Odd one out: device-2: KL from the host is 0.42 nats")
    row = next(line for line in lines if "device-2" in line)
    for word in ("FAIL", "broken_kernels", "odd", "aarch64, 4 CPUs", "0.3.36", "3.00%", "31.5"):
        assert word in row, row
    data = json.loads(out.read_text())
    assert [o["file"] for o in data["odd"]] == ["device-2"]
    assert data["verdicts"][0]["decode_tokens_per_s"] == 31.5


def test_nothing_steers_the_terminal(tmp_path: Path) -> None:
    hostile = verdict(runtime={"machine": "\x1b[2Jarm[bold]", "llama_cpp_python": "\x07"})
    result = _run(tmp_path, hostile, hostile)
    assert result.exit_code == 0
    assert "\x1b" not in result.output and "\x07" not in result.output
    assert "[2Jarm[bold]" in result.output
