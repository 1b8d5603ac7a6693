"""A verdict and a bundle of 30 layers with made-up figures, for what only shows them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import BUNDLE_FILES

from edge_dtm.core.metrics import compare, divergent_mask, first_divergent_tokens
from edge_dtm.formats.bundle import write_manifest
from edge_dtm.formats.plan import Component, Plan, Treatment
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import HELD_OUT, PADDING, TOP_K, Reference
from edge_dtm.formats.thresholds import EXACT, thresholds_from
from edge_dtm.search.frontier import FrontierPoint

SEQUENCES, TOKENS, LAYERS, WIDTH, FFN = 24, 48, 30, 576, 1536
KINDS = ("Q4_0", "IQ4_NL", "Q5_0", "Q8_0", "F16")

_DIVERGENCE = {
    "sdt": {"value": 0.03, "low": 0.02, "high": 0.04},
    "fdt": {"value": 30.0, "low": 25.0, "high": 36.0},
    "identical_share": 0.2,
    "sequences": 3,
    "tokens": 144,
    "divergent_tokens": 4,
    "near_tie_share": 0.01,
    "near_tie_margin": 0.05,
}
_VERDICT: dict[str, Any] = {
    "schema_version": 3,
    "kind": "edge-dtm verdict",
    "passed": True,
    "reasons": ["FDT against the original is 30.00 tokens, wanted at least 20.00."],
    "diagnosis": {"code": "healthy", "words": "This machine computes what the host computed."},
    "notes": [],
    "mode": "teacher_forced",
    "bundle": {
        "name": "tiny",
        "manifest_sha256": "a" * 64,
        "model_sha256": "b" * 64,
        "key_id": None,
    },
    "sequences": 3,
    "sequences_in_bundle": 3,
    "against_original": _DIVERGENCE,
    "against_host": _DIVERGENCE | {"sdt": {"value": 0.01, "low": 0.0, "high": 0.02}},
    "kl_vs_host_nats": 0.006,
    "decided_sdt_vs_host": 0.0,
    "largest_margin_vs_host": 0.4,
    "kl_probe_nats": 1e-6,
    "kernels": [
        {
            "type": "Q8_0",
            "path": "repacked",
            "columns": 1,
            "worst_relative_error": 1e-7,
            "component": "blk.0.attn_q",
            "ok": True,
        }
    ],
    "kernels_compare": {"positions": 144, "differing_tokens": 0, "kl_nats": 0.0},
    "performance": {
        "prefill_tokens_per_s": 210.0,
        "decode_tokens_per_s": 31.5,
        "time_to_first_token_s": 0.61,
        "p50_ms": 31.0,
        "p95_ms": 38.0,
        "peak_rss_bytes": 210_000_000,
    },
    "settings": {"threads": 4},
    "runtime": {
        "llama_cpp_python": "0.3.36",
        "system_info": "CPU : NEON = 1 | DOTPROD = 1",
        "cpus": 4,
        "machine": "aarch64",
        "platform": "Linux-6.6-aarch64",
        "python": "3.11.2",
    },
    "noise_floor": {},
    "thresholds": {
        "max_sdt": 0.1,
        "min_fdt": 20.0,
        "max_kl_vs_host": 0.05,
        "decided_margin": 1.5,
        "max_decided_sdt_vs_host": 0.005,
        "max_kl_probe": 0.001,
    },
    "first_divergent_tokens": [3, 39, 48],
    "lengths": [48, 48, 48],
}


def verdict(**changes: Any) -> dict[str, Any]:
    """A whole verdict; changes replace top-level fields, objects are merged."""
    data = copy.deepcopy(_VERDICT)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(data[name], dict):
            data[name] |= value
        else:
            data[name] = value
    return data


def generated_verdict(**changes: Any) -> dict[str, Any]:
    """As of mode generate, which has no SDT and no KL."""
    nothing = {"sdt": None, "divergent_tokens": None, "near_tie_share": None}
    return verdict(
        mode="generate",
        against_original=nothing,
        against_host=nothing,
        kl_vs_host_nats=None,
        decided_sdt_vs_host=None,
        largest_margin_vs_host=None,
        kernels_compare=None,
        **changes,
    )


def components() -> tuple[Component, ...]:
    kv = WIDTH // 3
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (kv, WIDTH),
        "attn_v": (kv, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (FFN, WIDTH),
        "ffn_up": (FFN, WIDTH),
        "ffn_down": (WIDTH, FFN),
    }
    blocks = [Component(f"blk.{i}.{n}", *s) for i in range(LAYERS) for n, s in shapes.items()]
    return (Component("token_embd", 49152, WIDTH), *blocks)


def plan_json(random: np.random.Generator) -> dict[str, Any]:
    """plan.json as compress writes it: treatments, frontier, costs."""
    parts = components()
    chosen = [Treatment("Q8_0")] + [Treatment(str(random.choice(KINDS))) for _ in parts[1:]]
    chosen[1] = Treatment("Q8_0", 0.5)
    plan = Plan(parts, tuple(chosen), 1_000_000)
    scale = np.exp(random.normal(-9, 2, len(parts)))
    steps = np.geomspace(0.25, 0.01, 300)
    return {
        **plan.to_json(),
        "sha256": plan.hash,
        "predicted": {"sigma": 0.2, "sdt": 0.043, "fdt": 19.0},
        "frontier": [
            FrontierPoint(int(80e6 + i * 3e5), 1.0, float(s), 10.0).to_json()
            for i, s in enumerate(steps)
        ],
        "costs": [
            {
                "name": c.name,
                "costs": {k: float(s / 8**j) for j, k in enumerate(KINDS)}
                | ({"Q8_0+40.0% zeros": 1.0, "Q8_0+60.0% zeros": 3.0} if i == 1 else {}),
            }
            for i, (c, s) in enumerate(zip(parts, scale, strict=True))
        ],
    }


def answers(reference: Reference, random: np.random.Generator, rate: float) -> Record:
    """A teacher-forced record that takes another of the original's top tokens at a share of the
    positions; there the original's own comes second."""
    shape = reference.generated_ids.shape
    counted = np.arange(shape[1])[None, :] < reference.generated_lengths[:, None]
    # Some sequences are harder than others.
    each = rate * random.gamma(0.8, 1.25, (shape[0], 1))
    other = (random.random(shape) < each) & counted
    top_ids = reference.top_ids.copy()
    top_ids[other] = np.roll(top_ids[other], 1, axis=1)
    chosen = np.where(counted, top_ids[:, :, 0], PADDING).astype(np.int32)
    second = reference.top_logits[:, :, 1] - reference.log_normalizers
    first = reference.top_logits[:, :, 0] - reference.log_normalizers
    return Record(
        mode="teacher_forced",
        ids=chosen,
        top_ids=top_ids,
        top_logits=reference.top_logits,
        log_normalizers=reference.log_normalizers,
        reference_log_probabilities=np.where(
            counted, np.where(other, second, first), np.nan
        ).astype(np.float32),
        lengths=reference.generated_lengths,
        prefill_tokens_per_s=812.0,
        decode_tokens_per_s=float("nan"),
        settings=RunSettings(threads=2).to_json(),
    )


