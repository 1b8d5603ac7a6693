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
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
MEMORY_STEPS, MEMORY_STEP_MB = 16, 10


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
            said = " / ".join(line for line in self.stderr if line.strip())
            out.append(f"{errors} error lines in {said[-SHOWN:]!r}")
        if expected == FAILED:
            if not self.stdout or not self.stdout[-1].startswith("FAIL "):
                out.append("no FAIL line at the end")
            elif len(self.stdout) < 2 or not self.stdout[-2].strip():
                out.append("no diagnosis")
        return out


@dataclass
class Row:
    """One line of the table. problems: expectations not met."""

    fault: str
    seen: str
    code: str
    lost: str
    problems: list[str] = field(default_factory=list)


class Bench:
    """The folder that all faults are tried in, with what they start from.

    bundle: a folder that passes; packed: it as one file, signed; trusted: the keys folder.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.bundle = tiny_bundle.make_bundle(work / "good", MATRIX_TYPE)
        self.scratch = work / "tmp"
        self.scratch.mkdir()
        self.trusted = work / "trusted"
        self.trusted.mkdir()
        for name in ("mine", "other"):
            self.edge_dtm("keygen", work / name)
        shutil.copy(work / "mine.pub", self.trusted)
        self.packed = work / "good.edge"
        self.edge_dtm("pack", self.bundle, "-o", self.packed, "--sign", work / "mine.key")
        self._count = 0

    def command(self, *arguments: str | Path) -> list[str]:
        """What the installed edge-dtm runs, from this checkout."""
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        module, function = scripts["edge-dtm"].split(":")
        start = f"from {module} import {function} as run; run()"
        return [sys.executable, "-c", start, *map(str, arguments)]

    def environment(self) -> dict[str, str]:
        """With the width of a usual terminal, and temporary files where they are looked for."""
        return {
            **os.environ,
            "COLUMNS": "100",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.scratch),
            "OMP_NUM_THREADS": "1",
        }

    def edge_dtm(self, *arguments: str | Path, before: Sequence[str] = ()) -> Seen:
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

    def verify(self, bundle: Path, *options: str | Path) -> Seen:
        return self.edge_dtm("verify", bundle, "--threads", "1", *options)

    def copy(self) -> Path:
        """A bundle folder to spoil."""
        self._count += 1
        return Path(shutil.copytree(self.bundle, self.work / f"copy-{self._count}"))

    def new(self, suffix: str = "") -> Path:
        """A path where nothing is."""
        self._count += 1
        return self.work / f"new-{self._count}{suffix}"

    def files(self) -> dict[str, int]:
        """Every path below the work folder -> when it was changed."""
        return {
            str(p.relative_to(self.work)): p.lstat().st_mtime_ns
            for p in sorted(self.work.rglob("*"))
            if not p.is_dir()
        } | {str(p.relative_to(self.work)) + "/": 0 for p in self.work.rglob("*") if p.is_dir()}

    def row(self, fault: str, expected: int, run: Callable[[], Seen]) -> Row:
        """Run it; lost: what is there or gone that should not be, which is a problem too."""
        before = self.files()
        seen = run()
        after = self.files()
        changed = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
        problems = seen.problems(expected)
        if changed:
            problems.append(f"changed {', '.join(changed)}")
        return Row(
            fault,
            self.shown(seen.last_line),
            str(seen.code),
            ", ".join(changed) or "nothing",
            problems,
        )

    def shown(self, line: str) -> str:
        line = line.replace(f"{self.work}/", "").replace(str(self.work), ".")
        return line if len(line) <= SHOWN else line[: SHOWN - 4] + " ..."


# --- damage on the way -----------------------------------------------------------------------


def spoilt_bytes(bench: Bench, flips: int, cuts: int) -> Iterator[Row]:
    data = bench.packed.read_bytes()
    source = random.Random(0)
    places = [(source.randrange(len(data)), source.randrange(1, 256)) for _ in range(flips)]
    changed = []
    for at, flip in places:
        spoilt = bytearray(data)
        spoilt[at] ^= flip
        changed.append(bytes(spoilt))
    yield _many(bench, f"flipped byte in a packed file, at {flips} places", changed)
    lengths = [0, 1, len(data) - 1, *(source.randrange(len(data)) for _ in range(max(cuts - 3, 0)))]
    yield _many(
        bench, f"packed file cut off, at {len(lengths)} places", [data[:n] for n in lengths]
    )


def _many(bench: Bench, fault: str, contents: Sequence[bytes]) -> Row:
    path, out = bench.new(".edge"), bench.new()
    messages: Counter[str] = Counter()
    problems: list[str] = []
    before = bench.files()
    for data in contents:
        path.write_bytes(data)
        seen = bench.edge_dtm("unpack", path, "-o", out, "--trusted-keys", bench.trusted)
        messages[bench.shown(seen.last_line)] += 1
        problems += seen.problems(ERROR)
        path.unlink()
        if left := sorted({*bench.files()} - {*before}):
            problems.append(f"left {', '.join(left)}")
            shutil.rmtree(out, ignore_errors=True)
    (words, times), *_ = messages.most_common(1)
    refused = len(contents) - sum(p.startswith("exit code") for p in problems)
    text = (
        f"{refused} of {len(contents)} refused, messages: {len(messages)}; {times} times: {words}"
    )
    return Row(fault, text, "1" if not problems else "mixed", "nothing", sorted(set(problems)))


# --- another hand on the way -----------------------------------------------------------------


def wrong_hands(bench: Bench) -> Iterator[Row]:
    trusted = ("--trusted-keys", bench.trusted)
    swapped = bench.copy()
    tiny_bundle.write_gguf(swapped / "model.gguf", seed=1, matrix_type=MATRIX_TYPE)
    yield bench.row(
        "another model.gguf under the old manifest", ERROR, lambda: bench.verify(swapped)
    )
    signature = swapped / SIGNATURE
    bench.edge_dtm("unpack", bench.packed, "-o", out := bench.new())
    tiny_bundle.seal(swapped)
    yield bench.row(
        "another model.gguf and a new manifest, not signed", FAILED, lambda: bench.verify(swapped)
    )
    shutil.copy(out / SIGNATURE, signature)
    yield bench.row(
        "another model.gguf and a new manifest, with the old signature",
        ERROR,
        lambda: bench.verify(swapped, *trusted),
    )
    by_other, unsigned = bench.new(".edge"), bench.new(".edge")
    bench.edge_dtm("pack", bench.bundle, "-o", by_other, "--sign", bench.work / "other.key")
    bench.edge_dtm("pack", bench.bundle, "-o", unsigned)
    yield bench.row("signed with another key", ERROR, lambda: bench.verify(by_other, *trusted))
    yield bench.row(
        "not signed, where a signature is asked for",
        ERROR,
        lambda: bench.verify(unsigned, *trusted),
    )
    for fault, data in _archives(bench):
        path = bench.new(".edge")
        path.write_bytes(data)
        target = bench.new()
        yield bench.row(fault, ERROR, lambda p=path, t=target: bench.edge_dtm("unpack", p, "-o", t))  # type: ignore[misc]
    limited = bench.new()
    yield bench.row(
        "more than --max-unpacked-bytes allows",
        ERROR,
        lambda: bench.edge_dtm("unpack", unsigned, "-o", limited, "--max-unpacked-bytes", "100K"),
    )


def _archives(bench: Bench) -> Iterator[tuple[str, bytes]]:
    members = [containers.member(MANIFEST, (bench.bundle / MANIFEST).read_bytes())]
    members += [
        containers.member(n, (bench.bundle / n).read_bytes()) for n in sorted(tiny_bundle.FILES)
    ]
    first, *rest = members
    evil = containers.member("../../evil", b"x")
    yield (
        "zip-slip: a member named ../../evil",
        containers.frame(containers.tar([first, evil, *rest])),
    )
    absolute = containers.member("/tmp/edge-dtm-evil", b"x")
    yield (
        "a member with an absolute path",
        containers.frame(containers.tar([first, absolute, *rest])),
    )
    link = containers.member("model.gguf", b"", type=b"2", linkname="/etc/passwd")
    yield "a member that is a link", containers.frame(containers.tar([first, link, *rest]))
    zeros = bytes(2**28)
    yield "tar bomb: 256 MB behind the end", containers.frame(containers.tar(members, zeros), 19)
    bomb = containers.member("model.gguf", zeros)
    yield (
        "tar bomb: 256 MB instead of 1",
        containers.frame(containers.tar([first, bomb, *rest]), 19),
    )
    tree = json.loads(first[1])
    tree["files"]["model.gguf"]["size_bytes"] = 2**60
    claim = containers.member(MANIFEST, json.dumps(tree).encode())
    yield "tar bomb: a manifest of an exabyte", containers.frame(containers.tar([claim, *rest]))
    tree["files"]["model.gguf"]["size_bytes"] = 1
    tree["schema_version"] = "\x1b[31m\n" + "a" * 3000
    escape = containers.member(MANIFEST, json.dumps(tree).encode())
    yield (
        "a manifest with terminal escapes and 3,000 letters",
        containers.frame(containers.tar([escape, *rest])),
    )
    tree = json.loads(first[1])
    tree["thresholds"]["min_fdt"] = 10**400
    huge = containers.member(MANIFEST, json.dumps(tree).encode())
    yield "a manifest with a number of 400 digits", containers.frame(containers.tar([huge, *rest]))


# --- a model that is none, or not this one ---------------------------------------------------


def wrong_models(bench: Bench) -> Iterator[Row]:
    """Each with a manifest made anew, so that only the content speaks."""

    def resealed(fault: str, expected: int, spoil: Callable[[Path], None]) -> Row:
        folder = bench.copy()
        spoil(folder / "model.gguf")
        tiny_bundle.seal(folder)
        return bench.row(fault, expected, lambda: bench.verify(folder))

    yield resealed("GGUF in big endian", ERROR, _swap_endian)
    yield resealed("GGUF version 2", ERROR, lambda p: _patch(p, 4, (2).to_bytes(4, "little")))
    yield resealed(
        "GGUF of another architecture",
        ERROR,
        lambda p: tiny_bundle.write_gguf(p, matrix_type=MATRIX_TYPE, architecture="gpt2"),
    )
    yield resealed("GGUF cut off", ERROR, lambda p: os.truncate(p, p.stat().st_size - 1000))
    yield resealed("GGUF of 0 bytes", ERROR, lambda p: os.truncate(p, 0))
    yield resealed(
        "GGUF whose vocabulary lacks the bytes that the prompts need",
        ERROR,
        lambda p: tiny_bundle.write_gguf(p, matrix_type=MATRIX_TYPE, whole_vocabulary=False),
    )
    yield resealed(
        "weights that are not numbers (NaN)",
        ERROR,
        lambda p: tiny_bundle.write_gguf(p, matrix_type="F16", nan_in="blk.1.ffn_up"),
    )
    yield resealed("one tensor with doubled scales", FAILED, _double_scales)
    yield resealed(
        f"a broken kernel, simulated: one {MATRIX_TYPE} tensor labelled {SAME_SIZE_TYPE}",
        FAILED,
        _relabel,
    )


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
    yield bench.row("no such file", ERROR, lambda: bench.verify(bench.work / "nowhere.edge"))
    missing = bench.copy()
    (missing / "reference.npz").unlink()
    yield bench.row("reference.npz missing", ERROR, lambda: bench.verify(missing))
    bare = bench.copy()
    (bare / MANIFEST).unlink()
    yield bench.row("manifest.json missing", ERROR, lambda: bench.verify(bare))
    added = bench.copy()
    (added / "extra.bin").write_bytes(b"x")
    yield bench.row("a file that is not listed", ERROR, lambda: bench.verify(added))

    words = bench.copy()
    reference = Reference.load(words / "reference.npz")
    dataclasses.replace(reference, texts=np.array(["other"] * len(reference))).save(
        words / "reference.npz"
    )
    tiny_bundle.seal(words)
    yield bench.row("reference of another tokenizer", ERROR, lambda: bench.verify(words))

    short = bench.copy()
    host = Record.load(short / "host.npz")
    host.rows(np.arange(len(host) - 1)).save(short / "host.npz")
    tiny_bundle.seal(short)
    yield bench.row("host.npz of another reference", ERROR, lambda: bench.verify(short))

    bomb = bench.copy()
    members = containers.read_npz((bomb / "reference.npz").read_bytes())
    members["top_ids.npy"] = containers.npy(f"({2**28},)", "'<i4'", bytes(2**24))
    (bomb / "reference.npz").write_bytes(containers.write_npz(list(members.items())))
    tiny_bundle.seal(bomb)
    yield bench.row(
        "reference.npz with a shape of a gigabyte in 16 MB", ERROR, lambda: bench.verify(bomb)
    )


# --- a machine without room ------------------------------------------------------------------


def no_room(bench: Bench) -> Iterator[Row]:
    yield _little_memory(bench)
    # Without a file system of its own a limit of file sizes is the nearest thing.
    small = ("bash", "-c", 'ulimit -f "$0" && exec "$@"', "64")
    if _can_mount():
        target = bench.new()
        target.mkdir()
        mount = f'mount -t tmpfs -o size=64k none {shlex.quote(str(target))} && exec "$0" "$@"'
        small = ("unshare", "-rm", "sh", "-c", mount)
        kind = "a disk of 64 KB"
    else:
        target = bench.work
        kind = "files limited to 64 KB (ulimit -f)"
    for command, source, name in (
        ("pack", bench.bundle, "full.edge"), ("unpack", bench.packed, "full")
    ):  # fmt: skip
        yield bench.row(
            f"{command} onto {kind}",
            ERROR,
            lambda c=command, s=source, n=name: bench.edge_dtm(  # type: ignore[misc]
                c, s, "-o", target / n, before=small
            ),
        )
    closed = bench.new()
    closed.mkdir()
    closed.chmod(0o555)
    # Root may write anywhere, unless it gives that up.
    drop = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")
    before = drop if os.geteuid() == 0 and shutil.which("setpriv") else ()
    if os.geteuid() or before:
        for command, source, name in (
            ("pack", bench.bundle, "closed.edge"), ("unpack", bench.packed, "closed")
        ):  # fmt: skip
            yield bench.row(
                f"{command} into a folder without the right to write",
                ERROR,
                lambda c=command, s=source, n=name: bench.edge_dtm(  # type: ignore[misc]
                    c, s, "-o", closed / n, before=before
                ),
            )


def _little_memory(bench: Bench) -> Row:
    """Limits from what the program itself takes to where it passes in peace."""
    loaded = (
        "import edge_dtm.device.verify, edge_dtm.report.verdict_table; "
        "print(open('/proc/self/statm').read().split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", loaded],
        env=bench.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    start = int(done.stdout) * os.sysconf("SC_PAGE_SIZE") // 10**6 + 20
    limits = range(start, start + MEMORY_STEPS * MEMORY_STEP_MB, MEMORY_STEP_MB)
    before = bench.files()
    messages: Counter[str] = Counter()
    problems: list[str] = []
    for limit_mb in limits:
        words = ("bash", "-c", 'ulimit -v "$0" && exec "$@"', str(limit_mb * 1000))
        seen = bench.edge_dtm("verify", bench.bundle, "--threads", "1", before=words)
        expected = PASSED if seen.code == PASSED else ERROR
        problems += [f"at {limit_mb} MB: {p}" for p in seen.problems(expected)]
        if seen.code:
            messages[bench.shown(seen.last_line)] += 1
    if not messages:
        problems.append("no limit was too low")
    if left := sorted(set(bench.files()) ^ set(before)):
        problems.append(f"left {', '.join(left)}")
    (words_seen, _), *_ = messages.most_common(1) or [("", 0)]
    refused = sum(messages.values())
    text = f"{refused} refused, {len(limits) - refused} passed; mostly: {words_seen}"
    fault = f"memory limited (ulimit -v), {len(limits)} limits about what is needed"
    return Row(fault, text, "1 or 0", "nothing", problems)


def _can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- killed ----------------------------------------------------------------------------------


def killed(bench: Bench) -> Iterator[Row]:
    packed, folder = bench.new(".edge"), bench.new()
    verify = ("verify", bench.packed, "--threads", "1")

    def anything(name: str) -> bool:
        return True

    def probe(name: str) -> bool:
        return (bench.scratch / name / "probe.gguf").exists()

    yield _killed(bench, "pack", ("pack", bench.bundle, "-o", packed), bench.work, anything)
    yield _killed(bench, "unpack", ("unpack", bench.packed, "-o", folder), bench.work, anything)
    yield _killed(bench, "verify, at its beginning", verify, bench.scratch, anything)
    yield _killed(bench, "verify, at work", verify, bench.scratch, probe)


def _killed(
    bench: Bench,
    name: str,
    arguments: tuple[str | Path, ...],
    watched: Path,
    met: Callable[[str], bool],
) -> Row:
    """Kill the command once something new in watched is met, then run it again."""
    target = Path(arguments[3]) if arguments[2] == "-o" else None
    before = set(bench.files())
    there = set(os.listdir(watched))
    for attempt in range(KILL_ATTEMPTS):
        process = subprocess.Popen(
            bench.command(*arguments),
            env=bench.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not any(map(met, set(os.listdir(watched)) - there)):
            time.sleep(0.0005)
        # Each time somewhat later, so that some attempt meets the middle of the work.
        time.sleep(0.001 * attempt)
        process.kill()
        process.wait()
        left = sorted(set(bench.files()) - before)
        if left and (target is None or not os.path.lexists(target)):
            break
        _remove(target)
    else:
        return Row(f"kill -9 in {name}", "", "", "", ["no attempt met it at work"])
    again = bench.edge_dtm(*arguments)
    problems = again.problems(PASSED)
    if target is not None and not os.path.lexists(target):
        problems.append("the second run made nothing")
    _remove(target)
    if still := sorted(set(bench.files()) - before):
        problems.append(f"left {', '.join(still)}")
    return Row(
        f"kill -9 in {name}; then the same command again",
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
    yield bench.row("none", PASSED, lambda: bench.verify(bench.packed))
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
