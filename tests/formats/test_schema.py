"""The schema of verdicts: what verify writes fits it, anything else does not, here and in jsonschema."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from fixtures.made_up import generated_verdict, verdict
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.device.verify import Options, verify
from edge_dtm.formats.thresholds import Thresholds
from edge_dtm.formats.verdict import Code
from edge_dtm.formats.verdict_file import problems, read_verdict, schema

FREE_FORM = {"settings", "noise_floor"}
VALIDATOR = Draft202012Validator(schema())


def _objects(rule: dict[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if "object" in rule.get("type", ()):
        yield name, rule
    for key, inner in {**rule.get("properties", {}), **rule.get("$defs", {})}.items():
        yield from _objects(inner, key)
    if "items" in rule:
        yield from _objects(rule["items"], name)


def test_the_schema_is_one_and_strict() -> None:
    Draft202012Validator.check_schema(schema())
    names = []
    for name, rule in _objects(schema()):
        assert rule["description"], name
        if name in FREE_FORM:
            continue
        names.append(name)
        assert rule["additionalProperties"] is False, name
        for key, inner in rule["properties"].items():
            assert inner.get("description") or "$ref" in inner, f"{name}.{key}"
    assert {"bundle", "runtime", "performance", "kernels", "kernels_compare"} <= set(names)


def test_the_schema_names_what_the_code_has() -> None:
    properties = schema()["properties"]
    assert set(properties["diagnosis"]["properties"]["code"]["enum"]) == set(get_args(Code))
    limits = Thresholds(0.1, 1.0, 0.1, 1.0, 0.1, 0.1)
    assert set(properties["thresholds"]["properties"]) == set(limits.to_json())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "generate"},
        {"kernels": "compare"},
        {"kernels": "skip", "max_sequences": 2, "min_fdt": 1000.0},
    ],
    ids=str,
)
def test_what_verify_writes(tiny_bundle: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    data = verify(tiny_bundle, Options(threads=1, **options)).verdict.to_json()
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(data, allow_nan=False))
    VALIDATOR.validate(json.loads(path.read_text()))
    assert read_verdict(path) == json.loads(path.read_text())


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value."""
    keys: Any = data if isinstance(data, dict) else range(len(data))
    for key in keys:
        yield data, key
        if isinstance(data[key], (dict, list)):
            yield from _places(data[key])


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([0.5, 2.0, 1e30, -0.1]),
    st.sampled_from(["", "healthy", "plain", "a" * 64, "x"]),
    st.just([]),
    st.just({}),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_it_agrees_with_jsonschema(data: st.DataObject) -> None:
    tree = copy.deepcopy(data.draw(st.sampled_from([verdict(), generated_verdict()])))
    for _ in range(data.draw(st.integers(0, 2))):
        places = list(_places(tree))
        holder, key = places[data.draw(st.integers(0, len(places) - 1))]
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                holder[key] = data.draw(LEAVES)
            case "remove":
                del holder[key]
            case _ if isinstance(holder, dict):
                holder["unknown"] = data.draw(LEAVES)
    assert (problems(tree) == []) == VALIDATOR.is_valid(tree)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"kind": NaN}', "is no JSON"),
        ("[]", "is no verdict"),
        ('{"kind": "edge-dtm verdict", "schema_version": 1}', "schema version 1"),
        (json.dumps(verdict(passed="yes")), "passed is no boolean"),
        (json.dumps(verdict(sequences=4)), "3 entries for 4 sequences"),
        (json.dumps(verdict(first_divergent_tokens=[3, 39, 49])), "lies beyond"),
    ],
)
def test_what_is_no_verdict(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "v.json"
    path.write_text(text)
    with pytest.raises(EdgeDtmError, match=words) as error:
        read_verdict(path)
    assert "\n" not in str(error.value)
    with pytest.raises(EdgeDtmError, match="cannot read"):
        read_verdict(tmp_path / "none.json")
