"""The kinds of file that a device reads: how a broken one is made, and what the device does with it."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fixtures import tiny_bundle

from break_it import containers, mutations
from edge_dtm.core import strict_json
from edge_dtm.core.metrics import compare
from edge_dtm.formats import archive, bundle, signing
from edge_dtm.formats.plan import Plan
from edge_dtm.formats.profile import load_profile, profiles_dir
from edge_dtm.formats.record import Record, RunSettings
from edge_dtm.formats.reference import HELD_OUT, Reference
from edge_dtm.formats.verdict_file import device_name, read_verdict
from edge_dtm.llamacpp import gguf_header
from edge_dtm.llamacpp.ggml import zero_shares
from edge_dtm.llamacpp.gguf_header import check_gguf
from edge_dtm.llamacpp.schedule import calls, context_needed, replay_tokens
from edge_dtm.search.budget import byte_budget

DISK_LIMIT_BYTES = 128 * 2**20
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


def _written(data: bytes, folder: Path) -> Path:
    path = folder / "input"
    path.write_bytes(data)
    return path


def read_manifest(data: bytes, folder: Path) -> None:
    found = bundle.Manifest.parse(data, "manifest.json")
    found.model_dump_json()
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
    plan = Plan.from_json(strict_json.read(_written(data, folder)))
    assert plan.size_bytes >= 0 and plan.hash and plan.zero_share >= 0
    plan.type_counts()


def read_profile(data: bytes, folder: Path) -> None:
    path = folder / "input.toml"
    path.write_bytes(data)
    try:
        profile = load_profile(str(path))
        byte_budget(
            profile,
            kv_bytes_per_token=1000,
            compute_buffer_bytes=1000,
            f16_file_bytes=10**8,
            n_ctx=profile.n_ctx,
        )
    finally:
        path.unlink()


def read_gguf(data: bytes, folder: Path) -> None:
    check_gguf(_written(data, folder))


def read_gguf_again(data: bytes, folder: Path) -> None:
    """What else reads the head of a file that check_gguf let through: verify and inspect."""
    path = _written(data, folder)
    check_gguf(path)
    gguf_header.need(path, tiny_bundle.SETTINGS, 64)
    zero_shares(path)


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
        return mutations.mutate_bytes(source, data, seeds)
    return mutations.random_bytes(source, data[:8])


def _gguf_fields(source: random.Random, data: bytes) -> bytes:
    """A number of the head, at its limit; the head is nearly all that the file is."""
    out = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2))):
        width = source.choice((4, 4, 8))
        at = source.randrange(8, 2200)
        number = source.choice(mutations.INTEGERS) % 2 ** (8 * width)
        out[at : at + width] = number.to_bytes(width, "little")
    return bytes(out)


def _npz(source: random.Random, data: bytes) -> bytes:
    return containers.mutate_npz(source, containers.read_npz(data))


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
    return mutations.mutate_bytes(s, data) if s.random() < 0.5 else data


@cache
def _npz_bombs(data: bytes) -> list[bytes]:
    """Much from little: honest about its size, silent about it, and with a long list of names."""
    members = containers.read_npz(data)
    zeros = bytes(BOMB_BYTES)
    honest = members | {"top_ids.npy": containers.npy(f"({BOMB_BYTES // 4},)", "'<i4'", zeros)}
    silent = members | {"top_ids.npy": containers.npy("(2, 4, 8)", "'<i4'", zeros)}
    bombs = [containers.write_npz(list(b.items())) for b in (honest, silent)]
    # The size in the table of contents says less than there is.
    told = struct.pack("<I", len(containers.npy("(2, 4, 8)", "'<i4'", zeros)))
    bombs += [bombs[1].replace(told, struct.pack("<I", n)) for n in (384, 2**32 - 1)]
    names = [(f"{i}.npy", b"") for i in range(3000)]
    return [*bombs, containers.write_npz([*members.items(), *names])]


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
    members = [containers.member(bundle.MANIFEST, manifest)]
    members += [containers.member(n, (folder / n).read_bytes()) for n in sorted(tiny_bundle.FILES)]
    signed = [members[0], containers.member(bundle.SIGNATURE, signature), *members[1:]]
    packed = [
        containers.frame(containers.tar(members)),
        containers.frame(containers.tar(signed), 10),
    ]

    @cache
    def bombs() -> list[bytes]:
        zeros = bytes(BOMB_BYTES)
        bomb = containers.member("model.gguf", zeros)
        tree = json.loads(manifest)
        tree["files"]["model.gguf"]["size_bytes"] = BOMB_BYTES
        claimed = containers.member(bundle.MANIFEST, json.dumps(tree).encode())
        tars = (
            containers.tar([members[0], bomb]),
            containers.tar(members, zeros),
            containers.tar([claimed, bomb]),
            zeros,
        )
        return [containers.frame(data) for data in tars]

    verdict = json.dumps(tiny_bundle.verdict().to_json()).encode()
    profile = (profiles_dir() / "raspberrypi.toml").read_bytes()
    ggufs = [contents["model.gguf"], contents["other.gguf"]]
    references = [contents["reference.npz"], contents["one.npz"]]

    def npz(seeds: Sequence[bytes]) -> Callable[[random.Random], bytes]:
        return partial(_rarely, partial(_npz_bombs, seeds[0]), 0.002, partial(_spoilt, seeds, _npz))

    def both(source: random.Random) -> bytes:
        """A manifest and its signature, by the trusted key when it is the manifest that is bad."""
        if source.random() < 0.5:
            first = mutations.mutate_json(source, manifest)
            second = signing.sign_manifest(first, KEY)
        else:
            first, second = manifest, mutations.mutate_bytes(source, signature)
        return struct.pack("<I", len(first)) + first + second

    def archived(source: random.Random) -> bytes:
        kind = source.random()
        if kind < 0.3:
            return _spoilt(packed, lambda s, d: mutations.mutate_bytes(s, d, packed), source)
        chosen = source.choice((members, signed))
        if kind < 0.4:
            return containers.seal_frame(
                mutations.mutate_bytes(source, source.choice(packed)[:-40], packed)
            )
        if kind < 0.6:
            return containers.frame(mutations.mutate_bytes(source, containers.tar(chosen)))
        changed = containers.mutate_members(
            source, chosen, lambda data: mutations.mutate_json(source, data)
        )
        return containers.frame(containers.tar(changed))

    return [
        Target(
            "manifest.json", partial(_spoilt, [manifest], mutations.mutate_json), read_manifest, 22
        ),
        Target(
            "manifest.sig",
            partial(_spoilt, [signature], mutations.mutate_json),
            partial(read_signature, manifest=manifest),
            12,
        ),
        Target("bundle folder", both, partial(read_folder, files=folder), 6),
        Target("packed archive", partial(_rarely, bombs, 0.002, archived), read_archive, 12),
        Target("reference.npz", npz(references), read_reference, 10),
        Target("host.npz", npz([contents["host.npz"], contents["reference.npz"]]), read_record, 8),
        Target("plan.json", partial(_spoilt, [plan], mutations.mutate_json), read_plan, 8),
        Target("profile.toml", partial(_spoilt, [profile], mutations.mutate_toml), read_profile, 8),
        Target("model.gguf, checked", partial(_spoilt, ggufs, _gguf_fields), read_gguf, 10),
        Target("model.gguf, used", partial(_spoilt, ggufs, _gguf_fields), read_gguf_again, 4),
        Target(
            "verdict.json", partial(_spoilt, [verdict], mutations.mutate_json), read_verdict_file, 8
        ),
    ]


def _small_gguf(path: Path, type_name: str = "Q4_0") -> None:
    tiny_bundle.write_gguf(
        path, hidden=32, layers=1, ffn=32, matrix_type=type_name, whole_vocabulary=False
    )
