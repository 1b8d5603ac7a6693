"""Hostile files against everything that a device reads from an artifact.

Valid small files are spoilt (bits, cuts, splices, integers at their limits, trees of JSON, heads of
arrays, members of archives, bombs) and read by the code that reads the real ones. Each has to be
accepted or refused with one printable line, within a time, an amount of memory and of disk, and
leave nothing behind. Whatever else happens is a finding: it is printed, the input is written to
--out, and the exit status is 1. The same seed gives the same inputs.

The inputs of a target run in a child process with limits, which is started again behind an input
that kills it.

    python tools/fuzz.py --inputs 100000 --seed 0
    python tools/fuzz.py --replay findings/manifest-123.bin
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

# The script also runs from a checkout where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import mutations as m
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fixtures import tiny_bundle

from edge_dtm.commands.common import read_json
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.metrics import compare
from edge_dtm.formats import archive, bundle, signing
from edge_dtm.formats.plan import Plan
from edge_dtm.formats.profile import load_profile, profiles_dir
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import HELD_OUT, Reference
from edge_dtm.formats.verdict_file import device_name, read_verdict
from edge_dtm.llamacpp import memory
from edge_dtm.llamacpp.gguf_header import check_gguf
from edge_dtm.llamacpp.schedule import calls, context_needed, replay_tokens
from edge_dtm.llamacpp.tensors import describe
from edge_dtm.search.budget import byte_budget

CPU_LIMIT_S, WALL_LIMIT_S = 5, 180  # the second for what waits and does not compute
MEMORY_LIMIT_BYTES = 384 * 2**20  # above what the process has before
DISK_LIMIT_BYTES = 128 * 2**20
MESSAGE_LIMIT = 1000  # characters; one line of a terminal is 100
EXAMPLES = 2  # inputs that are written of each kind of finding
ACCEPTED, REFUSED = "accepted", "refused"
BOMB_BYTES = 64 * 2**20  # above what the few kilobytes of any other input unfold to
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TRUSTED = {signing.key_id(KEY.public_key()): KEY.public_key()}


@dataclass(frozen=True)
class Target:
    """One kind of file.

    make: an input for a random.Random. read: what the device does with it, in an empty folder,
    which it has to leave empty but for the input's own file "input"; it raises EdgeDtmError or
    returns. share: of all inputs.
    """

    name: str
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes, Path], object]
    share: float


@dataclass
class Result:
    """Counts of one target; slowest_ms: CPU time. findings: (index, what happened, in detail)."""

    name: str
    accepted: int = 0
    refused: int = 0
    slowest_ms: float = 0.0
    findings: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused + len(self.findings)


# --- what is read --------------------------------------------------------------------------


def _written(data: bytes, folder: Path) -> Path:
    path = folder / "input"
    path.write_bytes(data)
    return path


def read_manifest(data: bytes, folder: Path) -> None:
    found = bundle.Manifest.parse(data, "manifest.json")
    json.dumps(found.to_json())
    assert bundle.Bundle(folder, folder, found).size_bytes >= 0


def read_signature(data: bytes, folder: Path, manifest: bytes) -> None:
    signing.check_signature(manifest, data, None, "a.edge")
    signing.check_signature(manifest, data, TRUSTED, "a.edge")


def read_folder(data: bytes, folder: Path, files: Path) -> None:
    """Manifest and signature, one behind the other, in a folder with files."""
    (size,) = struct.unpack("<I", data[:4].ljust(4, b"\0"))
    made = folder / "made"
    made.mkdir()
    for name in tiny_bundle.FILES:
        os.link(files / name, made / name)
    (made / bundle.MANIFEST).write_bytes(data[4 : 4 + size])
    (made / bundle.SIGNATURE).write_bytes(data[4 + size :])
    try:
        with archive.open_bundle(made, trusted=TRUSTED) as opened:
            opened.check()
    finally:
        shutil.rmtree(made)


def read_archive(data: bytes, folder: Path) -> None:
    path = _written(data, folder)
    archive.unpack(path, folder / "out", max_unpacked_bytes=DISK_LIMIT_BYTES // 2)
    try:
        archive.open_bundle(folder / "out").check()
    finally:
        shutil.rmtree(folder / "out")
    with archive.open_bundle(path) as opened:
        opened.check()


def read_reference(data: bytes, folder: Path) -> None:
    found = Reference.load(_written(data, folder))
    use_reference(found)
    use_reference(found.part(HELD_OUT))


def use_reference(found: Reference) -> None:
    """What is done with a reference before a model sees it."""
    context_needed(found)
    replay_tokens(found)
    [len(str(text).encode("utf-8", "replace")) for text in found.texts]
    [found.generated(row) for row in range(len(found))]
    list(calls(found, 64, 4))
    if len(found):
        compare(
            found.generated_ids, found.top_ids[:, :, 1], found.generated_lengths, found.margins, 0.1
        )


def read_record(data: bytes, folder: Path) -> None:
    found = Record.load(_written(data, folder))
    RunSettings.from_json(found.settings)
    found.rows(np.arange(len(found))).save(folder / "again")
    (folder / "again").unlink()
    counted = np.arange(found.ids.shape[1])[None, :] < found.lengths[:, None]
    found.top_ids[counted].tolist()
    (found.top_logits[:, :, 0] - found.top_logits[:, :, 1]).tolist()


def read_plan(data: bytes, folder: Path) -> None:
    plan = Plan.from_json(read_json(_written(data, folder)))
    assert plan.size_bytes >= 0 and plan.hash and plan.zero_share >= 0
    plan.type_counts()


def read_profile(data: bytes, folder: Path) -> None:
    path = folder / "input.toml"
    path.write_bytes(data)
    try:
        profile = load_profile(str(path))
        byte_budget(
            profile, kv_bytes_per_token=1000, compute_buffer_bytes=1000, f16_file_bytes=10**8
        )
    finally:
        path.unlink()


def read_gguf(data: bytes, folder: Path) -> None:
    check_gguf(_written(data, folder))


def read_gguf_again(data: bytes, folder: Path) -> None:
    """What else reads the head of a file that check_gguf let through: verify and inspect."""
    path = _written(data, folder)
    check_gguf(path)
    memory.need(path, tiny_bundle.SETTINGS, 64)
    describe(path)


def read_verdict_file(data: bytes, folder: Path) -> None:
    device_name(read_verdict(_written(data, folder)))


# --- what is written -----------------------------------------------------------------------


def _spoilt(
    seeds: Sequence[bytes],
    structured: Callable[[random.Random, bytes], bytes],
    source: random.Random,
) -> bytes:
    """Of a seed: its structure in six of ten, its bytes in three, noise in one."""
    kind, data = source.random(), source.choice(seeds)
    if kind < 0.6:
        return structured(source, data)
    if kind < 0.9:
        return m.mutate_bytes(source, data, seeds)
    return m.random_bytes(source, data[:8])


def _gguf_fields(source: random.Random, data: bytes) -> bytes:
    """A number of the head, at its limit; the head is nearly all that the file is."""
    out = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2))):
        width = source.choice((4, 4, 8))
        at = source.randrange(8, 2200)
        number = source.choice(m.INTEGERS) % 2 ** (8 * width)
        out[at : at + width] = number.to_bytes(width, "little")
    return bytes(out)


def _npz(source: random.Random, data: bytes) -> bytes:
    return m.mutate_npz(source, m.read_npz(data))


def _rarely(
    odd: Callable[[], Sequence[bytes]],
    share: float,
    make: Callable[[random.Random], bytes],
    s: random.Random,
) -> bytes:
    """One of the costly inputs now and then, spoilt half of the time."""
    if s.random() >= share:
        return make(s)
    data = s.choice(odd())
    return m.mutate_bytes(s, data) if s.random() < 0.5 else data


@cache
def _npz_bombs(data: bytes) -> list[bytes]:
    """Much from little: honest about its size, silent about it, and with a long list of names."""
    members = m.read_npz(data)
    zeros = bytes(BOMB_BYTES)
    honest = members | {"top_ids.npy": m.npy(f"({BOMB_BYTES // 4},)", "'<i4'", zeros)}
    silent = members | {"top_ids.npy": m.npy("(2, 4, 8)", "'<i4'", zeros)}
    bombs = [m.write_npz(list(b.items())) for b in (honest, silent)]
    # The size in the table of contents says less than there is.
    told = struct.pack("<I", len(m.npy("(2, 4, 8)", "'<i4'", zeros)))
    bombs += [bombs[1].replace(told, struct.pack("<I", n)) for n in (384, 2**32 - 1)]
    names = [(f"{i}.npy", b"") for i in range(3000)]
    return [*bombs, m.write_npz([*members.items(), *names])]


def targets(work: Path) -> list[Target]:
    """All targets; their valid seeds are made in work."""
    folder = work / "seed"
    folder.mkdir()
    reference, record = tiny_bundle.made_up()
    small = tiny_bundle.made_up(1)[0].rows(np.array([0]))
    contents: dict[str, bytes] = {}
    for name, save in (
        ("reference.npz", reference.save),
        ("one.npz", small.save),
        ("host.npz", record.save),
        ("model.gguf", _small_gguf),
        ("other.gguf", partial(_small_gguf, type_name="F16")),
    ):
        save(folder / name)
        contents[name] = (folder / name).read_bytes()
        if name.startswith(("one", "other")):
            (folder / name).unlink()
    contents["probe.npz"] = contents["host.npz"]
    plan = json.dumps(tiny_bundle.plan().to_json()).encode()
    for name, data in (
        ("probe.npz", contents["host.npz"]), ("plan.json", plan), ("report.md", b"# Tiny\n")
    ):  # fmt: skip
        (folder / name).write_bytes(data)
    tiny_bundle.seal(folder)
    manifest = (folder / bundle.MANIFEST).read_bytes()
    signature = signing.sign_manifest(manifest, KEY)
    members = [m.member(bundle.MANIFEST, manifest)]
    members += [m.member(n, (folder / n).read_bytes()) for n in sorted(tiny_bundle.FILES)]
    signed = [members[0], m.member(bundle.SIGNATURE, signature), *members[1:]]
    packed = [m.frame(m.tar(members)), m.frame(m.tar(signed), 10)]

    @cache
    def bombs() -> list[bytes]:
        zeros = bytes(BOMB_BYTES)
        bomb = m.member("model.gguf", zeros)
        tree = json.loads(manifest)
        tree["files"]["model.gguf"]["size_bytes"] = BOMB_BYTES
        claimed = m.member(bundle.MANIFEST, json.dumps(tree).encode())
        tars = (m.tar([members[0], bomb]), m.tar(members, zeros), m.tar([claimed, bomb]), zeros)
        return [m.frame(data) for data in tars]

    verdict = json.dumps(tiny_bundle.verdict().to_json()).encode()
    profile = (profiles_dir() / "raspberrypi.toml").read_bytes()
    ggufs = [contents["model.gguf"], contents["other.gguf"]]
    references = [contents["reference.npz"], contents["one.npz"]]

    def npz(seeds: Sequence[bytes]) -> Callable[[random.Random], bytes]:
        return partial(_rarely, partial(_npz_bombs, seeds[0]), 0.002, partial(_spoilt, seeds, _npz))

    def both(source: random.Random) -> bytes:
        """A manifest and its signature, by the trusted key when it is the manifest that is bad."""
        if source.random() < 0.5:
            first = m.mutate_json(source, manifest)
            second = signing.sign_manifest(first, KEY)
        else:
            first, second = manifest, m.mutate_bytes(source, signature)
        return struct.pack("<I", len(first)) + first + second

    def archived(source: random.Random) -> bytes:
        kind = source.random()
        if kind < 0.3:
            return _spoilt(packed, lambda s, d: m.mutate_bytes(s, d, packed), source)
        chosen = source.choice((members, signed))
        if kind < 0.4:
            return m.seal_frame(m.mutate_bytes(source, source.choice(packed)[:-40], packed))
        if kind < 0.6:
            return m.frame(m.mutate_bytes(source, m.tar(chosen)))
        changed = m.mutate_members(source, chosen, lambda data: m.mutate_json(source, data))
        return m.frame(m.tar(changed))

    return [
        Target("manifest.json", partial(_spoilt, [manifest], m.mutate_json), read_manifest, 22),
        Target(
            "manifest.sig",
            partial(_spoilt, [signature], m.mutate_json),
            partial(read_signature, manifest=manifest),
            12,
        ),
        Target("bundle folder", both, partial(read_folder, files=folder), 6),
        Target("packed archive", partial(_rarely, bombs, 0.002, archived), read_archive, 12),
        Target("reference.npz", npz(references), read_reference, 10),
        Target("host.npz", npz([contents["host.npz"], contents["reference.npz"]]), read_record, 8),
        Target("plan.json", partial(_spoilt, [plan], m.mutate_json), read_plan, 8),
        Target("profile.toml", partial(_spoilt, [profile], m.mutate_toml), read_profile, 8),
        Target("model.gguf, checked", partial(_spoilt, ggufs, _gguf_fields), read_gguf, 10),
        Target("model.gguf, used", partial(_spoilt, ggufs, _gguf_fields), read_gguf_again, 4),
        Target("verdict.json", partial(_spoilt, [verdict], m.mutate_json), read_verdict_file, 8),
    ]


def _small_gguf(path: Path, type_name: str = "Q4_0") -> None:
    tiny_bundle.write_gguf(
        path, hidden=32, layers=1, ffn=32, matrix_type=type_name, whole_vocabulary=False
    )


# --- how it runs ---------------------------------------------------------------------------


def input_bytes(target: Target, seed: int, index: int) -> bytes:
    return target.make(random.Random(f"{seed}/{target.name}/{index}"))


def outcome(target: Target, data: bytes, folder: Path) -> tuple[str, str]:
    """("accepted" or "refused" or what happened instead, details)."""
    try:
        target.read(data, folder)
        result = (ACCEPTED, "")
    except EdgeDtmError as error:
        result = (REFUSED, str(error))
        if not result[1].isprintable():
            result = ("a message that is not one printable line", ascii(result[1][:300]))
        elif len(result[1]) > MESSAGE_LIMIT:
            result = (f"a message above {MESSAGE_LIMIT} characters", ascii(result[1][:300]))
    except Exception as error:
        result = (f"{type(error).__name__} in {_place(error)}", ascii(str(error)[:300]))
    left = sorted(p.name for p in folder.iterdir() if p.name != "input")
    for name in left:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left and result[0] in (ACCEPTED, REFUSED):
        result = (f"{result[0]}, but {', '.join(left)} left behind", result[1])
    return result


def _place(error: BaseException) -> str:
    """The innermost line that is the project's own."""
    found, trace = "?", error.__traceback__
    root = Path(__file__).resolve().parents[1]
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if root in path.parents:
            found = f"{path.relative_to(root)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


