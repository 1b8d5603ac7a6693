"""How far healthy ARM kernels are from this machine's: the band that verify's limits rest on.

    python tools/arm_calibrate.py bundle f16.gguf q8.gguf mixed.gguf --sequences 8

Each GGUF reads the same sequences, teacher-forced, here and on each emulated device (see
arm_device.py), one thread; the first argument says which: a bundle or its reference.npz. The table
has a line for each file and device, with the figures of edge_dtm.formats.verdict.against_host: positions,
equal argmaxes, mean KL (host || device, each position's capped), the share of other argmaxes among
the positions that the host decided by a margin of so many logits or more, with their number, and
the largest margin at which a token differs. The last line of a device is the small F16 model of
edge_dtm.llamacpp.probe_model.

Emulation takes hours for a large model: cut it first (arm_cut.py). What a device has said is kept in
--work, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.metrics import top_kl
from edge_dtm.device.judge import against_host
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import HELD_OUT, Reference, load_npz, save_npz
from edge_dtm.llamacpp import probe_model
from edge_dtm.llamacpp.gguf_header import check_gguf
from edge_dtm.llamacpp.runner import LlamaRunner
from edge_dtm.llamacpp.schedule import context_needed

TOOL = Path(__file__).resolve().with_name("arm_device")
DEVICES = ("pi4", "pi5", "i8mm")
MARGINS = (0.5, 1.0, 1.5, 2.0)  # logits
SETTINGS = RunSettings(threads=1)
PROBE = "the F16 probe"
HEAD = "| file | device | positions | equal argmaxes | mean KL, nats |"


def replay(model: Path, reference: Path, host: Path, out: Path) -> None:
    """On the device: write its argmaxes int32 (S, N) and its logits at the host's top ids."""
    record = Record.load(host)
    there = np.zeros_like(record.top_logits)

    def observe(row: int, position: int, logits: npt.NDArray[np.float32]) -> None:
        there[row, position] = logits[record.top_ids[row, position]]

    sequences = Reference.load(reference)
    with LlamaRunner(model, SETTINGS, context_needed(sequences)) as llama:
        ids = llama.teacher_forced(sequences, observe=observe).ids
    save_npz(out, {"ids": ids, "logits": there}, {"kind": "replay"})


def on_device(device: str, model: Path, reference: Path, host: Path, out: Path) -> None:
    """replay on an emulated device, unless out is there. EdgeDtmError when it fails."""
    if out.is_file():
        return
    here = Path(__file__).resolve()
    words = [TOOL, device, "--", "python", here, "--replay", model, reference, host, out]
    done = subprocess.run([str(w) for w in words], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EdgeDtmError(f"{model.name} on {device}: {last.removeprefix('error: ')}")


def figures(reference: Reference, host: Record, replayed: Path) -> list[str]:
    """The cells of a line behind file and device."""
    found, _ = load_npz(replayed, ["ids", "logits"], "replay")
    kl = top_kl(host.top_logits, found["logits"])
    lengths = reference.generated_lengths
    counted = np.arange(kl.shape[1])[None, :] < lengths[:, None]
    equal = int((found["ids"] == host.ids)[counted].sum())
    cells = [str(int(lengths.sum())), str(equal)]
    for margin in MARGINS:
        a = against_host(host.ids, host.top_logits, found["ids"], kl, lengths, margin)
        if margin == MARGINS[0]:
            cells.append(f"{a.kl_nats:.2g}")
        cells.append(f"{a.decided_sdt:.2%} of {a.decided_positions}")
    return [*cells, f"{a.largest_margin:.2f}"]


def lines(
    files: Sequence[Path], reference: Reference, devices: Sequence[str], work: Path
) -> Iterator[str]:
    """The table, line by line as it is measured."""
    margins = [f"≥ {m:g}" for m in MARGINS]
    yield f"{HEAD} {' | '.join(margins)} | largest margin |"
    yield "|---" * (6 + len(MARGINS)) + "|"
    work.mkdir(parents=True, exist_ok=True)
    probe = work / "probe.gguf"
    probe_model.write(probe)
    for file in (*files, probe):
        name, said = (PROBE, probe_model.sequences()) if file == probe else (file.name, reference)
        key = _key(file, said)
        asked, host_file = work / f"{key}-asked.npz", work / f"{key}-host.npz"
        if not host_file.is_file():
            check_gguf(file)
            said.save(asked)
            with LlamaRunner(file, SETTINGS, context_needed(said)) as llama:
                llama.teacher_forced(said).save(host_file)
        host = Record.load(host_file)
        for device in devices:
            out = work / f"{key}-{device}.npz"
            on_device(device, file, asked, host_file, out)
            yield f"| {name} | {device} | {' | '.join(figures(said, host, out))} |"


def _key(file: Path, reference: Reference) -> str:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
    digest.update(reference.prompt_ids.tobytes() + reference.generated_ids.tobytes())
    return f"{file.stem}-{digest.hexdigest()[:12]}"


def shortened(reference: Reference, sequences: int, tokens: int) -> Reference:
    """The held-out sequences of the shortest prompts, each with its first tokens."""
    part = reference.part(HELD_OUT)
    part = part.rows(np.argsort(part.prompt_lengths, kind="stable")[:sequences])
    return replace(
        part,
        generated_ids=part.generated_ids[:, :tokens],
        generated_lengths=np.minimum(part.generated_lengths, tokens).astype(np.int32),
        top_ids=part.top_ids[:, :tokens],
        top_logits=part.top_logits[:, :tokens],
        log_normalizers=part.log_normalizers[:, :tokens],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["--replay"]:
            replay(*map(Path, arguments[1:]))
            return 0
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("reference", type=Path, help="a bundle's folder or a reference.npz")
        parser.add_argument("files", type=Path, nargs="+", metavar="MODEL.gguf")
        parser.add_argument("--devices", nargs="+", choices=DEVICES, default=DEVICES)
        parser.add_argument("--sequences", type=int, default=8)
        parser.add_argument("--tokens", type=int, default=64, help="at most, of each sequence")
        parser.add_argument("--work", type=Path, default=Path("bench-arm"))
        options = parser.parse_args(arguments)
        path = (
            options.reference / bundles.REFERENCE
            if options.reference.is_dir()
            else options.reference
        )
        said = shortened(Reference.load(path), options.sequences, options.tokens)
        for line in lines(options.files, said, options.devices, options.work):
            print(line, flush=True)
    except (EdgeDtmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
