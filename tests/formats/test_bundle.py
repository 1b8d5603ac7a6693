"""Bundles: what is changed, missing or slipped in is found."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from fixtures.bundle_folder import FILES, contents, make_folder
from fixtures.tiny_bundle import THRESHOLDS

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import bundle as bundles
from edge_dtm.formats.archive import open_bundle
from edge_dtm.formats.bundle import write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "made")


def test_a_whole_bundle_passes(folder: Path) -> None:
    hashed: list[int] = []
    with open_bundle(folder) as bundle:
        bundle.check(hashed.append)
        assert bundle.manifest.thresholds == THRESHOLDS
        assert bundle.manifest.provenance == {"model": "m"}
        assert bundle.manifest.measured == {"sdt": 0.01}
        assert bundle.path("model.gguf").read_bytes() == (folder / "model.gguf").read_bytes()
        assert sum(hashed) == bundle.size_bytes
        with pytest.raises(EdgeDtmError, match="lists no"):
            bundle.path("../secret")


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


def test_what_edge_dtm_makes_of_a_bundle_may_lie_in_it(folder: Path) -> None:
    for name in ("report.html", "frontier.png"):
        (folder / name).write_text("not listed")
    open_bundle(folder).check()
    (folder / "report.htm").write_text("not ours")
    with pytest.raises(EdgeDtmError, match=r"made: report\.htm is not listed; copy"):
        open_bundle(folder).check()


def test_a_manifest_without_the_model_is_found(folder: Path) -> None:
    write_manifest(folder, [*FILES[2:3], *FILES[4:]], THRESHOLDS, {}, {})
    with pytest.raises(
        EdgeDtmError,
        match=r"model.gguf is not listed; host.npz is not listed; probe.npz is not listed",
    ):
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
        ("kind", "holiday pictures", "holds no edge-dtm bundle"),
        ("schema_version", 1, "schema version 1"),
        ("schema_version", 3, "schema version 3"),
        ("schema_version", True, "schema version True"),
        ("files", [], "files: should be"),
        ("files/model.gguf/sha256", "A" * 64, r'files."model.gguf".sha256: is'),
        ("files/model.gguf/size_bytes", -1, r'files."model.gguf".size_bytes: is -1'),
        ("files/model.gguf/size_bytes", True, r'files."model.gguf".size_bytes: is True'),
        ("files/model.gguf", None, "model.gguf is not listed"),
        ("files/..", {"sha256": "0" * 64, "size_bytes": 1}, "not a plain file name"),
        ("files/manifest.json", {"sha256": "0" * 64, "size_bytes": 1}, "not a plain file name"),
        ("files/manifest.sig", {"sha256": "0" * 64, "size_bytes": 1}, "not a plain file name"),
        ("files/Model.gguf", {"sha256": "0" * 64, "size_bytes": 1}, "comes twice"),
        ("thresholds/max_sdt", None, "thresholds.max_sdt: is missing"),
        ("thresholds/max_sdt", "0.1", "thresholds.max_sdt: is '0.1'"),
        ("thresholds/max_sdt", 1.5, "thresholds.max_sdt: is 1.5"),
        ("thresholds/max_kl_probe", -0.1, "thresholds.max_kl_probe: is -0.1"),
        ("thresholds/min_fdt", math.nan, "is no JSON"),
        ("thresholds/colour", 1, "thresholds.colour: is unknown"),
        ("provenance", None, "provenance: is missing"),
        ("measured", [], "measured: should be"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, path: str, value: Any, message: str) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    change(tree, path, value)
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(EdgeDtmError, match=message):
        open_bundle(folder).check()


def test_every_offence_is_in_one_line(folder: Path) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    for path, value in (
        ("files/a\nb", {"sha256": "0" * 64, "size_bytes": 1.0}),
        ("thresholds/max_sdt", 2),
        ("measured", None),
    ):
        change(tree, path, value)
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(EdgeDtmError) as error:
        open_bundle(folder)
    text = str(error.value)
    assert text.startswith(str(folder)) and text.endswith("copy the bundle again")
    for place in (r'files."a\nb".size_bytes: ', "thresholds.max_sdt: ", "measured: "):
        assert place in text
    assert text.isprintable()


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff\xfe", b"[]", b"{}"])
def test_a_manifest_that_is_none_is_refused(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(EdgeDtmError, match=r"is no JSON|holds no edge-dtm bundle"):
        open_bundle(folder)


def test_write_manifest_is_all_or_nothing(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(EdgeDtmError, match="No such file"):
        write_manifest(folder, [*FILES, "absent"], THRESHOLDS, {}, {})
    with pytest.raises(ValueError, match="JSON"):
        write_manifest(folder, FILES, THRESHOLDS, {"x": math.nan}, {})
    assert contents(folder) == before


def test_a_full_disk_leaves_the_old_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "manifest.sig").write_bytes(b"signature")
    before = contents(folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(EdgeDtmError, match="No space left on device"):
            write_manifest(folder, FILES, THRESHOLDS, {"another": 1}, {})
    assert contents(folder) == before
    # A new manifest takes the old signature away.
    write_manifest(folder, FILES, THRESHOLDS, {"another": 1}, {})
    assert not (folder / "manifest.sig").exists()


def test_limits_of_the_manifest(folder: Path) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    entry = {"sha256": "0" * 64, "size_bytes": 1}
    room = bundles.FILES_LIMIT - len(FILES)
    for number, message in ((room, "f0 is missing"), (room + 1, "files: .* at most 256")):
        many = {**tree["files"], **{f"f{i}": entry for i in range(number)}}
        (folder / "manifest.json").write_text(json.dumps({**tree, "files": many}))
        with pytest.raises(EdgeDtmError, match=message):
            open_bundle(folder).check()
    (folder / "manifest.json").write_bytes(b" " * (bundles.MANIFEST_LIMIT_BYTES + 1))
    with pytest.raises(EdgeDtmError, match="above 16777216 bytes"):
        open_bundle(folder)