_OWN_FAILURE = 70  # EX_SOFTWARE of sysexits.h
_STATE = struct.Struct("<QQQd")  # index of the input at work, accepted, refused, slowest ms


def run(
    target: Target,
    count: int,
    seed: int,
    folder: Path,
    cpu_limit_s: float = CPU_LIMIT_S,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Result:
    """Inputs 0 to count - 1 in child processes; folder: an empty one to work in."""
    result = Result(target.name)
    state = mmap.mmap(-1, _STATE.size)
    start = 0
    while start < count:
        state[:] = _STATE.pack(start, 0, 0, 0.0)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            code = _OWN_FAILURE
            try:
                _limit(memory_limit_bytes)
                _child(target, start, count, seed, folder, state, writer, cpu_limit_s)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                # Not exit: what the parent registered is the parent's.
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader) as lines:
            result.findings += [(int(i), kind, words) for i, kind, words in map(json.loads, lines)]
        _, status = os.waitpid(child, 0)
        index, accepted, refused, slowest = _STATE.unpack(state[:])
        result.accepted += accepted
        result.refused += refused
        result.slowest_ms = max(result.slowest_ms, slowest)
        start = count
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _OWN_FAILURE:
            raise RuntimeError(f"{target.name}: the tool itself failed behind input {index}")
        if status:
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            words = {
                signal.SIGPROF: f"took more than {cpu_limit_s:g} s of CPU time",
                signal.SIGALRM: f"took more than {WALL_LIMIT_S} s",
                0: f"ended the process with status {os.waitstatus_to_exitcode(status)}",
            }
            died = f"died of {signal.Signals(number).name}" if number else ""
            result.findings.append((index, words.get(number, died), ""))
            start = index + 1
        for item in folder.iterdir():
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    return result


