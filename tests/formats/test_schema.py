"""The schema of verdicts: what verify writes fits it, anything else does not, here and in jsonschema."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from fixtures.made_up import generated_verdict, verdict
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.device.verify import Options, verify
from edge_dtm.formats.verdict_file import VerdictFile, read_verdict, schema_text

SCHEMA = json.loads(schema_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def test_the_packaged_schema_is_the_model_s() -> None:
    packaged = resources.files("edge_dtm.data").joinpath("verdict.schema.json")
    assert packaged.read_text("utf-8") == schema_text(), (
        "write it anew: python -c 'from edge_dtm.formats.verdict_file import schema_text; "
        'print(schema_text(), end="")\''
    )


def test_the_schema_is_strict_and_explains_every_field() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    for name, rule in {"verdict": SCHEMA, **SCHEMA["$defs"]}.items():
        assert rule["description"], name
        assert rule["additionalProperties"] is False, name
        for key, inner in rule["properties"].items():
            assert inner.get("description") or "$ref" in inner, f"{name}.{key}"


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
    data = verify(tiny_bundle, Options(threads=1, **options))[0].to_json()
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
    st.sampled_from([0.5, 2.5, -0.1]),
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
    kinds = set()
    try:
        VerdictFile.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        kinds = {offence["type"] for offence in error.errors()}
    # Of our own kind are only those that no schema can say.
    assert (kinds <= {"value_error"}) == VALIDATOR.is_valid(tree)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"kind": NaN}', "is no JSON"),
        ("[]", "holds no edge-dtm verdict"),
        ('{"kind": "edge-dtm verdict", "schema_version": 1}', "schema version 1"),
        (json.dumps(verdict(passed="yes")), "passed: is 'yes'"),
        (json.dumps(verdict(bundle={"name": None, "a b": 1})), r'bundle\."a b": is unknown'),
        (json.dumps(verdict(kernels=[{}])), r"kernels\[0\]\.type: is missing; kernels\[0\]\.path"),
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
