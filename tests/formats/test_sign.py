"""Signatures: the key that made them is known, and nothing else passes."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import signing
from edge_dtm.formats.signing import check_signature, load_private, load_trusted, sign_manifest

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
TRUSTED = {signing.key_id(KEY.public_key()): KEY.public_key()}
MANIFEST = b'{"kind": "edge-dtm bundle"}\n'
PEM = serialization.Encoding.PEM
PKCS8, NO_LOCK = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


def refused(signature: bytes | None, words: str, trusted: Any = None) -> None:
    with pytest.raises(EdgeDtmError, match=words) as caught:
        check_signature(MANIFEST, signature, trusted, "b.edge")
    assert str(caught.value).startswith("b.edge")
    assert "\n" not in str(caught.value)


def test_the_file_is_what_it_says() -> None:
    data = sign_manifest(MANIFEST, KEY)
    assert data == sign_manifest(MANIFEST, KEY), "deterministic"
    tree = json.loads(data)
    public = KEY.public_key().public_bytes_raw()
    assert tree["schema_version"] == 1
    assert tree["algorithm"] == "Ed25519"
    assert base64.b64decode(tree["public_key"]) == public
    assert tree["key_id"] == hashlib.sha256(public).hexdigest()[:16]
    # The message that was agreed on, signed independently of the module.
    KEY.public_key().verify(
        base64.b64decode(tree["signature"]), b"edge-dtm manifest v2\n" + MANIFEST
    )
    assert check_signature(MANIFEST, data, TRUSTED) == tree["key_id"]
    assert check_signature(MANIFEST, data) == tree["key_id"]


def test_what_does_not_pass() -> None:
    assert check_signature(MANIFEST, None) is None
    refused(None, "is not signed: ask its maker", TRUSTED)
    refused(None, "is not signed", {})
    by_other = sign_manifest(MANIFEST, OTHER)
    assert check_signature(MANIFEST, by_other) == signing.key_id(OTHER.public_key())
    refused(by_other, f"signed with the key {signing.key_id(OTHER.public_key())}", TRUSTED)
    for trusted in (None, TRUSTED):
        refused(sign_manifest(MANIFEST + b" ", KEY), "does not fit its manifest", trusted)
    # A signature of the bare manifest, without what says that it is one.
    tree = json.loads(sign_manifest(MANIFEST, KEY))
    tree["signature"] = base64.b64encode(KEY.sign(MANIFEST)).decode()
    refused(json.dumps(tree).encode(), "does not fit its manifest", TRUSTED)


def test_a_key_under_the_name_of_another() -> None:
    """Ids are short; what counts is the key itself."""
    refused(sign_manifest(MANIFEST, OTHER), "trusted are", {signing.key_id(OTHER.public_key()): KEY.public_key()})  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("signature", None),
        ("extra", 1),
        ("schema_version", 2),
        ("schema_version", True),
        ("algorithm", "none"),
        ("key_id", 5),
        ("key_id", signing.key_id(OTHER.public_key())),
        ("public_key", ""),
        ("public_key", base64.b64encode(bytes(31)).decode()),
        ("public_key", 7),
        ("signature", "é"),
        ("signature", base64.b64encode(bytes(65)).decode()),
        ("signature", "A" * 86 + "==\n"),
        ("signature", base64.b64encode(bytes(64)).decode()),
    ],
)
def test_malformed_files(field: str, value: Any) -> None:
    tree = json.loads(sign_manifest(MANIFEST, KEY))
    tree[field] = value
    if value is None:
        del tree[field]
    refused(json.dumps(tree).encode(), "its signature")


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b"[" * 4000, b"null"])
def test_no_signature_files(data: bytes) -> None:
    refused(data, "its signature file")


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_flipped_byte_never_changes_who_signed(place: int, flip: int) -> None:
    """White space and the like may change; then the same key has still signed the same bytes."""
    data = bytearray(sign_manifest(MANIFEST, KEY))
    data[place % len(data)] ^= flip
    try:
        found = check_signature(MANIFEST, bytes(data), TRUSTED)
    except EdgeDtmError:
        return
    assert found in TRUSTED
    assert json.loads(bytes(data)) == json.loads(sign_manifest(MANIFEST, KEY))


@settings(max_examples=100, deadline=None)
@given(manifest=st.binary(max_size=300), seed=st.binary(min_size=32, max_size=32))
def test_any_manifest_and_key(manifest: bytes, seed: bytes) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed)
    data = sign_manifest(manifest, key)
    assert check_signature(manifest, data, {signing.key_id(key.public_key()): key.public_key()})
    with pytest.raises(EdgeDtmError, match="does not fit"):
        check_signature(manifest + b"\0", data)


def test_keygen(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        identity = signing.generate(tmp_path / "a.b")
    finally:
        os.umask(mask)
    assert {p.name for p in tmp_path.iterdir()} == {"a.b.key", "a.b.pub"}
    assert (tmp_path / "a.b.key").stat().st_mode & 0o777 == 0o600
    trusted = load_trusted(tmp_path)
    assert list(trusted) == [identity]
    assert len(identity) == 16 and int(identity, 16) >= 0
    signature = sign_manifest(MANIFEST, load_private(tmp_path / "a.b.key"))
    assert check_signature(MANIFEST, signature, trusted) == identity


@pytest.mark.parametrize("existing", ["me.key", "me.pub"])
def test_keys_are_never_replaced(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(EdgeDtmError, match=f"{existing} exists already"):
        signing.generate(tmp_path / "me")
    (tmp_path / existing).unlink()
    (tmp_path / existing).symlink_to(tmp_path / "nowhere")
    with pytest.raises(EdgeDtmError, match="exists already"):
        signing.generate(tmp_path / "me")
    assert [p.name for p in tmp_path.iterdir()] == [existing]
    with pytest.raises(EdgeDtmError, match="cannot write"):
        signing.generate(tmp_path / "no" / "me")


def test_half_a_pair_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EdgeDtmError, match="No space"):
        signing.generate(tmp_path / "me")
    assert list(tmp_path.iterdir()) == []


def test_private_keys(tmp_path: Path) -> None:
    path = tmp_path / "k"
    for data, words in (
        (b"", "no private key"),
        (b"junk" * 100, "no private key"),
        (KEY.public_key().public_bytes(PEM, SPKI), "no private key"),
        (ec.generate_private_key(ec.SECP256R1()).private_bytes(PEM, PKCS8, NO_LOCK), "no Ed25519"),
        (
            KEY.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"x")),
            "without a passphrase",
        ),
    ):
        path.write_bytes(data)
        with pytest.raises(EdgeDtmError, match=words):
            load_private(path)
    with pytest.raises(EdgeDtmError, match="No such file"):
        load_private(tmp_path / "absent")
    with pytest.raises(EdgeDtmError, match="Is a directory"):
        load_private(tmp_path)


def test_trusted_keys(tmp_path: Path) -> None:
    with pytest.raises(EdgeDtmError, match="No such file"):
        load_trusted(tmp_path / "absent")
    with pytest.raises(EdgeDtmError, match="holds no trusted keys"):
        load_trusted(tmp_path)
    (tmp_path / "README").write_text("not a key")
    with pytest.raises(EdgeDtmError, match="holds no trusted keys"):
        load_trusted(tmp_path)
    for name, key in (("a.pub", KEY), ("b.pub", OTHER), ("again.pub", KEY)):
        (tmp_path / name).write_bytes(key.public_key().public_bytes(PEM, SPKI))
    assert {k: v.public_bytes_raw() for k, v in load_trusted(tmp_path).items()} == {
        signing.key_id(key.public_key()): key.public_key().public_bytes_raw()
        for key in (KEY, OTHER)
    }
    for data, words in (
        (KEY.private_bytes(PEM, PKCS8, NO_LOCK), "holds a private key"),
        (b"junk", "no public key"),
        (
            ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(PEM, SPKI),
            "no Ed25519",
        ),
    ):
        (tmp_path / "c.pub").write_bytes(data)
        with pytest.raises(EdgeDtmError, match=f"c.pub.*{words}"):
            load_trusted(tmp_path)
    (tmp_path / "c.pub").unlink()
    (tmp_path / "c.pub").mkdir()
    with pytest.raises(EdgeDtmError, match="cannot read the key .*c.pub"):
        load_trusted(tmp_path)


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_openssl_reads_and_checks_it(tmp_path: Path) -> None:
    """Keys and signatures are the standard's, so any other program can check them."""
    signing.generate(tmp_path / "me")
    manifest = random.Random(0).randbytes(1000)
    tree = json.loads(sign_manifest(manifest, load_private(tmp_path / "me.key")))
    (tmp_path / "signature").write_bytes(base64.b64decode(tree["signature"]))
    (tmp_path / "message").write_bytes(b"edge-dtm manifest v2\n" + manifest)
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", "me.pub",
               "-in", "message", "-sigfile", "signature"]  # fmt: skip
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    (tmp_path / "message").write_bytes(b"edge-dtm manifest v2\n" + manifest + b"x")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0
