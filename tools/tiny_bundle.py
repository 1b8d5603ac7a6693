"""A bundle of a tiny Llama with random weights, made on the spot: for the tools that break things.

The model is its own original: its greedy text is the reference, so that a healthy run passes with
room and anything else shows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_dtm.formats import ggml_types

# The script also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.core.metrics import compare
from edge_dtm.formats.bundle import write_manifest
from edge_dtm.formats.plan import Component, Plan, Treatment
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import HELD_OUT, PADDING, TOP_K, Reference
from edge_dtm.formats.thresholds import Thresholds
from edge_dtm.formats.verdict import AgainstHost, Diagnosis, Evidence, KernelCheck, Verdict
from edge_dtm.llamacpp import ggml, probe_model
from edge_dtm.llamacpp.runner import LlamaRunner
from edge_dtm.llamacpp.vocabulary import tokenize

FILES = ("model.gguf", "reference.npz", "host.npz", "probe.npz", "plan.json", "report.md")
THRESHOLDS = Thresholds(
    max_sdt=0.1,
    min_fdt=10.0,
    max_kl_vs_host=0.05,
    decided_margin=1.5,
    max_decided_sdt_vs_host=0.005,
    max_kl_probe=1e-3,
)
MEASURED = {"noise_floor": {"near_tie_margin": 0.01, "sdt": 0.002}}
SETTINGS = RunSettings(threads=1, batch_tokens=64)
CONTEXT, TOKENS = 256, 24
FLOATS = {"F32": np.float32, "F16": np.float16}
TEXTS = ("the cat", "a longer prompt of several words", "1 + 1 =", "ünï 😀", "", "end</s>again")


def write_gguf(
    path: Path,
    seed: int = 0,
    hidden: int = 256,
    layers: int = 2,
    ffn: int = 512,
    matrix_type: str = "F16",
    architecture: str = "llama",
    whole_vocabulary: bool = True,
    nan_in: str | None = None,
) -> None:
    """A Llama with random weights and a SentencePiece byte vocabulary.

    matrix_type: GGML type of the matrices in the blocks, and of embedding and head if it is one of
    FLOATS, else these are F16. whole_vocabulary: False leaves a file of a few kilobytes, for what
    only reads heads. nan_in: a component whose weights are all nan.
    """
    import gguf

    letters = [f"▁{a}" for a in "abcdefghijklmnopqrstuvwxyz"] + list("abcdefghijklmnopq▁")
    codes = [f"<0x{i:02X}>" for i in range(256)]
    if not whole_vocabulary:
        letters, codes = letters[:2], codes[:3]
    tokens = ["<unk>", "<s>", "</s>", *codes, *letters]
    kind = gguf.TokenType
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *([kind.BYTE] * len(codes))]
    types += [kind.NORMAL] * len(letters)
    heads = max(hidden // 64, 2)
    kv = hidden // heads * (heads // 2)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(2 * CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([t.encode() for t in tokens])
    writer.add_token_scores([0.0] * (3 + len(codes)) + [-float(i) for i in range(len(letters))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    random = np.random.default_rng(seed)

    def matrix(name: str, rows: int, columns: int, type_name: str = matrix_type) -> None:
        weights = random.standard_normal((rows, columns)) / np.sqrt(columns)
        weights = weights.astype(np.float32)
        if name == nan_in:
            weights[:] = np.nan
        if type_name in FLOATS:
            writer.add_tensor(f"{name}.weight", weights.astype(FLOATS[type_name]))
        else:
            data = ggml.quantize(type_name, weights, threads=1)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=ggml_types.ggml_type(type_name))

    def norm(name: str, gain: float) -> None:
        writer.add_tensor(f"{name}.weight", np.full(hidden, gain, dtype=np.float32))

    table = matrix_type if matrix_type in FLOATS else "F16"
    matrix("token_embd", len(tokens), hidden, table)
    matrix("output", len(tokens), hidden, table)
    # Larger logits: fewer near-ties, so that what is healthy stays far from the thresholds.
    norm("output_norm", 3)
    for i in range(layers):
        norm(f"blk.{i}.attn_norm", 1)
        norm(f"blk.{i}.ffn_norm", 1)
        matrix(f"blk.{i}.attn_q", hidden, hidden)
        matrix(f"blk.{i}.attn_k", kv, hidden)
        matrix(f"blk.{i}.attn_v", kv, hidden)
        matrix(f"blk.{i}.attn_output", hidden, hidden)
        matrix(f"blk.{i}.ffn_gate", ffn, hidden)
        matrix(f"blk.{i}.ffn_up", ffn, hidden)
        matrix(f"blk.{i}.ffn_down", hidden, ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference_of(prompts: Sequence[Sequence[int]], texts: Sequence[str], tokens: int) -> Reference:
    """A reference with these prompts, the first two of full length, and nothing generated yet."""
    s = len(prompts)
    lengths = np.array([tokens if i < 2 else 1 + i * 5 % tokens for i in range(s)], dtype=np.int32)
    prompt_ids = np.full((s, max(map(len, prompts))), PADDING, dtype=np.int32)
    for row, ids in enumerate(prompts):
        prompt_ids[row, : len(ids)] = ids
    return Reference(
        prompt_ids=prompt_ids,
        prompt_lengths=np.array([len(ids) for ids in prompts], dtype=np.int32),
        generated_ids=np.zeros((s, tokens), dtype=np.int32),
        generated_lengths=lengths,
        top_ids=np.zeros((s, tokens, TOP_K), dtype=np.int32),
        top_logits=np.zeros((s, tokens, TOP_K), dtype=np.float32),
        log_normalizers=np.zeros((s, tokens), dtype=np.float32),
        split=np.full(s, HELD_OUT, dtype=np.uint8),
        texts=np.array(texts),
        provenance={"model": "tiny"},
    )


def made_up(seed: int = 0) -> tuple[Reference, Record]:
    """A small reference and a record that fits it, of random numbers: no model runs."""
    random = np.random.default_rng(seed)
    empty = reference_of([[1, 5, 6], [1, 7]], ["ab", "é"], 4)
    shape = empty.generated_ids.shape
    top = -np.sort(-random.standard_normal((*shape, TOP_K)).astype(np.float32))
    ids = random.integers(0, 9, (*shape, TOP_K)).astype(np.int32)
    reference = replace(empty, generated_ids=ids[..., 0].copy(), top_ids=ids, top_logits=top)
    record = Record(
        mode="teacher_forced",
        ids=ids[..., 0].copy(),
        top_ids=ids,
        top_logits=top,
        log_normalizers=np.ones(shape, dtype=np.float32),
        reference_log_probabilities=np.full(shape, -1, dtype=np.float32),
        lengths=reference.generated_lengths.copy(),
        prefill_tokens_per_s=10.0,
        decode_tokens_per_s=float("nan"),
        settings=SETTINGS.to_json(),
        meta={"machine": "host"},
    )
    return reference, record


def plan() -> Plan:
    """Any valid plan."""
    components = tuple(
        Component(f"blk.{i}.{n}", 64, 256) for i in range(2) for n in ("attn_q", "ffn_up")
    )
    kinds = (Treatment("Q8_0"), Treatment("Q4_K"), Treatment("Q8_0", 0.5), Treatment("F16"))
    return Plan(components, kinds, 4096)


def verdict() -> Verdict:
    """A verdict as verify gives it, of made-up figures."""
    reference, record = made_up()
    lengths = reference.generated_lengths
    divergence = compare(reference.generated_ids, record.ids, lengths, reference.margins, 0.01)
    evidence = Evidence(
        mode="teacher_forced",
        against_original=divergence,
        against_host=divergence,
        host=AgainstHost(kl_nats=0.001, decided_sdt=0.0, decided_positions=5, largest_margin=0.2),
        kl_probe_nats=1e-7,
        kernels=[KernelCheck("Q4_0", "repacked", 5, 1e-7, "blk.0.attn_q", True)],
        first_divergent_tokens=[int(n) for n in lengths],
        lengths=[int(n) for n in lengths],
    )
    return Verdict(
        passed=True,
        reasons=["FDT against the original is 3.00 tokens, wanted at least 1.00."],
        diagnosis=Diagnosis("healthy", "This machine computes what the host computed."),
        evidence=evidence,
        sequences=len(lengths),
        sequences_in_bundle=len(lengths),
        thresholds=THRESHOLDS,
        noise_floor=MEASURED["noise_floor"],
        bundle={
            "name": "tiny.edge",
            "manifest_sha256": "0" * 64,
            "model_sha256": "1" * 64,
            "key_id": None,
        },
        performance={
            "prefill_tokens_per_s": 100.0,
            "decode_tokens_per_s": 10.0,
            "time_to_first_token_s": 0.1,
            "peak_rss_bytes": 10**8,
        },
        settings=SETTINGS.to_json(),
        runtime={
            "llama_cpp_python": "0.3.36",
            "system_info": "CPU : NEON = 1",
            "cpus": 4,
            "machine": "aarch64",
            "platform": "Linux",
            "python": "3.11.2",
        },
    )


def seal(folder: Path, measured: dict[str, Any] | None = None) -> None:
    """Write the manifest of the files as they are now."""
    write_manifest(folder, FILES, THRESHOLDS, {"model": "tiny"}, measured or MEASURED)


def make_bundle(folder: Path, matrix_type: str = "F16", seed: int = 0) -> Path:
    """A bundle that passes on this machine; folder is made."""
    folder.mkdir()
    model = folder / "model.gguf"
    write_gguf(model, seed, matrix_type=matrix_type)
    empty = reference_of(tokenize(model, TEXTS), TEXTS, TOKENS)
    with LlamaRunner(model, SETTINGS, CONTEXT) as llama:
        said = llama.greedy(empty)
        reference = replace(
            empty,
            generated_ids=said.ids,
            top_ids=said.top_ids,
            top_logits=said.top_logits,
            log_normalizers=said.log_normalizers,
        )
        reference.save(folder / "reference.npz")
        llama.teacher_forced(reference).save(folder / "host.npz", {"machine": "host"})
    probe = folder / "probe.gguf"
    probe_model.record(probe, SETTINGS).save(folder / "probe.npz", {})
    probe.unlink()
    (folder / "plan.json").write_text(json.dumps(plan().to_json()) + "\n")
    (folder / "report.md").write_text("# Tiny\n")
    seal(folder)
    return folder
