"""Bundles: what is changed, missing or slipped in is found, packed or not."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from edge_dtm import bundle as bundles
from edge_dtm.bundle import Thresholds, open_bundle, pack, unpack, write_manifest
from edge_dtm.errors import EdgeDtmError

FILES = ["host.npz", "model.gguf", "plan.json", "reference.npz", "report.md"]
LIMITS = Thresholds(max_sdt=0.05, min_fdt=10, max_sdt_vs_host=0.01, max_kl_vs_host=0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle by its form: the contents of the files do not matter here."""
    folder = tmp_path / "made"
    folder.mkdir()
    for i, name in enumerate(FILES):
        (folder / name).write_bytes(os.urandom(10) + bytes([i]) * 3000 * i)
    write_manifest(folder, FILES, LIMITS, {"model": "m"}, {"sdt": 0.01})
    return folder


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
    path.write_bytes(zstandard.ZstdCompressor().compress(buffer.getvalue() + tail))
    return path


def members_of(folder: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [regular(name, (folder / name).read_bytes()) for name in ("manifest.json", *FILES)]


def test_a_whole_bundle_passes(folder: Path) -> None:
    hashed: list[int] = []
    with open_bundle(folder) as bundle:
        bundle.check(hashed.append)
        assert bundle.manifest.thresholds == LIMITS
        assert bundle.manifest.provenance == {"model": "m"}
        assert bundle.manifest.measured == {"sdt": 0.01}
        assert bundle.path("model.gguf").read_bytes() == (folder / "model.gguf").read_bytes()
        assert sum(hashed) == bundle.size_bytes
        with pytest.raises(EdgeDtmError, match="lists no"):
            bundle.path("../secret")
    tree = json.loads((folder / "manifest.json").read_text())
    assert tree["schema_version"] == 1
    assert tree["kind"] == "edge-dtm bundle"
    assert set(tree) == {
        "schema_version", "kind", "files", "thresholds", "provenance", "measured",
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_byte_in_any_file_is_found(folder: Path, name: str, place: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[place] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(EdgeDtmError, match=f"{name} is changed"):
        open_bundle(folder).check()


def test_all_offenders_are_listed(folder: Path) -> None:
    (folder / "model.gguf").unlink()
    (folder / "plan.json").write_text("longer or shorter")
    (folder / "extra.bin").write_text("?")
    (folder / ".hidden").write_text("not looked at")
    (folder / "work").mkdir()
    (folder / "report.md").rename(folder / "work" / "report.md")
    (folder / "report.md").symlink_to(folder / "work" / "report.md")
    with pytest.raises(EdgeDtmError) as caught:
        open_bundle(folder).check()
    text = str(caught.value)
    for part in (
        "model.gguf is missing",
        "plan.json is changed (17 bytes instead of",
        "extra.bin is not listed",
        "report.md is not a plain file",
    ):
        assert part in text
    assert "hidden" not in text
    assert "work" not in text.replace(str(folder), "")
    assert "\n" not in text


def test_a_manifest_without_the_model_is_found(folder: Path) -> None:
    write_manifest(folder, FILES[2:], LIMITS, {}, {})
    with pytest.raises(EdgeDtmError, match=r"model.gguf is not listed; host.npz is not listed"):
        open_bundle(folder).check()


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(EdgeDtmError, match="does not exist"):
        open_bundle(tmp_path / "absent")
    with pytest.raises(EdgeDtmError, match="has no manifest"):
        open_bundle(tmp_path)
    (tmp_path / "text").write_text("some text\n" * 100)
    with pytest.raises(EdgeDtmError, match="no packed bundle"):
        open_bundle(tmp_path / "text")
    (tmp_path / "empty").touch()
    with pytest.raises(EdgeDtmError, match="truncated"):
        open_bundle(tmp_path / "empty")


def change(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree[key]
    if value is None:
        del tree[last]
    else:
        tree[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("kind", "holiday pictures", "not the manifest"),
        ("schema_version", 2, "schema version 2"),
        ("files", [], "no files"),
        ("files/model.gguf/sha256", "A" * 64, "needs a sha256"),
        ("files/model.gguf/size_bytes", -1, "needs a sha256"),
        ("files/model.gguf/size_bytes", True, "needs a sha256"),
        ("files/model.gguf", None, "model.gguf is not listed"),
        ("files/..", {"sha256": "0" * 64, "size_bytes": 1}, "not a plain file name"),
        ("files/manifest.json", {"sha256": "0" * 64, "size_bytes": 1}, "not a plain file name"),
        ("files/Model.gguf", {"sha256": "0" * 64, "size_bytes": 1}, "comes twice"),
        ("thresholds/max_sdt", None, "exactly the names"),
        ("thresholds/max_sdt", "0.1", "no number"),
        ("thresholds/max_sdt", 1.5, "at most 1"),
        ("thresholds/min_fdt", math.nan, "NaN is no JSON number"),
        ("thresholds/colour", 1, "exactly the names"),
        ("provenance", None, "no provenance"),
        ("measured", [], "no measured"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, path: str, value: Any, message: str) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    change(tree, path, value)
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(EdgeDtmError, match=message):
        open_bundle(folder).check()


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff\xfe", b"[]", b"{}"])
def test_a_manifest_that_is_none_is_refused(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(EdgeDtmError, match=r"is no JSON|not the manifest"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_sdt", math.inf), ("max_sdt", -0.1), ("max_sdt_vs_host", 2), ("min_fdt", math.nan)],
)
def test_thresholds_are_checked(field: str, value: float) -> None:
    with pytest.raises(EdgeDtmError, match=field):
        Thresholds.from_json({**LIMITS.to_json(), field: value})
    assert Thresholds.from_json(LIMITS.to_json()) == LIMITS


def test_write_manifest_is_all_or_nothing(folder: Path) -> None:
    before = contents(folder)
    for names in ([*FILES, "absent"], [*FILES, "../made/plan.json"], [*FILES, "plan.json"], [""]):
        with pytest.raises(EdgeDtmError):
            write_manifest(folder, names, LIMITS, {}, {})
    with pytest.raises(EdgeDtmError):
        write_manifest(folder, FILES, LIMITS, {"x": math.nan}, {})
    with pytest.raises(EdgeDtmError):
        write_manifest(folder, FILES, LIMITS, {"x": object()}, {})
    assert contents(folder) == before


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
    reader = zstandard.ZstdDecompressor().stream_reader((tmp_path / "a").open("rb"))
    with tarfile.open(fileobj=reader, mode="r|") as archive:
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


def refused(archive: Path, message: str) -> None:
    """It is refused, in one line, and nothing is left behind."""
    around = sorted(archive.parent.iterdir())
    with pytest.raises(EdgeDtmError, match=message) as caught:
        unpack(archive, archive.parent / "out")
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
    path.write_bytes(zstandard.ZstdCompressor().compress(huge.tobuf() + bytes(1024)))
    refused(path, "the limit is")
    tree = json.loads((folder / "manifest.json").read_text())
    tree["files"]["model.gguf"]["size_bytes"] = 2**60
    claim = regular("manifest.json", json.dumps(tree).encode())
    refused(write_archive(path, [claim, *members_of(folder)[1:]]), "make room")
    refused(write_archive(path, members_of(folder), bytes(2**22)), "behind its end")
    refused(write_archive(path, members_of(folder), b"x"), "behind its end")


def test_data_behind_the_frame_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.edge"
    pack(folder, path)
    path.write_bytes(path.read_bytes() + b"x")
    refused(path, "behind its end")


@pytest.mark.parametrize("level", [1, 19])
def test_every_truncation_is_refused(folder: Path, tmp_path: Path, level: int) -> None:
    whole = tmp_path / "whole.edge"
    pack(folder, whole, level)
    data = whole.read_bytes()
    path = tmp_path / "cut.edge"
    for length in {0, 1, 5, len(data) // 3, len(data) // 2, len(data) - 5, len(data) - 1}:
        path.write_bytes(data[:length])
        refused(path, "truncated|damaged")


def test_a_flipped_byte_in_the_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.edge"
    pack(folder, path)
    data = path.read_bytes()
    for place in range(0, len(data), max(len(data) // 40, 1)):
        changed = bytearray(data)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        # The frame's own descriptor has bits that nothing depends on.
        try:
            unpack(path, tmp_path / "out")
        except EdgeDtmError:
            assert not (tmp_path / "out").exists()
        else:
            assert contents(tmp_path / "out") == contents(folder)
            for item in (tmp_path / "out").iterdir():
                item.unlink()
            (tmp_path / "out").rmdir()


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
