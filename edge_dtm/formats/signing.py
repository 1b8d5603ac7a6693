"""Who made a bundle: an Ed25519 signature (RFC 8032) over its manifest.

The manifest holds the hash of every file, so one small signature vouches for all of them. A
signature alone says only that the holder of some key made it; it means something where the public
key was known before, which is what the folder of trusted keys is for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_dtm.core import strict_json
from edge_dtm.core.errors import EdgeDtmError, os_errors
from edge_dtm.core.strict_json import check_version

SCHEMA_VERSION = 1
ALGORITHM = "Ed25519"
PRIVATE_SUFFIX, PUBLIC_SUFFIX = ".key", ".pub"
# What is signed begins with this, so that no signature made for another purpose fits a manifest.
_DOMAIN = b"edge-dtm manifest v2\n"
_KEY_FILE_LIMIT_BYTES = 64 * 2**10

Trusted = Mapping[str, Ed25519PublicKey]


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def generate(name: Path) -> str:
    """Make a key pair, NAME.key (readable by its owner only) and NAME.pub; returns the key id.

    EdgeDtmError when either file exists or cannot be written; then neither is left behind.
    """
    key = Ed25519PrivateKey.generate()
    private, public = (
        name.with_name(name.name + suffix) for suffix in (PRIVATE_SUFFIX, PUBLIC_SUFFIX)
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _write_new(private, pem, 0o600)
    pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    try:
        _write_new(public, pem, 0o644)
    except BaseException:
        private.unlink()
        raise
    return key_id(key.public_key())


def load_private(path: Path) -> Ed25519PrivateKey:
    """EdgeDtmError unless path is an Ed25519 private key in PEM without a passphrase."""
    data = _read_key(path)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm):  # TypeError: it has a passphrase
        raise EdgeDtmError(
            f"{path} is no private key without a passphrase: give the .key file that edge-dtm "
            "keygen made"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise EdgeDtmError(f"{path} is no {ALGORITHM} key: make one with edge-dtm keygen")
    return key


def load_trusted(folder: str | Path) -> dict[str, Ed25519PublicKey]:
    """Key id -> public key, of every *.pub file in folder.

    EdgeDtmError when there is none, when one cannot be read, and when one is a private key, which
    does not belong on a device.
    """
    with os_errors(f"cannot read the trusted keys in {folder}"):
        paths = sorted(p for p in Path(folder).iterdir() if p.name.endswith(PUBLIC_SUFFIX))
    if not paths:
        raise EdgeDtmError(
            f"{folder} holds no trusted keys: put the .pub files of those you trust there"
        )
    keys = [_load_public(path) for path in paths]
    return {key_id(key): key for key in keys}


def sign_manifest(manifest: bytes, key: Ed25519PrivateKey) -> bytes:
    """The contents of manifest.sig for these exact bytes; the same input gives the same output."""
    tree = _tree(key.public_key(), key.sign(_DOMAIN + manifest))
    return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()


def _tree(public: Ed25519PublicKey, signature: bytes) -> dict[str, Any]:
    """What the signature file holds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "algorithm": ALGORITHM,
        "key_id": key_id(public),
        "public_key": base64.b64encode(public.public_bytes_raw()).decode(),
        "signature": base64.b64encode(signature).decode(),
    }


def check_signature(
    manifest: bytes,
    signature: bytes | None,
    trusted: Trusted | None = None,
    source: str | Path = "the bundle",
) -> str | None:
    """The id of the key that signed these bytes, None when signature and trusted are both None.

    manifest, signature: the contents of the two files. trusted: what `load_trusted` gave; None
    asks only that a signature fits its manifest, whoever made it. EdgeDtmError, naming source,
    for a missing signature where trusted is given, an unknown key, a signature that does not fit,
    and a file that holds no signature.
    """
    if signature is None:
        if trusted is None:
            return None
        raise EdgeDtmError(
            f"{source} is not signed: ask its maker for one packed with --sign, or leave out the "
            f"trusted keys if you know where it comes from"
        )
    public, raw = _parse(signature, source)
    named = key_id(public)
    if trusted is not None and trusted.get(named) != public:
        raise EdgeDtmError(
            f"{source} is signed with the key {named}, trusted are {', '.join(sorted(trusted))}: "
            f"do not use it, unless you know whose key that is and add its .pub file"
        )
    try:
        public.verify(raw, _DOMAIN + manifest)
    except InvalidSignature:
        raise EdgeDtmError(
            f"{source}: its signature does not fit its manifest; do not use it, get it again"
        ) from None
    return named


def _parse(data: bytes, source: str | Path) -> tuple[Ed25519PublicKey, bytes]:
    """Public key and raw signature of a signature file, which is as sign_manifest writes it."""
    source = f"{source}: its signature file"
    try:
        tree = strict_json.loads(data)
        check_version(tree, SCHEMA_VERSION, source)
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(tree["public_key"]))
        signature = base64.b64decode(tree["signature"])
    except (KeyError, TypeError, ValueError):
        tree = None
    if tree is None or tree != _tree(public, signature):
        raise EdgeDtmError(f"{source} holds no {ALGORITHM} key and signature; get it again")
    return public, signature


def _load_public(path: Path) -> Ed25519PublicKey:
    data = _read_key(path)
    if b"PRIVATE KEY" in data:
        raise EdgeDtmError(
            f"{path} holds a private key: take it away, only the .pub file that keygen made "
            f"belongs there"
        )
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise EdgeDtmError(f"{path} is no public key: remove it or copy it again") from None
    if not isinstance(key, Ed25519PublicKey):
        raise EdgeDtmError(f"{path} is no {ALGORITHM} key: remove it")
    return key


def _read_key(path: Path) -> bytes:
    with os_errors(f"cannot read the key {path}"), path.open("rb") as file:
        return file.read(_KEY_FILE_LIMIT_BYTES)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is not there yet; half of it never stays, on a full disk or Ctrl-C."""
    if os.path.lexists(path):
        raise EdgeDtmError(f"{path} exists already: give another name, keys are not replaced")
    with os_errors(f"cannot write {path}"):
        # The rights from the start: a file that is made narrower later can be opened before.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise
