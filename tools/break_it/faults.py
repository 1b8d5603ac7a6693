"""Known faults, each tried with the real command line in a child process.

A bundle of a tiny random model is made and spoilt in one way a row. Each row has an expectation: the
exit code; exactly one `error:` line, or a FAIL line with its diagnosis; never a traceback.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from fixtures import tiny_bundle

from break_it import containers
from edge_dtm.formats.bundle import MANIFEST, SIGNATURE
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import Reference
from edge_dtm.llamacpp.gguf_header import read_header

ROOT = Path(__file__).resolve().parents[2]
PASSED, ERROR, FAILED = 0, 1, 3
MATRIX_TYPE, SAME_SIZE_TYPE = "Q4_0", "IQ4_NL"  # both take 18 bytes for 32 weights
SHOWN = 230  # characters of a line in the table
TIMEOUT_S = 600
KILL_ATTEMPTS = 40
MEMORY_STEPS, MEMORY_STEP_MB = 6, 25


@dataclass(frozen=True)
class Seen:
    """What one run of the command line gave; stderr and stdout are lines."""

    code: int
    stdout: tuple[str, ...]
    stderr: tuple[str, ...]

    @property
    def last_line(self) -> str:
        """The error, else the last thing said; of a FAIL the diagnosis comes first."""
        errors = [line for line in self.stderr if line.startswith("error: ")]
        lines = [line for line in self.stdout if line.strip()]
        if errors:
            return errors[-1]
        if len(lines) > 1 and lines[-1].startswith("FAIL "):
            return f"{lines[-2]} FAIL ..."
        return lines[-1] if lines else ""

    def problems(self, expected: int) -> list[str]:
        """What is not as a user may expect it of this exit code."""
        out = []
        if self.code != expected:
            out.append(f"exit code {self.code} instead of {expected}")
        if any("Traceback" in line for line in (*self.stderr, *self.stdout)):
            out.append("a traceback")
        errors = sum(line.startswith("error: ") for line in self.stderr)
        if errors != (expected == ERROR):
            text = " / ".join(line for line in self.stderr if line.strip())
            out.append(f"{errors} error lines in {text[-SHOWN:]!r}")
        if expected == FAILED:
            if not self.stdout or not self.stdout[-1].startswith("FAIL "):
                out.append("no FAIL line at the end")
            elif len(self.stdout) < 2 or not self.stdout[-2].strip():
                out.append("no diagnosis")
        return out


@dataclass(frozen=True)
class Row:
    """One line of the table. problems: expectations not met."""

    fault: str
    seen: str
    code: str
    lost: str
    problems: Sequence[str] = ()


Arguments = tuple[str | Path, ...]


def verify(bundle: Path, *options: str | Path) -> Arguments:
    return ("verify", bundle, "--threads", "1", *options)


class Bench:
    """The folder that all faults are tried in, with what they start from.

    bundle: a folder that passes; packed: it as one file, signed; trusted: options with its key.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.bundle = tiny_bundle.make_bundle(work / "good", MATRIX_TYPE)
        self.scratch = work / "tmp"
        self.scratch.mkdir()
        self.trusted = ("--trusted-keys", work / "trusted")
        (work / "trusted").mkdir()
        for name in ("mine", "other"):
            self.run("keygen", work / name)
        shutil.copy(work / "mine.pub", work / "trusted")
        self.packed = work / "good.edge"
        self.run("pack", self.bundle, "-o", self.packed, "--sign", work / "mine.key")
        self._count = 0

    def command(self, *arguments: str | Path) -> list[str]:
        """What the installed edge-dtm runs, from this checkout."""
        return [sys.executable, "-c", "from edge_dtm.cli import run; run()", *map(str, arguments)]

    def environment(self) -> dict[str, str]:
        """With the width of a usual terminal, and temporary files where they are looked for."""
        return os.environ | {
            "COLUMNS": "100",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.scratch),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *arguments: str | Path, before: Sequence[str] = ()) -> Seen:
        """Run the command line; before: a program that starts it, such as setpriv."""
        done = subprocess.run(
            [*before, *self.command(*arguments)],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
        )
        return Seen(
            done.returncode, tuple(done.stdout.splitlines()), tuple(done.stderr.splitlines())
        )

    def copy(self) -> Path:
        """A bundle folder to spoil."""
        return Path(shutil.copytree(self.bundle, self.new("copy")))

    def new(self, name: str, suffix: str = "") -> Path:
        """A path where nothing is."""
        self._count += 1
        return self.work / f"{name}-{self._count}{suffix}"

    def paths(self) -> dict[str, int]:
        """Every path below the work folder -> when it was changed, 0 for folders."""
        return {
            str(p.relative_to(self.work)): 0 if p.is_dir() else p.lstat().st_mtime_ns
            for p in sorted(self.work.rglob("*"))
        }

    def row(
        self, fault: str, expected: int, arguments: Arguments, before: Sequence[str] = ()
    ) -> Row:
        """Run it; lost: what is there or gone that should not be, which is a problem too."""
        old = self.paths()
        seen = self.run(*arguments, before=before)
        new = self.paths()
        changed = ", ".join(sorted(n for n in {*old, *new} if old.get(n) != new.get(n)))
        problems = seen.problems(expected) + ([f"changed {changed}"] if changed else [])
        return Row(
            fault, self.shown(seen.last_line), str(seen.code), changed or "nothing", problems
        )

    def shown(self, line: str) -> str:
        line = line.replace(f"{self.work}/", "").replace(str(self.work), ".")
        return line if len(line) <= SHOWN else line[: SHOWN - 4] + " ..."


