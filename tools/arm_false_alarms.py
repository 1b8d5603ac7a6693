"""How often the verdict is wrong: false alarms on healthy devices, and planted faults it misses.

    python tools/arm_cut.py MODEL.gguf -o cut-bundle --types Q8_0 --sequences 80
    python tools/arm_false_alarms.py cut-bundle --devices pi5 --runs 20

The bundle's sequences are dealt out to so many runs, each with other prompts, and each run is
judged as a bundle of its own would be: thresholds from the host's figures on these sequences.

- Healthy: the sequences are replayed on an emulated device (arm_device.py). Every FAIL is a false
  alarm.
- Faulty: the same file with a fault planted, replayed on this machine, so that everything but the
  fault is healthy: the sign of one block's scale, one matrix with the label of another type of the
  same size, the rows of one layer's matrices in another order. Every PASS is a miss. verify's check
  of single products against numpy is left out here, since a file that is wrong is wrong for both; it
  is tried by tests/test_kernels.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from arm_calibrate import DEVICES, on_device, replay

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.metrics import compare, top_kl
from edge_dtm.device.judge import against_host, divergences, judge
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats.archive import open_bundle
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import Reference, load_npz
from edge_dtm.formats.thresholds import healthy_range, thresholds_from
from edge_dtm.formats.verdict import Evidence

Bytes = npt.NDArray[np.uint8]
FLOAT_TYPES = ("F32", "F16", "BF16")
# Types of equal block bytes; the label of one on data of the other is a file that loads.
SAME_SIZE = {"Q4_0": "IQ4_NL", "IQ4_NL": "Q4_0"}


@dataclass(frozen=True)
class Runs:
    """One line of the result: runs that passed and failed, by the diagnosis."""

    passed: int
    codes: dict[str, int]
    kl_nats: float


def judged(reference: Reference, host: Record, answered: Path, runs: int, quantized: bool) -> Runs:
    """Judge what a device said to the bundle's sequences, dealt out to `runs` runs."""
    found, _ = load_npz(answered, ["ids", "logits"], "replay")
    kl = top_kl(host.top_logits, found["logits"])
    passed, codes, mean = 0, {}, []
    for rows in np.array_split(np.random.default_rng(0).permutation(len(reference)), runs):
        part, there = reference.rows(rows), host.rows(rows)
        lengths = part.generated_lengths
        before = compare(part.generated_ids, there.ids, lengths)
        healthy = healthy_range(part.generated_ids, there.top_ids, there.top_logits, lengths)
        limits = thresholds_from(before, healthy, quantized)
        ids = found["ids"][rows]
        original, against, first = divergences(
            part.generated_ids, there.ids, ids, lengths, part.margins, 0.0, "teacher_forced"
        )
        of_host = against_host(
            there.ids, there.top_logits, ids, kl[rows], lengths, limits.decided_margin
        )
        evidence = Evidence(
            mode="teacher_forced",
            against_original=original,
            against_host=against,
            host=of_host,
            kl_probe_nats=None,
            kernels=[],
            first_divergent_tokens=first,
            lengths=[int(n) for n in lengths],
        )
        ok, _, diagnosis = judge(evidence, limits, True)
        passed += ok
        codes[diagnosis.code] = codes.get(diagnosis.code, 0) + 1
        mean.append(of_host.kl_nats)
    return Runs(passed, codes, float(np.mean(mean)))


def matrices(path: Path) -> list[gguf.ReaderTensor]:
    """The quantized block matrices, writable where they lie in the file."""
    reader = gguf.GGUFReader(path, "r+")
    return [
        t
        for t in reader.tensors
        if len(t.shape) == 2 and t.name.startswith("blk.") and t.tensor_type.name not in FLOAT_TYPES
    ]


