"""Cut a model to its first layers and make a bundle of it, small enough for an emulated device.

    python tools/arm_cut.py MODEL.gguf -o cut-bundle --types Q8_0
    python tools/arm_cut.py demo-bundle -o cut-bundle            # the types the bundle chose

What is left is a model of its own, which talks nonsense; that does not matter, since a device is
asked for the same nonsense. The cut in F16 is the original: its greedy answers in llama.cpp on this
machine are the reference. The file in the bundle is the cut with the source's own types, or with
those of --types: matrices take turns among those types of the list whose blocks fit their rows.

Prompts: the bundle's held-out ones; for a GGUF the packaged ones that are no chats.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from edge_dtm.formats import ggml_types

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.metrics import compare
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import HELD_OUT, PADDING, TOP_K, Reference
from edge_dtm.formats.thresholds import healthy_range, thresholds_from
from edge_dtm.llamacpp import ggml, probe_model
from edge_dtm.llamacpp.gguf_header import check_gguf
from edge_dtm.llamacpp.runner import LlamaRunner
from edge_dtm.llamacpp.schedule import context_needed
from edge_dtm.llamacpp.vocabulary import tokenize

FLOAT_TYPES = ("F32", "F16", "BF16")
MAX_PROMPT_TOKENS = 32  # the emulator reads about ten tokens a second


def cut_gguf(source: Path, out: Path, layers: int, types: Sequence[str] = ()) -> list[str]:
    """Write the first layers of a GGUF and return the types of its matrices.

    types: what matrices of the same row length become in turn, without those whose blocks do not
    fit; empty: their bytes stay as they are. EdgeDtmError when the source has fewer layers or no
    type fits.
    """
    check_gguf(source)
    reader = gguf.GGUFReader(source)
    arch = str(_value(reader, "general.architecture"))
    had = int(_value(reader, f"{arch}.block_count"))
    if not 1 <= layers <= had:
        raise EdgeDtmError(f"{source} has {had} layers: cut it to 1 to {had}")
    writer = gguf.GGUFWriter(out, arch)
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        value, outer = field.contents(), field.types[0]
        if field.name == f"{arch}.block_count":
            value = layers
        elif field.name.startswith(f"{arch}.") and isinstance(value, list) and len(value) == had:
            value = value[:layers]  # one entry a layer, in files of architecture deci
        inner = field.types[-1] if outer == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, outer, inner)
    turns: dict[int, Iterator[str]] = {}
    chosen = list[str]()
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and int(parts[1]) >= layers:
            continue
        data, kind = tensor.data, tensor.tensor_type.name
        if len(tensor.shape) == 2:
            if types:
                row_length = int(tensor.shape[0])
                if row_length not in turns:
                    turns[row_length] = cycle(_fitting(types, row_length))
                new = next(turns[row_length])
                data, kind = _recode(data, kind, new, row_length), new
            chosen.append(kind)
        writer.add_tensor(tensor.name, data, raw_dtype=ggml_types.ggml_type(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return chosen


def _value(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise EdgeDtmError(f"{reader.data.filename} has no {name}: it is no model to cut")
    return field.contents()


def _fitting(types: Sequence[str], row_length: int) -> list[str]:
    found = [kind for kind in types if row_length % ggml_types.block_size(kind) == 0]
    if not found:
        raise EdgeDtmError(
            f"no type among {', '.join(types)} has blocks that fit rows of {row_length}: add Q8_0"
        )
    return found


def _recode(data: npt.NDArray[Any], old: str, new: str, row_length: int) -> npt.NDArray[Any]:
    """Bytes (rows, row_bytes) of another type; F16 as float16, since the writer needs its shape."""
    raw = (
        np.ascontiguousarray(data).view(np.uint8).reshape(-1, ggml_types.row_bytes(old, row_length))
    )
    weights = ggml.dequantize(old, raw, row_length, threads=1)
    if new in ("F32", "F16"):
        return weights.astype(np.float32 if new == "F32" else np.float16)
    return ggml.quantize(new, weights, threads=1)


def packaged_texts() -> list[str]:
    """The packaged prompts that are plain text."""
    text = resources.files("edge_dtm").joinpath("data/prompts.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return [r["prompt"] for r in records if "prompt" in r]


def greedy_reference(
    model: Path, texts: Sequence[str], sequences: int, tokens: int, settings: RunSettings
) -> Reference:
    """What the model itself says to the first texts of at most MAX_PROMPT_TOKENS tokens.

    Every sequence has all its tokens: an EOS does not end it, which a nonsense model says any time.
    EdgeDtmError when there are fewer such texts.
    """
    pairs = zip(texts, tokenize(model, texts), strict=True)
    short = [(t, ids) for t, ids in pairs if 0 < len(ids) <= MAX_PROMPT_TOKENS][:sequences]
    if len(short) < sequences:
        raise EdgeDtmError(
            f"{len(short)} prompts have at most {MAX_PROMPT_TOKENS} tokens: ask for as many sequences"
        )
    prompts = np.full((sequences, max(len(ids) for _, ids in short)), PADDING, np.int32)
    for row, (_, ids) in enumerate(short):
        prompts[row, : len(ids)] = ids
    shape = (sequences, tokens)
    asked = Reference(
        prompt_ids=prompts,
        prompt_lengths=np.array([len(ids) for _, ids in short], np.int32),
        generated_ids=np.zeros(shape, np.int32),
        generated_lengths=np.full(sequences, tokens, np.int32),
        top_ids=np.zeros((*shape, TOP_K), np.int32),
        top_logits=np.zeros((*shape, TOP_K), np.float32),
        log_normalizers=np.zeros(shape, np.float32),
        split=np.full(sequences, HELD_OUT, np.uint8),
        texts=np.array([text for text, _ in short]),
        provenance={"model": model.name, "made_by": "tools/arm_cut.py"},
    )
    with LlamaRunner(model, settings, context_needed(asked)) as llama:
        said = llama.greedy(asked)
    return replace(
        asked,
        generated_ids=said.ids,
        top_ids=said.top_ids,
        top_logits=said.top_logits,
        log_normalizers=said.log_normalizers,
    )


def make_bundle(
    source: Path,
    folder: Path,
    *,
    layers: int = 4,
    types: Sequence[str] = (),
    sequences: int = 6,
    tokens: int = 24,
    threads: int = 1,
) -> None:
    """A bundle of the cut in folder, which must not be there; source: a GGUF or a bundle."""
    if folder.exists():
        raise EdgeDtmError(f"{folder} is there already: remove it or name another folder")
    for kind in types:
        ggml_types.ggml_type(kind)
    if source.is_dir():
        model = source / bundles.MODEL
        texts = [str(t) for t in Reference.load(source / bundles.REFERENCE).texts]
    else:
        model, texts = source, packaged_texts()
    settings = RunSettings(threads=threads)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the bundle, so that it can get its name when it is complete.
    with tempfile.TemporaryDirectory(prefix=".cut-", dir=folder.parent) as work:
        original, new = Path(work) / "original-F16.gguf", Path(work) / "bundle"
        new.mkdir()
        cut_gguf(model, original, layers, ("F16",))
        chosen = cut_gguf(model, new / bundles.MODEL, layers, types)
        reference = greedy_reference(original, texts, sequences, tokens, settings)
        plain = _teacher_forced(original, reference, settings)
        host = _teacher_forced(new / bundles.MODEL, reference, settings)
        reference.save(new / bundles.REFERENCE)
        host.save(new / bundles.HOST_RECORD)
        probe = probe_model.record(Path(work) / "probe.gguf", settings)
        probe.save(new / bundles.PROBE_RECORD)
        ids, lengths = reference.generated_ids, reference.generated_lengths
        found = compare(ids, host.ids, lengths, reference.margins)
        floor = compare(ids, plain.ids, lengths, reference.margins)
        quantized = any(kind not in FLOAT_TYPES for kind in chosen)
        healthy = healthy_range(ids, host.top_ids, host.top_logits, lengths)
        bundles.write_manifest(
            new,
            bundles.REQUIRED_FILES,
            thresholds_from(found, healthy, quantized),
            {"source": source.name, "layers": layers, "made_by": "tools/arm_cut.py"},
            {
                **found.to_json(),
                "noise_floor": {**floor.to_json(), "type": "F16"},
                "size_bytes": (new / bundles.MODEL).stat().st_size,
                "run_settings": settings.to_json(),
            },
        )
        new.replace(folder)


def _teacher_forced(model: Path, reference: Reference, settings: RunSettings) -> Record:
    with LlamaRunner(model, settings, context_needed(reference)) as llama:
        return llama.teacher_forced(reference)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a GGUF, or a bundle's folder")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the new bundle's folder")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--types", default="", help="GGML types with commas between; default: as is"
    )
    parser.add_argument("--sequences", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=24, help="of each sequence")
    parser.add_argument("--threads", type=int, default=1)
    options = vars(parser.parse_args(arguments))
    types = tuple(t.strip() for t in options.pop("types").split(",") if t.strip())
    try:
        make_bundle(options.pop("source"), options.pop("out"), types=types, **options)
    except (EdgeDtmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