# --- damage on the way -----------------------------------------------------------------------


def spoilt_bytes(bench: Bench, flips: int, cuts: int) -> Iterator[Row]:
    data = bench.packed.read_bytes()
    source = random.Random(0)
    changed = []
    for _ in range(flips):
        spoilt = bytearray(data)
        spoilt[source.randrange(len(data))] ^= source.randrange(1, 256)
        changed.append(bytes(spoilt))
    yield _many(bench, f"flipped byte in a packed file, at {flips} places", changed)
    lengths = [0, 1, len(data) - 1, *(source.randrange(len(data)) for _ in range(cuts - 3))]
    cut = [data[:n] for n in lengths]
    yield _many(bench, f"packed file cut off, at {len(lengths)} places", cut)


def _many(bench: Bench, fault: str, contents: Sequence[bytes]) -> Row:
    path, out = bench.new("spoilt", ".edge"), bench.new("out")
    messages: Counter[str] = Counter()
    problems: set[str] = set()
    refused = 0
    before = set(bench.paths())
    for data in contents:
        path.write_bytes(data)
        seen = bench.run("unpack", path, "-o", out, *bench.trusted)
        messages[bench.shown(seen.last_line)] += 1
        refused += seen.code == ERROR
        problems.update(seen.problems(ERROR))
        path.unlink()
        if left := sorted(set(bench.paths()) - before):
            problems.add(f"left {', '.join(left)}")
            shutil.rmtree(out, ignore_errors=True)
    ((words, times),) = messages.most_common(1)
    text = (
        f"{refused} of {len(contents)} refused, messages: {len(messages)}; {times} times: {words}"
    )
    return Row(fault, text, "mixed" if problems else "1", "nothing", sorted(problems))


# --- another hand on the way -----------------------------------------------------------------


def wrong_hands(bench: Bench) -> Iterator[Row]:
    swapped, old = bench.copy(), bench.new("old")
    tiny_bundle.write_gguf(swapped / "model.gguf", seed=1, matrix_type=MATRIX_TYPE)
    yield bench.row("another model.gguf under the old manifest", ERROR, verify(swapped))
    tiny_bundle.seal(swapped)
    yield bench.row("another model.gguf and a new manifest, not signed", FAILED, verify(swapped))
    bench.run("unpack", bench.packed, "-o", old)
    shutil.copy(old / SIGNATURE, swapped)
    yield bench.row(
        "another model.gguf and a new manifest, with the old signature",
        ERROR,
        verify(swapped, *bench.trusted),
    )
    by_other, unsigned = bench.new("other", ".edge"), bench.new("unsigned", ".edge")
    bench.run("pack", bench.bundle, "-o", by_other, "--sign", bench.work / "other.key")
    bench.run("pack", bench.bundle, "-o", unsigned)
    yield bench.row("signed with another key", ERROR, verify(by_other, *bench.trusted))
    yield bench.row(
        "not signed, where a signature is asked for", ERROR, verify(unsigned, *bench.trusted)
    )
    for fault, data in _archives(bench):
        path = bench.new("archive", ".edge")
        path.write_bytes(data)
        yield bench.row(fault, ERROR, ("unpack", path, "-o", bench.new("out")))
    yield bench.row(
        "more than --max-unpacked-bytes allows",
        ERROR,
        ("unpack", unsigned, "-o", bench.new("out"), "--max-unpacked-bytes", "100K"),
    )


