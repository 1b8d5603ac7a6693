"""The packed file: the same bytes twice, everything else refused, nothing half-written left."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import zstandard
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fixtures.bundle_folder import FILES, contents, make_folder

from edge_dtm.cli import main
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats import signing
from edge_dtm.formats.archive import open_bundle, pack, unpack

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
ID = signing.key_id(KEY.public_key())
TRUSTED = {ID: KEY.public_key()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "made")


def regular(name: str, data: bytes, **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, data


def write_archive(
    path: Path, members: list[tuple[tarfile.TarInfo, bytes]], tail: bytes = b""
) -> Path:
    """With a right trailer, so that only what is inside can be refused."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return seal(path, zstandard.ZstdCompressor().compress(buffer.getvalue() + tail))


def seal(path: Path, frame: bytes) -> Path:
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


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        *[
            (name, {}, "not listed")
            for name in (
                "../evil", "/tmp/evil", "sub/model.gguf", "./model.gguf", "extra", "manifest.json",
                "..", "a\nb",
            )
        ],
        *[
            ("model.gguf", {"type": kind, "linkname": target}, "not a plain file")
            for kind, target in (
                (tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "report.md"),
                (tarfile.CHRTYPE, ""), (tarfile.FIFOTYPE, ""), (tarfile.DIRTYPE, ""),
                (tarfile.CONTTYPE, ""),
            )
        ],
        ("x" * 300, {}, "not a plain file"),  # a GNU long name comes before it
        ("model.gguf", {}, "0 bytes, the manifest says"),
        ("model.gguf\0", {}, "0 bytes, the manifest says"),
    ],
)  # fmt: skip
def test_a_crafted_member_is_refused(
    folder: Path, tmp_path: Path, name: str, attributes: dict[str, Any], message: str
) -> None:
    first, *rest = members_of(folder)
    extra = regular(name, b"", **attributes)
    refused(write_archive(tmp_path / "bad.edge", [first, extra, *rest]), message)


def test_duplicate_oversize_missing_and_changed_members(folder: Path, tmp_path: Path) -> None:
    head, first, second, *rest = members_of(folder)
    name, data = FILES[1], second[1]
    for members, message in (
        ([head, first, second, *rest, first], "comes twice"),
        ([head, first, second, *rest[:-1]], "lacks report.md"),
        ([first, second, *rest], "not its first member"),
        ([first, head, second, *rest], "not its first member"),
        ([], "not its first member"),
        ([head, first, regular(name, data + b"x"), *rest], "the manifest says"),
        ([head, first, regular(name, data[:-1] + b"x"), *rest], f"{name} is changed"),
    ):
        refused(write_archive(tmp_path / "bad.edge", members), message)


