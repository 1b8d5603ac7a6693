"""The file of tensor types, read as llama-quantize reads it, by the test and by llama.cpp itself."""

import ctypes
import re
import shlex
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.ggml_types import ALLOWED_TYPES
from edge_dtm.formats.plan import Component, Plan, Treatment, uniform
from edge_dtm.formats.tensor_types import quantize_command, tensor_type_file
from edge_dtm.llamacpp.llama import library

LAYERS, HIDDEN, FFN, VOCAB = 12, 256, 512, 40
TYPES = (*ALLOWED_TYPES, "F32", "BF16")
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}


def components(layers=LAYERS, tied=False):
    return (
        Component("token_embd", VOCAB, HIDDEN),
        *([] if tied else [Component("output", VOCAB, HIDDEN)]),
        *(
            Component(f"blk.{i}.{name}", *shape)
            for i in range(layers)
            for name, shape in SHAPES.items()
        ),
    )


def mixed(parts):
    """Neighbours get different types, and so do blk.1.X and blk.11.X, ffn_up and ffn_gate."""
    types = [TYPES[i % len(TYPES)] for i in range(len(parts))]
    return Plan(parts, tuple(Treatment(t) for t in types), 0)


def parse(text):
    """llama-quantize's reading: words at white space, name before the first =, in lower case."""
    patterns = []
    for word in text.split():
        name, sign, kind = word.partition("=")
        assert name and sign and kind
        known = {t.name.upper(): t.name for t in gguf.GGMLQuantizationType}
        patterns.append((name.lower(), known[kind.upper()]))
    return patterns


def chosen(patterns, name):
    """The first pattern found anywhere in the name."""
    return next((kind for pattern, kind in patterns if re.search(pattern, name)), None)


@given(st.permutations(range(len(components()))), st.data())
@settings(max_examples=30)
def test_any_order_and_any_types(order, data):
    parts = tuple(components()[i] for i in order)
    kinds = data.draw(st.lists(st.sampled_from(TYPES), min_size=len(parts), max_size=len(parts)))
    plan = Plan(parts, tuple(Treatment(t) for t in kinds), 0)
    patterns = parse(tensor_type_file(plan))
    assert len(patterns) == len(parts)
    for c, kind in zip(parts, kinds, strict=True):
        assert chosen(patterns, f"{c.name}.weight") == kind


def test_nothing_else_is_touched():
    patterns = parse(tensor_type_file(mixed(components())))
    for name in (
        "output_norm.weight", "blk.1.attn_norm.weight", "blk.12.attn_q.weight", "rope_freqs.weight",
        "blk.1.attn_q.bias", "per_layer_token_embd.weight", "xblk.1.attn_q.weight",
        "blk.1.attn_q.weight_scale", "blk.1.attn_q_norm.weight", "blkx1.attn_q.weight",
    ):  # fmt: skip
        assert chosen(patterns, name) is None, name


def test_literal_line():
    plan = Plan((Component("blk.1.attn_q", 2, 256),), (Treatment("Q4_K"),), 0)
    assert tensor_type_file(plan) == r"^blk\.1\.attn_q\.weight$=q4_k" + "\n"


def test_zeros_cannot_be_made():
    parts = components(layers=1)
    treatments = [Treatment("Q8_0")] * len(parts)
    treatments[2], treatments[5] = Treatment("Q8_0", 0.3), Treatment("F16", 0.5)
    with pytest.raises(EdgeDtmError, match="2 of 9") as error:
        tensor_type_file(Plan(parts, tuple(treatments), 0))
    assert "blk.0.attn_q Q8_0+30.0% zeros, blk.0.attn_output F16+50.0% zeros" in str(error.value)


@pytest.mark.parametrize(
    ("kinds", "file_type"),
    [
        (["Q4_K", "Q4_K", "F16"], "Q4_K_S"),
        (["Q5_K", "F32", "Q5_K"], "Q5_K_S"),
        (["F16", "F16", "Q6_K"], "Q6_K"),
        (["F16", "F16", "F16"], "F16"),
        (["BF16", "BF16", "BF16"], "BF16"),
        (["F32", "F16", "F16"], "Q8_0"),
        (["IQ4_NL", "Q4_1", "IQ4_NL"], "IQ4_NL"),
    ],
)
def test_command(kinds, file_type, tmp_path):
    parts = [Component(f"blk.{i}.ffn_up", 4, 256) for i in range(3)]
    plan = Plan(tuple(parts), tuple(Treatment(t) for t in kinds), 0)
    line = quantize_command(plan, Path("my types.txt"), tmp_path / "i", Path("--in"), Path("7b"))
    assert shlex.split(line) == [
        "llama-quantize", "--imatrix", f"{tmp_path}/i", "--tensor-type-file", "my types.txt",
        "./--in", "./7b", file_type,
    ]  # fmt: skip


def write_source(path, parts, layers):
    """An F32 GGUF of these matrices; llama_model_quantize asks for no tokenizer."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    for c in parts:
        weights = rng.normal(size=(c.rows, c.row_length)).astype(np.float32)
        writer.add_tensor(f"{c.name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_quantize(source, target, command, patterns):
    """llama.cpp's library, called as llama-quantize calls it for this command line."""
    lib = library()
    params = lib.llama_model_quantize_default_params()
    file_type = shlex.split(command)[-1]
    prefix = "LLAMA_FTYPE_ALL_" if file_type == "F32" else "LLAMA_FTYPE_MOSTLY_"
    params.ftype, params.nthread = getattr(lib, prefix + file_type), 1
    overrides = (lib.llama_model_tensor_override * (len(patterns) + 1))()
    for override, (pattern, kind) in zip(overrides, patterns, strict=False):
        override.pattern = pattern.encode()
        override.type = gguf.GGMLQuantizationType[kind]
    params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    code = lib.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert code == 0
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kinds", ["mixed", "F16", "F32", "BF16", "Q4_0", "F16 and F32"])
def test_llama_cpp_follows_it(tied, kinds, tmp_path):
    parts, source, target = components(12, tied), tmp_path / "in.gguf", tmp_path / "out.gguf"
    if kinds == "mixed":
        plan = mixed(parts)
    elif kinds == "F16 and F32":
        alternating = [Treatment(("F16", "F32")[i % 2]) for i in range(len(parts))]
        plan = Plan(parts, tuple(alternating), 0)
    else:
        plan = uniform(parts, kinds, 0)
    write_source(source, parts, 12)
    command = quantize_command(plan, Path("types.txt"), Path("i.gguf"), source, target)
    types = llama_quantize(source, target, command, parse(tensor_type_file(plan)))
    assert types.pop("output_norm.weight") == "F32"
    assert types == {f"{name}.weight": t.type for name, t in plan.by_name().items()}