def flip_scale(path: Path, random: np.random.Generator) -> str:
    """The sign of the float16 scale at the head of one block of Q8_0, Q4_0 and the like."""
    tensor = _any([t for t in matrices(path) if t.tensor_type.name in ("Q8_0", "Q4_0", "Q5_0",
                                                                      "IQ4_NL")], random)  # fmt: skip
    size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    flat = tensor.data.reshape(-1)
    at = int(random.integers(len(flat) // size)) * size + 1  # little endian: the sign is in byte 2
    flat[at] ^= 0x80
    flat.flush()
    return tensor.name


def swap_rows(path: Path, random: np.random.Generator) -> str:
    """The rows of all matrices of one layer in another order."""
    found = matrices(path)
    layer = _any(sorted({t.name.split(".")[1] for t in found}), random)
    for tensor in found:
        if tensor.name.split(".")[1] == layer:
            tensor.data[:] = tensor.data[random.permutation(len(tensor.data))]
            tensor.data.flush()
    return f"blk.{layer}"


def relabel(path: Path, random: np.random.Generator) -> str:
    """One matrix with the label of the other type of the same size."""
    tensor = _any([t for t in matrices(path) if t.tensor_type.name in SAME_SIZE], random)
    label = tensor.field.parts[-2]  # name length, name, dimensions, sizes, type, offset
    label[0] = gguf.GGMLQuantizationType[SAME_SIZE[tensor.tensor_type.name]].value
    label.flush() if hasattr(label, "flush") else label.base.flush()
    return tensor.name


FAULTS: dict[str, Callable[[Path, np.random.Generator], str]] = {
    "sign of one block's scale": flip_scale,
    "label of one matrix": relabel,
    "rows of one layer": swap_rows,
}


def _any(items: Sequence, random: np.random.Generator):  # type: ignore[no-untyped-def,type-arg]
    if not items:
        raise LookupError
    return items[int(random.integers(len(items)))]


def line(name: str, runs: Runs) -> str:
    codes = ", ".join(f"{n} {code}" for code, n in sorted(runs.codes.items()))
    total = sum(runs.codes.values())
    return f"| {name} | {runs.passed} of {total} | {codes} | {runs.kl_nats:.2g} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--devices", nargs="*", choices=DEVICES, default=DEVICES)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--plants", type=int, default=5, help="of each fault, at other places")
    parser.add_argument("--work", type=Path, default=Path("bench-arm"))
    options = parser.parse_args()
    try:
        bundle = open_bundle(options.bundle)
        model, asked = bundle.path(bundles.MODEL), bundle.path(bundles.REFERENCE)
        host_file = bundle.path(bundles.HOST_RECORD)
        reference, host = Reference.load(asked), Record.load(host_file)
        quantized = bool(matrices(model))
        if len(reference) < 2 * options.runs:
            raise EdgeDtmError(
                f"{len(reference)} sequences are too few for {options.runs} runs: make the bundle "
                "with more (arm_cut.py --sequences)"
            )
        options.work.mkdir(parents=True, exist_ok=True)
        stem = bundle.manifest.files[bundles.MODEL].sha256[:12]
        print("| machine | passed | diagnoses | mean KL, nats |\n|---|---|---|---|")
        for device in options.devices:
            out = options.work / f"alarms-{stem}-{len(reference)}-{device}.npz"
            on_device(device, model, asked, host_file, out)
            print(line(f"healthy, {device}", judged(reference, host, out, options.runs, quantized)),
                  flush=True)  # fmt: skip
        for name, plant in FAULTS.items():
            random, copy = np.random.default_rng(0), options.work / "faulty.gguf"
            for _ in range(options.plants):
                copy.write_bytes(model.read_bytes())
                try:
                    where = plant(copy, random)
                except LookupError:
                    print(f"| {name} | no matrix of a fitting type | | |")
                    break
                out = options.work / "faulty.npz"
                replay(copy, asked, host_file, out)
                found = judged(reference, host, out, options.runs, quantized)
                print(line(f"{name}: {where}", found), flush=True)
            copy.unlink(missing_ok=True)
    except (EdgeDtmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