def _limit(memory_limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # a test runner's; the parent says what happened
    # A write beyond it is then an error like that of a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK_LIMIT_BYTES, DISK_LIMIT_BYTES))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + memory_limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # The default action, which ends the process, also ends what loops inside a C library.
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)


def _child(
    target: Target,
    start: int,
    count: int,
    seed: int,
    folder: Path,
    state: mmap.mmap,
    writer: int,
    cpu_limit_s: float,
) -> None:
    tempfile.tempdir = str(folder)
    # numpy's, about numbers that a file made up.
    warnings.simplefilter("ignore")
    accepted = refused = 0
    slowest = 0.0
    for index in range(start, count):
        data = input_bytes(target, seed, index)
        state[:] = _STATE.pack(index, accepted, refused, slowest)
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        signal.setitimer(signal.ITIMER_REAL, WALL_LIMIT_S)
        before = time.process_time()
        kind, words = outcome(target, data, folder)
        slowest = max(slowest, 1000 * (time.process_time() - before))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        accepted += kind == ACCEPTED
        refused += kind == REFUSED
        if kind not in (ACCEPTED, REFUSED):
            os.write(writer, (json.dumps([index, kind, words]) + "\n").encode())
    state[:] = _STATE.pack(count, accepted, refused, slowest)