def test_a_bomb_is_refused_before_it_unfolds(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.edge"
    head, *rest = members_of(folder)
    for name, limit in (
        ("manifest.json", bundles.MANIFEST_LIMIT_BYTES),
        ("manifest.sig", bundles.SIGNATURE_LIMIT_BYTES),
    ):
        huge = regular(name, bytes(limit + 1))
        members = [huge, *rest] if name == "manifest.json" else [head, huge, *rest]
        refused(write_archive(path, members), f"the limit is {limit}")
    tree = json.loads((folder / "manifest.json").read_text())
    tree["files"]["model.gguf"]["size_bytes"] = 2**60
    claim = regular("manifest.json", json.dumps(tree).encode())
    refused(write_archive(path, [claim, *rest]), "make room")
    refused(write_archive(path, [head, *rest], bytes(2**22)), "behind its end")
    refused(write_archive(path, [head, *rest], b"x"), "behind its end")


def test_a_frame_that_asks_for_gigabytes_is_refused(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a.edge")
    frame = bytearray((tmp_path / "a.edge").read_bytes())[:-40]
    assert frame[4] & 0b0010_0000 == 0, "no single segment: the next byte is the window's size"
    frame[5] = 0xF8  # 2 TiB
    refused(seal(tmp_path / "bad.edge", frame), "damaged")


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


def test_every_truncation_and_extension_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.edge"
    pack(folder, path)
    data = path.read_bytes()
    lengths = random.Random(0).sample(range(len(data)), 50)
    for length in [0, 1, 5, len(data) - 41, len(data) - 40, len(data) - 1, *lengths]:
        path.write_bytes(data[:length])
        refused(path, "truncated|damaged")
    for behind in (b"x", data):
        path.write_bytes(data + behind)
        refused(path, "behind its end|damaged")


def test_every_flipped_bit_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.edge"
    pack(folder, path, sign_with=KEY)
    data = path.read_bytes()
    source = random.Random(7)
    # zstd itself takes no notice of some bits of the first six bytes.
    places = [(i, 1 << bit) for i in range(6) for bit in range(8)]
    places += [(source.randrange(len(data)), source.randrange(1, 256)) for _ in range(200)]
    for place, flip in places:
        changed = bytearray(data)
        changed[place] ^= flip
        path.write_bytes(changed)
        refused(path, r"a\.edge", TRUSTED)


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
    head, *rest = members_of(folder)

    def archive(signature: bytes) -> Path:
        return write_archive(path, [head, regular("manifest.sig", signature), *rest])

    assert unpack(archive(good), tmp_path / "x") == ID
    shutil.rmtree(tmp_path / "x")
    for trusted in (None, TRUSTED):
        refused(archive(of_another), "does not fit", trusted)
        refused(archive(b"{}"), "signature file", trusted)
    refused(archive(by_another), "trusted are", TRUSTED)
    # Second or nowhere.
    signature = regular("manifest.sig", good)
    refused(write_archive(path, [head, *rest, signature]), "manifest.sig' is not listed")
    refused(write_archive(path, [signature, head, *rest]), "not its first member")
    refused(write_archive(path, [head, signature, signature, *rest]), "is not listed")
    # A manifest that promises what it likes is not even parsed.
    tree = json.loads(manifest)
    tree["files"]["model.gguf"]["size_bytes"] = 2**60
    forged = regular("manifest.json", json.dumps(tree).encode())
    refused(write_archive(path, [forged, signature, *rest]), "does not fit", TRUSTED)
    # The same in a folder.
    for data, message in (
        (of_another, "does not fit"),
        (b"\xff", "signature file"),
        (bytes(bundles.SIGNATURE_LIMIT_BYTES + 1), "above 4096 bytes"),
    ):
        (folder / "manifest.sig").write_bytes(data)
        for action in (lambda: open_bundle(folder), lambda: pack(folder, tmp_path / "new.edge")):
            with pytest.raises(EdgeDtmError, match=message):
                action()
    assert not (tmp_path / "new.edge").exists()


# --- limits, full disks, kills --------------------------------------------------------------


def test_max_unpacked_bytes(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a.edge")
    size = open_bundle(folder).size_bytes
    with pytest.raises(EdgeDtmError, match=f"unpacks to {size} bytes, {size - 1} are allowed"):
        unpack(tmp_path / "a.edge", tmp_path / "out", max_unpacked_bytes=size - 1)
    assert not (tmp_path / "out").exists()
    unpack(tmp_path / "a.edge", tmp_path / "out", max_unpacked_bytes=size)


def test_a_full_disk_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(folder, tmp_path / "a.edge")
    before = sorted(tmp_path.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for action in (
        lambda: pack(folder, tmp_path / "b.edge"),
        lambda: unpack(tmp_path / "a.edge", tmp_path / "out"),
        lambda: open_bundle(tmp_path / "a.edge"),
    ):
        with pytest.raises(EdgeDtmError, match="No space left on device") as caught:
            action()
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


ACTIONS: dict[str, Callable[..., object]] = {
    "pack": lambda made, packed, target, progress=None: pack(made, target, progress=progress),
    "unpack": lambda made, packed, target, progress=None: unpack(packed, target, progress),
    "open": lambda made, packed, target, progress=None: open_bundle(packed, progress).__exit__(),
}


def halt_halfway(what: str, paths: tuple[Path, Path, Path], halfway: Event) -> None:
    def halt(amount: int) -> None:
        halfway.set()
        time.sleep(600)

    ACTIONS[what](*paths, halt)


@pytest.mark.parametrize("what", ACTIONS)
def test_what_a_killed_run_leaves_the_next_one_removes(
    folder: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(folder, tmp_path / "a.edge")
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    paths = folder, tmp_path / "a.edge", place / "target"
    context = multiprocessing.get_context("spawn")
    halfway = context.Event()
    process = context.Process(target=halt_halfway, args=(what, paths, halfway), daemon=True)
    process.start()
    assert halfway.wait(60)
    (left,) = place.iterdir()
    assert left.name.startswith(".") and left.is_dir()
    # While the other process lives, its folder is left alone.
    ACTIONS[what](*paths)
    assert left.is_dir()
    for path in set(place.iterdir()) - {left}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    process.kill()
    process.join()
    assert list(place.iterdir()) == [left], "the final name never had half a file"
    ACTIONS[what](*paths)
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