def reference_of(
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    answer: Callable[[int], list[int]],
    random: np.random.Generator,
    ids: Sequence[int],
) -> Reference:
    """One sequence a text; answer(row): the original's token ids, TOKENS at most."""
    s = len(texts)
    prompts, generated = [encode(t) for t in texts], [answer(i)[:TOKENS] for i in range(s)]
    prompt_ids = np.full((s, max(map(len, prompts))), PADDING, np.int32)
    generated_ids = np.full((s, TOKENS), PADDING, np.int32)
    for row in range(s):
        prompt_ids[row, : len(prompts[row])] = prompts[row]
        generated_ids[row, : len(generated[row])] = generated[row]
    # The original's token first, then others, none of them twice.
    some = random.choice(ids, 2 * TOP_K, replace=False)
    top_ids = some[random.random((s, TOKENS, len(some))).argsort(axis=2)]
    own = top_ids == generated_ids[:, :, None]
    top_ids = np.take_along_axis(top_ids, own.argsort(axis=2, kind="stable"), axis=2)
    top_ids = top_ids[:, :, :TOP_K].astype(np.int32)
    top_ids[:, :, 0] = generated_ids
    top = np.sort(random.normal(0, 3, (s, TOKENS, TOP_K)), axis=2)[:, :, ::-1].astype(np.float32)
    return Reference(
        prompt_ids=prompt_ids,
        prompt_lengths=np.array([len(p) for p in prompts], np.int32),
        generated_ids=generated_ids,
        generated_lengths=np.array([len(g) for g in generated], np.int32),
        top_ids=top_ids,
        top_logits=top,
        log_normalizers=np.log(np.exp(top).sum(axis=2)).astype(np.float32) + 0.1,
        split=np.full(s, HELD_OUT, np.uint8),
        texts=np.array(texts),
        provenance={"model": "made up"},
    )


def curve(reference: Reference, record: Record) -> dict[str, list[int]]:
    """The two lists that `measure --json` writes."""
    lengths = reference.generated_lengths
    mask = divergent_mask(reference.generated_ids, record.ids, lengths)
    return {
        "first_divergent_tokens": first_divergent_tokens(mask, lengths).tolist(),
        "lengths": lengths.tolist(),
    }


def measured_json(
    reference: Reference, record: Record, name: str, size_bytes: int
) -> dict[str, Any]:
    """As `measure --json` writes it."""
    found = compare(reference.generated_ids, record.ids, reference.generated_lengths)
    more = {"name": name, "size_bytes": size_bytes, "perplexity": 2.0}
    return found.to_json() | more | curve(reference, record)


def write_full_bundle(folder: Path, model: Path, probe: Path, reference: Reference) -> None:
    """A bundle of a model file with everything that compress puts into its JSON files."""
    random = np.random.default_rng(1)
    folder.mkdir()
    shutil.copy(model, folder / "model.gguf")
    shutil.copy(probe, folder / "probe.npz")
    reference.save(folder / "reference.npz")
    host = answers(reference, random, 0.05)
    host.save(folder / "host.npz")
    floor = answers(reference, random, 0.002)
    (folder / "plan.json").write_text(json.dumps(plan_json(random)))
    (folder / "report.md").write_text("# Made up\n")
    found = compare(reference.generated_ids, host.ids, reference.generated_lengths)
    least = compare(reference.generated_ids, floor.ids, reference.generated_lengths)
    write_manifest(
        folder,
        BUNDLE_FILES,
        thresholds_from(found, EXACT, quantized=True),
        {
            "model": "SmolLM2-135M-Instruct",
            "profile": "raspberrypi-5",
            "budget": "Budget 105,000,000 bytes, given.",
            "types": list(KINDS),
            "seed": 0,
            "equalization": True,
        },
        {
            **found.to_json(),
            "f16_bytes": 270_900_000,
            "noise_floor": least.to_json() | {"near_tie_margin": 0.05} | curve(reference, floor),
        },
    )
