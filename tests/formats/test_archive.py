"""The packed file: the same bytes twice, everything else refused, nothing half-written left."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_dtm.cli import main
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats import signing
from edge_dtm.formats import unpack as unpacking
from edge_dtm.formats.archive import open_bundle, pack, unpack
from edge_dtm.formats.bundle import write_manifest
from edge_dtm.formats.thresholds import Thresholds

FILES = ["host.npz", "model.gguf", "plan.json", "probe.npz", "reference.npz", "report.md"]
LIMITS = Thresholds(
    max_sdt=0.05,
    min_fdt=10,
    max_kl_vs_host=0.01,
    decided_margin=1.0,
    max_decided_sdt_vs_host=0.002,
    max_kl_probe=0.001,
)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
ID = signing.key_id(KEY.public_key())
TRUSTED = {ID: KEY.public_key()}


def make_folder(folder: Path, seed: int = 0) -> Path:
    """A bundle by its form: the contents of the files do not matter here."""
    source = random.Random(seed)
    folder.mkdir()
    for i, name in enumerate(FILES):
        (folder / name).write_bytes(source.randbytes(10) + bytes([i]) * 3000 * i)
    write_manifest(folder, FILES, LIMITS, {"model": "m"}, {"sdt": 0.01})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "made")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def regular(name: str, data: bytes, **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, data


def write_archive(
    path: Path, members: list[tuple[tarfile.TarInfo, bytes]], tail: bytes = b""
) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return write_frame(path, buffer.getvalue() + tail)


def write_frame(path: Path, data: bytes) -> Path:
    """The data in zstd with a right trailer, so that only what is inside can be refused."""
    frame = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(frame + b"\x5e\x2a\x4d\x18\x20\0\0\0" + hashlib.sha256(frame).digest())
    return path


def members_of(folder: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [regular(name, (folder / name).read_bytes()) for name in ("manifest.json", *FILES)]


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "made.edge", tmp_path / "out"
    before = contents(folder)
    (folder / "work").mkdir()
    (folder / ".notes").write_text("stay here")
    packed: list[int] = []
    unpacked: list[int] = []
    pack(folder, file, progress=packed.append)
    unpack(file, out, unpacked.append)
    assert contents(out) == before
    size = open_bundle(out).size_bytes
    assert sum(unpacked) == size
    assert sum(packed) == size + len(before["manifest.json"])
    with open_bundle(file) as bundle:
        bundle.check()
        inside = bundle.folder
        assert contents(inside) == before
    assert not inside.exists()
    assert not inside.parent.exists()


def test_packing_is_deterministic(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a")
    for path in folder.iterdir():
        path.chmod(0o600)
        os.utime(path, (1, 1))
    pack(folder, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with (
        zstandard.ZstdDecompressor().stream_reader((tmp_path / "a").open("rb")) as reader,
        tarfile.open(fileobj=reader, mode="r|") as archive,
    ):
        members = [(m.name, m.mtime, m.uid, m.gid, m.mode, m.uname) for m in archive]
    assert members == [(name, 0, 0, 0, 0o644, "") for name in ("manifest.json", *FILES)]


def test_a_spoilt_bundle_is_not_packed(folder: Path, tmp_path: Path) -> None:
    (folder / "model.gguf").write_bytes(b"other")
    (tmp_path / "out.edge").write_text("old")
    with pytest.raises(EdgeDtmError, match=r"model\.gguf is changed"):
        pack(folder, tmp_path / "out.edge")
    assert (tmp_path / "out.edge").read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"made", "out.edge"}


def test_an_existing_target_stays_untouched(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a.edge")
    target = tmp_path / "there"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(EdgeDtmError, match="exists already"):
        unpack(tmp_path / "a.edge", target)
    assert contents(target) == {"mine": b"mine"}
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(EdgeDtmError, match="exists already"):
        unpack(tmp_path / "a.edge", tmp_path / "dangling")
    with pytest.raises(EdgeDtmError, match="cannot write"):
        unpack(tmp_path / "a.edge", tmp_path / "no" / "parent")


def refused(archive: Path, message: str, trusted: signing.Trusted | None = None) -> None:
    """It is refused, in one line, and nothing is left behind."""
    around = sorted(archive.parent.iterdir())
    assert archive.parent / "out" not in around
    with pytest.raises(EdgeDtmError, match=message) as caught:
        unpack(archive, archive.parent / "out", trusted=trusted)
    assert "\n" not in str(caught.value)
    assert sorted(archive.parent.iterdir()) == around


def link(name: str, target: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return regular(name, b"", type=kind, linkname=target)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (regular("../evil", b"x"), "not listed"),
        (regular("/tmp/evil", b"x"), "not listed"),
        (regular("sub/model.gguf", b"x"), "not listed"),
        (regular("./model.gguf", b"x"), "not listed"),
        (regular("extra", b"x"), "not listed"),
        (regular("manifest.json", b"x"), "not listed"),
        (link("model.gguf", "/etc/passwd", tarfile.SYMTYPE), "not a plain file"),
        (link("model.gguf", "report.md", tarfile.LNKTYPE), "not a plain file"),
        (link("model.gguf", "", tarfile.CHRTYPE), "not a plain file"),
        (link("model.gguf", "", tarfile.FIFOTYPE), "not a plain file"),
        (link("model.gguf", "", tarfile.DIRTYPE), "not a plain file"),
        (regular("x" * 300, b"x"), "not a plain file"),  # a GNU long name comes before it
        (regular("model.gguf", b"x"), "1 bytes, the manifest says"),
        (regular("model.gguf", b"x", type=tarfile.CONTTYPE), "not a plain file"),
        (regular("model.gguf\0", b"x"), "1 bytes, the manifest says"),
        (regular("..", b"x"), "not listed"),
        (regular("a\nb", b"x"), "not listed"),
    ],
)
def test_a_crafted_member_is_refused(
    folder: Path, tmp_path: Path, extra: tuple[tarfile.TarInfo, bytes], message: str
) -> None:
    first, *rest = members_of(folder)
    refused(write_archive(tmp_path / "bad.edge", [first, extra, *rest]), message)


def test_duplicate_oversize_missing_and_changed_members(folder: Path, tmp_path: Path) -> None:
    members = members_of(folder)
    path = tmp_path / "bad.edge"
    refused(write_archive(path, [*members, members[1]]), "comes twice")
    refused(write_archive(path, members[:-1]), "lacks report.md")
    refused(write_archive(path, members[1:]), "not its first member")
    refused(write_archive(path, [members[1], members[0], *members[2:]]), "not its first member")
    refused(write_archive(path, []), "not its first member")
    name, data = FILES[1], members[2][1]
    members[2] = regular(name, data + b"x")
    refused(write_archive(path, members), "the manifest says")
    members[2] = regular(name, data[:-1] + b"x")
    refused(write_archive(path, members), f"{name} is changed")


def test_a_bomb_is_refused_before_it_unfolds(folder: Path, tmp_path: Path) -> None:
    huge = tarfile.TarInfo("manifest.json")
    huge.size = bundles.MANIFEST_LIMIT_BYTES + 1
    path = tmp_path / "bad.edge"
    refused(write_frame(path, huge.tobuf() + bytes(1024)), "the limit is")
    first, *rest = members_of(folder)
    huge_signature = regular("manifest.sig", bytes(bundles.SIGNATURE_LIMIT_BYTES + 1))
    refused(write_archive(path, [first, huge_signature, *rest]), "the limit is 4096")
    tree = json.loads((folder / "manifest.json").read_text())
    tree["files"]["model.gguf"]["size_bytes"] = 2**60
    claim = regular("manifest.json", json.dumps(tree).encode())
    refused(write_archive(path, [claim, *members_of(folder)[1:]]), "make room")
    refused(write_archive(path, members_of(folder), bytes(2**22)), "behind its end")
    refused(write_archive(path, members_of(folder), b"x"), "behind its end")


def test_a_frame_that_asks_for_gigabytes_is_refused(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a.edge")
    frame = bytearray((tmp_path / "a.edge").read_bytes())[:-40]
    assert frame[4] & 0b0010_0000 == 0, "no single segment: the next byte is the window's size"
    frame[5] = 0xF8  # 2 TiB
    (tmp_path / "bad.edge").write_bytes(
        frame + b"\x5e\x2a\x4d\x18\x20\0\0\0" + hashlib.sha256(frame).digest()
    )
    refused(tmp_path / "bad.edge", "damaged")


def test_data_behind_the_end_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.edge"
    pack(folder, path)
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    refused(path, "behind its end")
    path.write_bytes(data + data)
    refused(path, "behind its end")
    path.write_bytes(data[:-40])
    refused(path, "truncated")


@pytest.mark.skipif(not shutil.which("zstd") or not shutil.which("tar"), reason="needs zstd, tar")
def test_other_programs_read_it(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a.edge", sign_with=KEY)
    subprocess.run(["zstd", "-q", "-t", tmp_path / "a.edge"], check=True)
    (tmp_path / "out").mkdir()
    subprocess.run(
        ["tar", "--zstd", "-xf", tmp_path / "a.edge", "-C", tmp_path / "out"], check=True
    )
    found = contents(tmp_path / "out")
    assert signing.check_signature(found["manifest.json"], found.pop("manifest.sig"), TRUSTED) == ID
    assert found == contents(folder)


@pytest.mark.parametrize("level", [1, 10, 19])
def test_every_truncation_is_refused(folder: Path, tmp_path: Path, level: int) -> None:
    whole = tmp_path / "whole.edge"
    pack(folder, whole, level)
    data = whole.read_bytes()
    path = tmp_path / "cut.edge"
    lengths = random.Random(level).sample(range(len(data)), 50)
    for length in [0, 1, 5, len(data) - 41, len(data) - 40, len(data) - 1, *lengths]:
        path.write_bytes(data[:length])
        refused(path, "truncated|damaged")


@pytest.mark.parametrize("signed", [False, True])
def test_every_flipped_bit_is_refused(folder: Path, tmp_path: Path, signed: bool) -> None:
    path = tmp_path / "a.edge"
    pack(folder, path, sign_with=KEY if signed else None)
    data = path.read_bytes()
    source = random.Random(7)
    # zstd itself takes no notice of some bits of the first six bytes.
    places = [(i, 1 << bit) for i in range(6) for bit in range(8)]
    places += [(source.randrange(len(data)), source.randrange(1, 256)) for _ in range(200)]
    for place, flip in places:
        changed = bytearray(data)
        changed[place] ^= flip
        path.write_bytes(changed)
        refused(path, r"a\.edge", TRUSTED if signed else None)


def test_a_failing_progress_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a.edge")

    def stop(amount: int) -> None:
        raise KeyboardInterrupt

    actions: list[Callable[[], object]] = [
        lambda: unpack(tmp_path / "a.edge", tmp_path / "out", stop),
        lambda: pack(folder, tmp_path / "b.edge", progress=stop),
    ]
    for action in actions:
        with pytest.raises(KeyboardInterrupt):
            action()
    assert {p.name for p in tmp_path.iterdir()} == {"made", "a.edge"}


# --- signatures -----------------------------------------------------------------------------


def signed_members(folder: Path, signature: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    first, *rest = members_of(folder)
    return [first, regular("manifest.sig", signature), *rest]


def test_a_signed_bundle(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    file = tmp_path / "a.edge"
    assert pack(folder, file, sign_with=KEY) == ID
    assert contents(folder) == before, "packing changes nothing in the folder"
    with open_bundle(file) as bundle:
        assert bundle.key_id == ID
        bundle.check()
    with open_bundle(file, trusted=TRUSTED) as bundle:
        assert bundle.key_id == ID
    assert unpack(file, tmp_path / "back", trusted=TRUSTED) == ID
    assert open_bundle(tmp_path / "back", trusted=TRUSTED).key_id == ID
    open_bundle(tmp_path / "back").check()
    # The signature that is there travels on, into the very same bytes.
    assert pack(tmp_path / "back", tmp_path / "b.edge") == ID
    assert (tmp_path / "b.edge").read_bytes() == file.read_bytes()
    pack(folder, tmp_path / "c.edge", sign_with=KEY)
    assert (tmp_path / "c.edge").read_bytes() == file.read_bytes()
    # Another key takes its place.
    assert pack(tmp_path / "back", tmp_path / "d.edge", sign_with=OTHER_KEY) != ID
    refused(tmp_path / "d.edge", "trusted are", TRUSTED)


def test_an_unsigned_bundle(folder: Path, tmp_path: Path) -> None:
    assert pack(folder, tmp_path / "a.edge") is None
    with open_bundle(tmp_path / "a.edge") as bundle:
        assert bundle.key_id is None
    assert open_bundle(folder).key_id is None
    refused(tmp_path / "a.edge", "not signed", TRUSTED)
    for path in (folder, tmp_path / "a.edge"):
        with pytest.raises(EdgeDtmError, match="is not signed: ask its maker"):
            open_bundle(path, trusted=TRUSTED)


def test_signatures_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    path, manifest = tmp_path / "bad.edge", (folder / "manifest.json").read_bytes()
    good = signing.sign_manifest(manifest, KEY)
    other = make_folder(tmp_path / "other", seed=1)
    of_another = signing.sign_manifest((other / "manifest.json").read_bytes(), KEY)
    by_another = signing.sign_manifest(manifest, OTHER_KEY)

    assert unpack(write_archive(path, signed_members(folder, good)), tmp_path / "x") == ID
    shutil.rmtree(tmp_path / "x")
    for trusted in (None, TRUSTED):
        refused(write_archive(path, signed_members(folder, of_another)), "does not fit", trusted)
        refused(write_archive(path, signed_members(folder, b"{}")), "signature file", trusted)
    refused(write_archive(path, signed_members(folder, by_another)), "trusted are", TRUSTED)
    # Second or nowhere.
    first, signature, *rest = signed_members(folder, good)
    refused(write_archive(path, [first, *rest, signature]), "manifest.sig' is not listed")
    refused(write_archive(path, [signature, first, *rest]), "not its first member")
    refused(write_archive(path, [first, signature, signature, *rest]), "is not listed")
    # The same in a folder.
    for data, message in ((of_another, "does not fit"), (b"\xff", "signature file")):
        (folder / "manifest.sig").write_bytes(data)
        for action in (
            lambda: open_bundle(folder),
            lambda: open_bundle(folder, trusted=TRUSTED),
            lambda: pack(folder, tmp_path / "new.edge"),
        ):
            with pytest.raises(EdgeDtmError, match=message):
                action()
    (folder / "manifest.sig").write_bytes(bytes(bundles.SIGNATURE_LIMIT_BYTES + 1))
    with pytest.raises(EdgeDtmError, match="above 4096 bytes"):
        open_bundle(folder)
    assert not (tmp_path / "new.edge").exists()


def test_nothing_is_written_before_the_signature_is_checked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that promises what it likes does not even get parsed."""
    tree = json.loads((folder / "manifest.json").read_text())
    tree["files"]["model.gguf"]["size_bytes"] = 2**60
    forged = regular("manifest.json", json.dumps(tree).encode())
    good = signing.sign_manifest((folder / "manifest.json").read_bytes(), KEY)
    path = tmp_path / "bad.edge"
    write_archive(path, [forged, regular("manifest.sig", good), *members_of(folder)[1:]])
    written: list[Path] = []
    monkeypatch.setattr(unpacking, "write_synced", lambda path, *_: written.append(path))
    monkeypatch.setattr(unpacking, "_unpack_member", lambda *_: written.append(path))
    refused(path, "does not fit", TRUSTED)
    assert written == []