def shares(found: Sequence[Target], inputs: int) -> list[int]:
    """How many inputs each target gets: by its share, inputs or a few more in all."""
    total = sum(t.share for t in found)
    return [-int(-inputs * t.share // total) for t in found]


def report(results: Sequence[Result]) -> list[str]:
    """A Markdown table."""
    out = ["| target | inputs | accepted | refused | findings | slowest, CPU ms |"]
    out.append("|---|---:|---:|---:|---:|---:|")
    total = Result("all")
    for r in results:
        total.accepted += r.accepted
        total.refused += r.refused
        total.findings += r.findings
        total.slowest_ms = max(total.slowest_ms, r.slowest_ms)
    for r in (*results, total):
        out.append(
            f"| {r.name} | {r.inputs:,} | {r.accepted:,} | {r.refused:,} | {len(r.findings):,} | "
            f"{r.slowest_ms:.0f} |"
        )
    return out


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in name).replace("--", "-")


def _replay(found: Sequence[Target], path: Path, folder: Path) -> int:
    name = path.name.rpartition("-")[0]
    target = next((t for t in found if _slug(t.name) == name), None)
    if target is None:
        known = ", ".join(_slug(t.name) for t in found)
        raise EdgeDtmError(f"{path} has no target in its name: one of {known}, then -NUMBER.bin")
    kind, words = outcome(target, path.read_bytes(), folder)
    print(f"{kind}: {words}" if words else kind)
    return int(kind not in (ACCEPTED, REFUSED))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="in all [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="targets whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("findings"), help="[%(default)s]")
    parser.add_argument("--replay", type=Path, help="a file that an earlier run wrote there")
    options = parser.parse_args(arguments)
    memory_files = Path("/dev/shm")
    place = memory_files if os.access(memory_files, os.W_OK) else None
    try:
        with tempfile.TemporaryDirectory(prefix="edge-dtm-fuzz-", dir=place) as name:
            work = Path(name)
            found = [t for t in targets(work) if (options.only or "") in t.name]
            (work / "run").mkdir()
            if options.replay is not None:
                return _replay(found, options.replay, work / "run")
            return _run_all(found, options, work / "run")
    except EdgeDtmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run_all(found: Sequence[Target], options: Any, folder: Path) -> int:
    if not found:
        raise EdgeDtmError(f"no target is called {options.only}: leave out --only to see them")
    results = []
    for target, count in zip(found, shares(found, options.inputs), strict=True):
        result = run(target, count, options.seed, folder)
        results.append(result)
        for kind, count in Counter(kind for _, kind, _ in result.findings).most_common():
            found_here = [(i, words) for i, k, words in result.findings if k == kind]
            for index, words in found_here[:EXAMPLES]:
                options.out.mkdir(parents=True, exist_ok=True)
                path = options.out / f"{_slug(target.name)}-{index}.bin"
                path.write_bytes(input_bytes(target, options.seed, index))
                print(f"{path}: {kind}: {words}", file=sys.stderr, flush=True)
            print(f"{target.name}: {count} times: {kind}", file=sys.stderr, flush=True)
    print("\n".join(report(results)))
    return int(any(r.findings for r in results))


if __name__ == "__main__":
    sys.exit(main())
