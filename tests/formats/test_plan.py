"""Sizes against files that gguf-py wrote, and what a plan says about itself."""

import json
import math

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.ggml_types import DEFAULT_TYPES, SPARSE_TYPES
from edge_dtm.formats.plan import (
    SPARSE_LEVELS,
    Component,
    Plan,
    Treatment,
    candidate_treatments,
    distinct_texts,
    uniform,
    zeros_per_row,
)
from edge_dtm.llamacpp import ggml

COMPONENTS = (
    Component("token_embd", 33, 256),
    Component("blk.0.attn_q", 5, 288),  # rows that no K-quant divides
    Component("blk.0.ffn_down", 3, 512),
    Component("blk.1.attn_k", 1, 32),  # shorter than the alignment in several types
)
NORM_NAMES = ("blk.0.attn_norm", "output_norm")
NORM_LENGTH = 17


def write_file(path, plan):
    """A GGUF with the plan's tensors and two norms, as gguf-py makes it."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    for component, treatment in zip(plan.components, plan.treatments, strict=True):
        weights = rng.normal(size=(component.rows, component.row_length)).astype(np.float32)
        writer.add_tensor(
            f"{component.name}.weight",
            ggml.quantize(treatment.type, weights),
            raw_dtype=gguf.GGMLQuantizationType[treatment.type],
        )
    for name in NORM_NAMES:
        writer.add_tensor(f"{name}.weight", np.ones(NORM_LENGTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def plan_of(*types):
    return Plan(COMPONENTS, tuple(Treatment(t) for t in types), 0)


PLANS = [
    plan_of("F16", "F16", "F16", "F16"),
    plan_of("Q4_K", "Q4_0", "Q6_K", "Q8_0"),
    plan_of("Q5_K", "IQ4_NL", "Q4_K", "Q4_1"),
    plan_of("Q8_0", "Q5_1", "Q5_0", "Q5_0"),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: "-".join(t.type for t in p.treatments))
def test_size_is_that_of_the_file(plan, tmp_path):
    path = tmp_path / "model.gguf"
    write_file(path, plan)
    head = gguf.GGUFReader(path).data_offset
    norms = len(NORM_NAMES) * math.ceil(NORM_LENGTH * 4 / 32) * 32
    assert Plan(plan.components, plan.treatments, head + norms).size_bytes == path.stat().st_size


def test_zeros_change_no_size():
    dense = uniform(COMPONENTS, "Q8_0", 100)
    sparse = Plan(COMPONENTS, (Treatment("Q8_0", 0.5),) * 4, 100)
    assert dense.size_bytes == sparse.size_bytes


@given(st.integers(1, 5000), st.floats(0, 1))
def test_zeros_per_row_is_the_nearest_number(row_length, share):
    zeros = zeros_per_row(row_length, share)
    assert 0 <= zeros <= row_length
    assert abs(zeros - row_length * share) <= 0.5 + 1e-9


def test_zero_share_counts_block_matrices_only():
    plan = Plan(
        COMPONENTS,
        (Treatment("Q8_0"), Treatment("Q8_0", 0.3), Treatment("Q4_K"), Treatment("F16", 0.5)),
        0,
    )
    zeros = 5 * round(288 * 0.3) + 16
    assert plan.zero_share == pytest.approx(zeros / (5 * 288 + 3 * 512 + 32))
    assert Plan(COMPONENTS[:1], (Treatment("F16"),), 0).zero_share == 0


def test_json_round_trip_keeps_the_plan_and_its_hash():
    plan = Plan(
        COMPONENTS,
        (Treatment("Q4_K"), Treatment("Q8_0", 0.1), Treatment("F16", 1 / 3), Treatment("Q4_0")),
        12345,
    )
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.hash == plan.hash


def test_hash_is_fixed_and_depends_on_everything():
    component = Component("blk.0.attn_q", 2, 32)
    plan = Plan((component,), (Treatment("Q8_0", 0.5),), 7)
    # Literal, so that a bundle made today is recognised by a later version.
    assert plan.hash == "629a24954aef5ac24ef3f27578779328faba8928d12630a16a41d26864face09"
    others = [
        Plan((component,), (Treatment("Q8_0", 0.4),), 7),
        Plan((component,), (Treatment("F16", 0.5),), 7),
        Plan((component,), (Treatment("Q8_0", 0.5),), 8),
        Plan((Component("blk.0.attn_k", 2, 32),), (Treatment("Q8_0", 0.5),), 7),
    ]
    assert len({plan.hash, *(p.hash for p in others)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": None}, "schema version None"),
        ({"schema_version": 2}, "schema version 2"),
        ({"schema_version": 1.0}, "schema version 1.0"),
        ({"schema_version": True}, "schema version True"),
        ({"components": None}, "components: "),
        ({"components": [{"name": "a"}]}, r"components\[0\].rows: is missing"),
        ({"fixed_bytes": "many"}, "fixed_bytes: "),
    ],
)
def test_what_is_no_plan_is_refused(change, message):
    data = uniform(COMPONENTS, "Q8_0", 0).to_json() | change
    with pytest.raises(EdgeDtmError, match=message):
        Plan.from_json(data)


@pytest.mark.parametrize(
    ("change", "offence"),
    [({"type": "Q9"}, "Q9"), ({"type": "Q6_K"}, "256"), ({"zero_share": 1.5}, "zero_share")],
)
def test_a_treatment_that_is_none_is_refused(change, offence):
    data = uniform(COMPONENTS, "Q8_0", 0).to_json()
    data["components"][1] |= change
    with pytest.raises(EdgeDtmError, match=rf"components\[1\].*{offence}"):
        Plan.from_json(data)


def test_candidates_divide_the_rows_and_prune_blocks_only():
    embedding, q, down, _ = COMPONENTS
    assert candidate_treatments(embedding, DEFAULT_TYPES) == [Treatment(t) for t in DEFAULT_TYPES]
    types = {t.type for t in candidate_treatments(q, DEFAULT_TYPES)}
    assert types == {"F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"}
    sparse = [t for t in candidate_treatments(down, DEFAULT_TYPES) if t.zero_share]
    assert {(t.type, t.zero_share) for t in sparse} == {
        (t, s) for t in SPARSE_TYPES for s in SPARSE_LEVELS
    }
    assert not any(t.zero_share for t in candidate_treatments(down, DEFAULT_TYPES, sparse=False))
    assert [t.type for t in candidate_treatments(down, ["Q4_K"])] == ["Q4_K"]


def test_zeros_that_are_held_are_the_least():
    embedding, q, down, _ = COMPONENTS
    for held in (0.33, SPARSE_LEVELS[1], SPARSE_LEVELS[-1]):
        levels = [held, *(s for s in SPARSE_LEVELS if s > held)]
        for sparse in (True, False):  # what is zero already stays so either way
            found = candidate_treatments(down, DEFAULT_TYPES, sparse, held)
            assert len(found) == len(set(found))
            assert set(found) == {Treatment(t, s) for t in SPARSE_TYPES for s in levels}
    assert candidate_treatments(q, ["Q4_0", "F16"], True, 0.95) == [Treatment("F16", 0.95)]
    assert candidate_treatments(q, ["Q4_0"], True, 0.5) == []
    # The embedding is never pruned.
    dense = [Treatment(t) for t in DEFAULT_TYPES]
    assert candidate_treatments(embedding, DEFAULT_TYPES, True, 0.5) == dense
    assert candidate_treatments(down, DEFAULT_TYPES, True, 0.0) == candidate_treatments(
        down, DEFAULT_TYPES
    )


def test_lookup_and_counts():
    plan = plan_of("Q4_0", "F16", "Q4_0", "F16")
    assert plan.by_name()["blk.0.ffn_down"] == Treatment("Q4_0")
    counts = plan.type_counts()
    assert {k: n for k, (n, _) in counts.items()} == {"Q4_0": 2, "F16": 2}
    assert sum(size for _, size in counts.values()) == plan.size_bytes
    sizes = [size for _, size in counts.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert str(Treatment("Q8_0", 0.25)) == "Q8_0+25.0% zeros"


def test_texts_get_more_digits_only_where_they_would_read_the_same():
    held, level, other = (Treatment("Q8_0", z) for z in (0.3996, 0.4, 0.5))
    dense, f16 = Treatment("Q8_0"), Treatment("F16", 0.4)
    assert distinct_texts([dense, held, level, other, f16]) == {
        dense: "Q8_0",
        held: "Q8_0+39.96% zeros",
        level: "Q8_0+40.00% zeros",
        other: "Q8_0+50.0% zeros",
        f16: "F16+40.0% zeros",
    }


@given(st.floats(0.01, 0.95))
@example(math.nextafter(0.4, 0))
def test_every_candidate_has_a_text_of_its_own(held):
    found = candidate_treatments(COMPONENTS[2], DEFAULT_TYPES, True, held)
    texts = distinct_texts(found)
    assert set(texts) == set(found) and len(set(texts.values())) == len(found)
    short = [str(t) for t in found]
    assert all(texts[t] == str(t) for t in found if short.count(str(t)) == 1)