# --- limits, full disks, kills --------------------------------------------------------------


def test_max_unpacked_bytes(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a.edge")
    size = open_bundle(folder).size_bytes
    with pytest.raises(EdgeDtmError, match=f"unpacks to {size} bytes, {size - 1} are allowed"):
        unpack(tmp_path / "a.edge", tmp_path / "out", max_unpacked_bytes=size - 1)
    assert not (tmp_path / "out").exists()
    unpack(tmp_path / "a.edge", tmp_path / "out", max_unpacked_bytes=size)


def test_other_schemas_are_refused_packed_too(folder: Path, tmp_path: Path) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    first = regular("manifest.json", json.dumps({**tree, "schema_version": 3}).encode())
    refused(
        write_archive(tmp_path / "bad.edge", [first, *members_of(folder)[1:]]),
        "schema version 3, this edge-dtm reads 2",
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    pack(folder, tmp_path / "a.edge")
    before = sorted(tmp_path.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    for action in (
        lambda: pack(folder, tmp_path / "b.edge"),
        lambda: unpack(tmp_path / "a.edge", tmp_path / "out"),
        lambda: open_bundle(tmp_path / "a.edge"),
    ):
        with pytest.raises(EdgeDtmError, match="the disk is full; make room") as caught:
            action()
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def _can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs a user namespace that may mount")
@pytest.mark.parametrize("command", ["pack", "unpack", "open"])
def test_a_disk_that_is_really_full(folder: Path, tmp_path: Path, command: str) -> None:
    """A file system of 64 KiB, which says that it has room until it is written to."""
    (folder / "model.gguf").write_bytes(random.Random(0).randbytes(2**20))
    write_manifest(folder, FILES, LIMITS, {}, {})
    pack(folder, tmp_path / "a.edge")
    small = tmp_path / "small"
    small.mkdir()
    action = {
        "pack": f"main(['pack', '{folder}', '-o', '{small}/b.edge'])",
        "unpack": f"main(['unpack', '{tmp_path}/a.edge', '-o', '{small}/out'])",
        "open": f"main.add_command(click.command('x')(lambda: open_bundle('{tmp_path}/a.edge'))); "
        "main(['x'])",
    }[command]
    # The room is asked for before anything is written; here the answer is wrong.
    program = (
        "import collections, shutil, click; from edge_dtm.cli import main; "
        "from edge_dtm.formats.archive import open_bundle; "
        f"shutil.disk_usage = lambda path: collections.namedtuple('U', 'free')(2**40); {action}"
    )
    script = (
        f"mount -t tmpfs -o size=64k none {small} && cd {Path.cwd()} && "
        f'TMPDIR={small} {sys.executable} -c "$0"; echo $?; ls -A {small}'
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, program], capture_output=True, text=True
    )
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.stdout == "1\n", (done.stdout, done.stderr)
    assert len(errors) == 1 and "disk is full; make room" in errors[0], done.stderr
    assert "Traceback" not in done.stderr


KILLED = """
    import sys, time
    from pathlib import Path
    from edge_dtm.formats.archive import open_bundle, pack, unpack

    def stop(amount):
        print("half", flush=True)
        time.sleep(600)

    what, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if what == "pack":
        pack(source, target, progress=stop)
    elif what == "unpack":
        unpack(source, target, stop)
    else:
        open_bundle(source, stop)
"""


@pytest.mark.parametrize("what", ["pack", "unpack", "open"])
def test_what_a_killed_run_leaves_the_next_one_removes(
    folder: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(folder, tmp_path / "a.edge")
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    source = folder if what == "pack" else tmp_path / "a.edge"
    target = place / "target"

    def run() -> None:
        if what == "pack":
            pack(source, target)
        elif what == "unpack":
            unpack(source, target)
        else:
            open_bundle(source).close()

    arguments = [sys.executable, "-c", textwrap.dedent(KILLED), what, str(source), str(target)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        (left,) = place.iterdir()
        assert left.name.startswith(".") and left.is_dir()
        # While the other process lives, its folder is left alone.
        run()
        assert left.is_dir()
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(place.iterdir()) == [left], "the final name never had half a file"
    run()
    assert not left.exists()
    assert {p.name for p in place.iterdir()} == ({"target"} if what != "open" else set())


def test_only_what_is_ours_is_removed(folder: Path, tmp_path: Path) -> None:
    kept = [".b.edge.notes.edge-dtm", ".b.edge.abcdefgh", ".c.edge.abcdefgh.edge-dtm"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".b.edge.abcdefgi.edge-dtm").write_text("a file")
    (tmp_path / ".b.edge.abcdefgj.edge-dtm").symlink_to(tmp_path / "made")
    (tmp_path / ".b.edge.abcdefgk.edge-dtm").mkdir()
    before = contents(folder)
    pack(folder, tmp_path / "b.edge")
    assert not (tmp_path / ".b.edge.abcdefgk.edge-dtm").exists()
    assert all((tmp_path / name).is_dir() for name in kept)
    assert (tmp_path / ".b.edge.abcdefgi.edge-dtm").read_text() == "a file"
    assert contents(folder) == before


def test_rights_are_the_usual_ones(folder: Path, tmp_path: Path) -> None:
    """The hidden folder is private; what comes out of it is as if made by hand."""
    mask = os.umask(0o022)
    try:
        pack(folder, tmp_path / "a.edge")
        unpack(tmp_path / "a.edge", tmp_path / "out")
    finally:
        os.umask(mask)
    assert (tmp_path / "a.edge").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "model.gguf").stat().st_mode & 0o777 == 0o644


# --- the commands ---------------------------------------------------------------------------


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def failed(result: Any, words: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert words in result.stderr.splitlines()[-1]


def test_commands(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "trusted").mkdir()
    made = run("keygen", tmp_path / "me")
    assert made.exit_code == 0
    identity = made.output.splitlines()[-1].removeprefix("key id ")
    failed(run("keygen", tmp_path / "me"), "exists already")
    result = run("pack", folder, "--sign", tmp_path / "me.key")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "made.edge").is_file()
    assert f"signed with the key {identity}" in result.stdout

    packed, keys = tmp_path / "made.edge", tmp_path / "trusted"
    failed(run("unpack", packed, "--trusted-keys", keys, "-o", tmp_path / "u"), "no trusted keys")
    shutil.copy(tmp_path / "me.pub", keys)
    result = run("unpack", packed, "--trusted-keys", keys, "-o", tmp_path / "u")
    assert result.exit_code == 0
    assert f"signed with the key {identity}, which is trusted" in result.stdout
    failed(run("unpack", packed), "exists already")  # the folder that was packed
    shutil.rmtree(folder)
    failed(run("unpack", packed, "--max-unpacked-bytes", "1K"), "1000 are allowed")
    assert run("unpack", packed).exit_code == 0
    assert (folder / "manifest.sig").is_file()
    failed(run("pack", folder, "--sign", tmp_path / "me.pub"), "no private key")
    failed(run("pack", packed), "give the folder of a bundle")
    assert run("pack", folder, "--for", "other").exit_code == 2