def _archives(bench: Bench) -> Iterator[tuple[str, bytes]]:
    member = containers.member
    manifest = (bench.bundle / MANIFEST).read_bytes()
    first = member(MANIFEST, manifest)
    rest = [member(n, (bench.bundle / n).read_bytes()) for n in sorted(tiny_bundle.FILES)]
    zeros = bytes(2**28)

    def another(change: Callable[[dict[str, Any]], object]) -> containers.Member:
        tree = json.loads(manifest)
        change(tree)
        return member(MANIFEST, json.dumps(tree).encode())

    def sized(size: int, **more: Any) -> Callable[[dict[str, Any]], object]:
        return lambda tree: (tree["files"]["model.gguf"].update(size_bytes=size), tree.update(more))

    escapes = "\x1b[31m\n" + "a" * 3000
    for fault, members in (
        ("zip-slip: a member named ../../evil", [first, member("../../evil", b"x"), *rest]),
        ("a member with an absolute path", [first, member("/tmp/edge-dtm-evil", b"x"), *rest]),
        (
            "a member that is a link",
            [first, member("model.gguf", b"", type=b"2", linkname="/etc/passwd"), *rest],
        ),
        ("tar bomb: a manifest of an exabyte", [another(sized(2**60)), *rest]),
        (
            "a manifest with terminal escapes and 3,000 letters",
            [another(sized(1, schema_version=escapes)), *rest],
        ),
        (
            "a manifest with a number of 400 digits",
            [another(lambda tree: tree["thresholds"].update(min_fdt=10**400)), *rest],
        ),
    ):
        yield fault, containers.frame(containers.tar(members))
    bomb = containers.tar([first, member("model.gguf", zeros), *rest])
    yield "tar bomb: 256 MB instead of 1", containers.frame(bomb, 19)
    behind = containers.tar([first, *rest], zeros)
    yield "tar bomb: 256 MB behind the end", containers.frame(behind, 19)


# --- a model that is none, or not this one ---------------------------------------------------


def wrong_models(bench: Bench) -> Iterator[Row]:
    """Each with a manifest made anew, so that only the content speaks."""

    def written(**options: Any) -> Callable[[Path], None]:
        return lambda path: tiny_bundle.write_gguf(path, **{"matrix_type": MATRIX_TYPE, **options})

    for fault, expected, spoil in (
        ("GGUF in big endian", ERROR, _swap_endian),
        ("GGUF version 2", ERROR, lambda p: _patch(p, 4, (2).to_bytes(4, "little"))),
        ("GGUF of another architecture", ERROR, written(architecture="gpt2")),
        ("GGUF cut off", ERROR, lambda p: os.truncate(p, p.stat().st_size - 1000)),
        ("GGUF of 0 bytes", ERROR, lambda p: os.truncate(p, 0)),
        (
            "GGUF whose vocabulary lacks the bytes that the prompts need",
            ERROR,
            written(whole_vocabulary=False),
        ),
        (
            "weights that are not numbers (NaN)",
            ERROR,
            written(matrix_type="F16", nan_in="blk.1.ffn_up"),
        ),
        ("one tensor with doubled scales", FAILED, _double_scales),
        (
            f"a broken kernel, simulated: one {MATRIX_TYPE} tensor labelled {SAME_SIZE_TYPE}",
            FAILED,
            _relabel,
        ),
    ):
        folder = bench.copy()
        spoil(folder / "model.gguf")
        tiny_bundle.seal(folder)
        yield bench.row(fault, expected, verify(folder))


def _patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def _swap_endian(path: Path) -> None:
    """The numbers of the head's beginning, as a big-endian machine writes them."""
    head = bytearray(path.read_bytes()[:24])
    for start, size in ((4, 4), (8, 8), (16, 8)):
        head[start : start + size] = head[start : start + size][::-1]
    _patch(path, 0, bytes(head))


def _double_scales(path: Path) -> None:
    tensor = next(t for t in read_header(path).tensors if t.name == "blk.1.ffn_down.weight")
    blocks = np.memmap(path, np.uint8, "r+", tensor.offset_bytes, (tensor.size_bytes // 18, 18))
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16) * np.float16(2)
    blocks[:, :2] = scales.view(np.uint8)
    blocks.flush()


def _relabel(path: Path) -> None:
    """The same bytes under another type, so that this machine multiplies by other weights."""
    name = b"blk.1.ffn_down.weight"
    # Behind the name: 4 bytes of the number of dimensions, 8 for each of two, then the type.
    at = path.read_bytes().index(name) + len(name) + 4 + 16
    _patch(path, at, int(gguf.GGMLQuantizationType[SAME_SIZE_TYPE]).to_bytes(4, "little"))


# --- pieces that are missing or of another bundle --------------------------------------------


def wrong_pieces(bench: Bench) -> Iterator[Row]:
    yield bench.row("no such file", ERROR, verify(bench.work / "nowhere.edge"))
    for fault, spoil, sealed in (
        ("reference.npz missing", lambda b: (b / "reference.npz").unlink(), False),
        ("manifest.json missing", lambda b: (b / MANIFEST).unlink(), False),
        ("a file that is not listed", lambda b: (b / "extra.bin").write_bytes(b"x"), False),
        ("reference of another tokenizer", _other_texts, True),
        ("host.npz of another reference", _shorter_record, True),
        ("reference.npz with a shape of a gigabyte in 16 MB", _npz_bomb, True),
    ):
        folder = bench.copy()
        spoil(folder)
        if sealed:
            tiny_bundle.seal(folder)
        yield bench.row(fault, ERROR, verify(folder))


def _other_texts(folder: Path) -> None:
    reference = Reference.load(folder / "reference.npz")
    texts = np.array(["other"] * len(reference))
    dataclasses.replace(reference, texts=texts).save(folder / "reference.npz")


def _shorter_record(folder: Path) -> None:
    host = Record.load(folder / "host.npz")
    host.rows(np.arange(len(host) - 1)).save(folder / "host.npz")


def _npz_bomb(folder: Path) -> None:
    members = containers.read_npz((folder / "reference.npz").read_bytes())
    members["top_ids.npy"] = containers.npy(f"({2**28},)", "'<i4'", bytes(2**24))
    (folder / "reference.npz").write_bytes(containers.write_npz(list(members.items())))


# --- a machine without room ------------------------------------------------------------------


def no_room(bench: Bench) -> Iterator[Row]:
    yield _little_memory(bench)
    # Without a file system of its own a limit of file sizes is the nearest thing.
    small = ("bash", "-c", 'ulimit -f "$0" && exec "$@"', "64")
    target, kind = bench.work, "onto files limited to 64 KB (ulimit -f)"
    if _can_mount():
        target, kind = bench.new("disk"), "onto a disk of 64 KB"
        target.mkdir()
        mount = f'mount -t tmpfs -o size=64k none {shlex.quote(str(target))} && exec "$0" "$@"'
        small = ("unshare", "-rm", "sh", "-c", mount)
    closed = bench.new("closed")
    closed.mkdir()
    closed.chmod(0o555)
    tries = [(small, target, kind)]
    # Root may write anywhere, unless it gives that up.
    if os.geteuid():
        tries.append(((), closed, "into a folder without the right to write"))
    elif shutil.which("setpriv"):
        drop = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")
        tries.append((drop, closed, "into a folder without the right to write"))
    for before, folder, words in tries:
        for command, source in (("pack", bench.bundle), ("unpack", bench.packed)):
            target = folder / ("full.edge" if command == "pack" else "full")
            yield bench.row(
                f"{command} {words}", ERROR, (command, source, "-o", target), before=before
            )


def _little_memory(bench: Bench) -> Row:
    """Limits from what the program itself takes to where it passes in peace."""
    loaded = (
        "import edge_dtm.device.verify, edge_dtm.report.verdict_table; "
        "print(open('/proc/self/statm').read().split()[0])"
    )
    pages = subprocess.check_output([sys.executable, "-c", loaded], env=bench.environment())
    start = int(pages) * os.sysconf("SC_PAGE_SIZE") // 10**6 + 20
    limits = range(start, start + MEMORY_STEPS * MEMORY_STEP_MB, MEMORY_STEP_MB)
    old = set(bench.paths())
    messages: Counter[str] = Counter()
    problems: list[str] = []
    for limit_mb in limits:
        limited = ("bash", "-c", 'ulimit -v "$0" && exec "$@"', str(limit_mb * 1000))
        seen = bench.run(*verify(bench.bundle), before=limited)
        expected = PASSED if seen.code == PASSED else ERROR
        problems += [f"at {limit_mb} MB: {p}" for p in seen.problems(expected)]
        if seen.code:
            messages[bench.shown(seen.last_line)] += 1
    if not messages:
        problems.append("no limit was too low")
    if left := sorted(set(bench.paths()) ^ old):
        problems.append(f"left {', '.join(left)}")
    words = next((text for text, _ in messages.most_common(1)), "")
    refused = messages.total()
    text = f"{refused} refused, {len(limits) - refused} passed; mostly: {words}"
    fault = f"memory limited (ulimit -v), {len(limits)} limits about what is needed"
    return Row(fault, text, "1 or 0", "nothing", problems)


def _can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- killed ----------------------------------------------------------------------------------


def killed(bench: Bench) -> Iterator[Row]:
    packed, folder = bench.new("killed", ".edge"), bench.new("killed")
    for name, arguments, target, watched, inside in (
        ("pack", ("pack", bench.bundle, "-o", packed), packed, bench.work, ""),
        ("unpack", ("unpack", bench.packed, "-o", folder), folder, bench.work, ""),
        ("verify, at its beginning", verify(bench.packed), None, bench.scratch, ""),
        ("verify, at work", verify(bench.packed), None, bench.scratch, "probe.gguf"),
    ):
        yield _killed(bench, f"kill -9 in {name}", arguments, target, (watched, inside))


def _killed(
    bench: Bench, fault: str, arguments: Arguments, target: Path | None, moment: tuple[Path, str]
) -> Row:
    """Kill the command at a moment, then run it again.

    target: what it makes. moment: a folder, and what has to be there inside something new in it.
    """
    watched, inside = moment
    old = set(bench.paths())
    there = set(os.listdir(watched))
    for attempt in range(KILL_ATTEMPTS):
        process = subprocess.Popen(
            bench.command(*arguments),
            env=bench.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not any(
            (watched / name / inside).exists() for name in set(os.listdir(watched)) - there
        ):
            time.sleep(0.0005)
        # Each time somewhat later, so that some attempt meets the middle of the work.
        time.sleep(0.001 * attempt)
        process.kill()
        process.wait()
        left = set(bench.paths()) - old
        if left and (target is None or not target.exists()):
            break
        _remove(target)
    else:
        return Row(fault, "", "", "", ["no attempt met it at work"])
    again = bench.run(*arguments)
    problems = again.problems(PASSED)
    if target is not None and not target.exists():
        problems.append("the second run made nothing")
    _remove(target)
    if still := sorted(set(bench.paths()) - old):
        problems.append(f"left {', '.join(still)}")
    return Row(
        f"{fault}; then the same command again",
        bench.shown(again.last_line),
        f"-9, then {again.code}",
        "nothing; the second run removed what the first had left",
        problems,
    )


def _remove(target: Path | None) -> None:
    if target is not None and target.is_dir():
        shutil.rmtree(target)
    elif target is not None:
        target.unlink(missing_ok=True)


def try_all(work: Path, flips: int, cuts: int) -> Iterator[Row]:
    """The rows one by one, as they are tried; work: an empty folder."""
    bench = Bench(work)
    yield bench.row("none", PASSED, verify(bench.packed))
    yield from spoilt_bytes(bench, flips, cuts)
    for part in (wrong_hands, wrong_models, wrong_pieces, no_room, killed):
        yield from part(bench)


def markdown(row: Row) -> str:
    seen = row.seen.replace("|", "\\|").replace("`", "'")
    return f"| {row.fault} | `{seen}` | {row.code} | {row.lost} |"


HEAD = ("| fault | what the user sees last | exit code | what was lost |", "|---|---|---|---|")
PAGE = """# Faults, and what a user sees

Each fault was tried with the real command line on a bundle of a tiny random model. `nothing` in the
last column means that no file was changed, left behind or lost. Exit codes: 0 pass, 1 error, 3
verified and failed. Before a FAIL stands a line with the diagnosis. To try them all again:

```sh
python tools/break_it table --out docs/faults.md
```

{table}

`python tools/break_it fuzz` tries many files damaged at random. Each is accepted, or refused with
one printable line, within limits of time, memory and disk.
"""


def run(flips: int, cuts: int, out: Path | None) -> int:
    """Try all faults, print the table, and write the page to out. Returns the exit status."""
    rows = []
    print("\n".join(HEAD), flush=True)
    with tempfile.TemporaryDirectory(prefix="edge-dtm-faults-") as work:
        for row in try_all(Path(work), max(flips, 1), max(cuts, 3)):
            rows.append(row)
            print(markdown(row), flush=True)
            for problem in row.problems:
                print(f"not as expected: {row.fault}: {problem}", file=sys.stderr, flush=True)
    bad = sum(bool(row.problems) for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} as expected", file=sys.stderr)
    if out is not None:
        table = "\n".join([*HEAD, *map(markdown, rows)])
        out.write_text(PAGE.format(table=table), encoding="utf-8")
    return int(bad > 0)
