"""Files made to harm are refused in one line, with little time, memory and disk; and the tool that
tries it in large numbers notices what it is there to notice."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from break_it import containers, fuzz, targets
from fixtures import tiny_bundle
from hypothesis import given
from hypothesis import strategies as st

from edge_dtm.core import strict_json
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.record import Record
from edge_dtm.formats.reference import Reference, load_imatrix, load_npz, save_npz

ROOT = Path(__file__).resolve().parents[2]


def test_some_thousand_hostile_files(tmp_path: Path) -> None:
    words = ["fuzz", "--inputs", "3000", "--seed", "1", "--out", tmp_path]
    program = [sys.executable, ROOT / "tools/break_it", *words]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = re.findall(r"^\| (.+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| 0 \|", done.stdout, re.M)
    assert len(rows) == 12
    for name, *counts in rows:
        inputs, accepted, refused = (int(c.replace(",", "")) for c in counts)
        assert inputs == accepted + refused
        assert accepted and refused, f"{name}: only one of both is tried"
    assert int(rows[-1][1].replace(",", "")) >= 3000
    assert not list(tmp_path.iterdir())


def _target(read: Callable[[bytes, Path], object]) -> Any:
    return targets.Target("one", lambda source: source.randbytes(4), read, 1)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda data, folder: data[10], "IndexError in tests/commands/test_hostile.py:"),
        (lambda data, folder: bytearray(2**31), "MemoryError in tests/commands/test_hostile.py:"),
        (lambda data, folder: (folder / "x").write_bytes(data), "accepted, but x left behind"),
        (lambda data, folder: (folder / "x").mkdir(), "accepted, but x left behind"),
        (lambda data, folder: _raise(EdgeDtmError("a" * 9999)), None),
        (lambda data, folder: os.kill(os.getpid(), signal.SIGSEGV), "died of SIGSEGV"),
        (lambda data, folder: os._exit(9), "ended the process with status 9"),
        (lambda data, folder: _loop(), "took more than 0.2 s of CPU time"),
    ],
)
def test_what_the_tool_notices(
    tmp_path: Path, read: Callable[[bytes, Path], object], words: str | None
) -> None:
    """Each of these is met by the second of three inputs; the others are accepted."""
    second = fuzz.input_bytes(_target(read), 0, 1)

    def sometimes(data: bytes, folder: Path) -> object:
        return read(data, folder) if data == second else None

    result = fuzz.run(_target(sometimes), 3, 0, tmp_path, cpu_limit_s=0.2)
    if words is None:
        # EdgeDtmError shortens its message itself.
        assert (result.accepted, result.refused) == (2, 1)
        return
    assert result.accepted == 2
    ((index, kind, _),) = result.findings
    assert index == 1
    assert kind.startswith(words)
    assert not list(tmp_path.iterdir())


def _loop() -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize("words", ["a\nb", "\x1b[2J", "a" * (fuzz.MESSAGE_LIMIT + 1)])
def test_a_message_is_one_printable_line(tmp_path: Path, words: str) -> None:
    error = EdgeDtmError("")
    error.args = (words,)
    result = fuzz.run(_target(lambda data, folder: _raise(error)), 1, 0, tmp_path)
    assert [kind.startswith("a message") for _, kind, _ in result.findings] == [True]


def test_an_error_quotes_a_file_without_obeying_it() -> None:
    error = str(EdgeDtmError("the name \x1b[31m\n\u202e\ud800 of é" + "x" * 5000 + ": do this"))
    assert error.isprintable() and len(error) <= 1000
    assert error.startswith(r"the name \x1b[31m\n\u202e\ud800 of é") and error.endswith("do this")


def test_findings_are_written_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = _target(lambda data, folder: _raise(ValueError(f"{len(data)} bytes")))
    monkeypatch.setattr(fuzz, "targets", lambda work: [broken])
    assert fuzz.run_all(5, 0, tmp_path) == 1
    assert "| one | 5 | 0 | 0 | 5 |" in capsys.readouterr().out
    written = sorted(tmp_path.iterdir())
    assert len(written) == fuzz.EXAMPLES
    assert fuzz.replay(written[0]) == 1
    assert "ValueError" in capsys.readouterr().out


# --- npz files -------------------------------------------------------------------------------


@pytest.fixture
def members(tmp_path: Path) -> dict[str, bytes]:
    """Of a valid reference."""
    tiny_bundle.made_up()[0].save(tmp_path / "r.npz")
    return containers.read_npz((tmp_path / "r.npz").read_bytes())  # type: ignore[no-any-return]


def _refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(data)
    with pytest.raises(EdgeDtmError, match=words) as caught:
        Reference.load(path)
    assert str(caught.value).isprintable()


def _floats(last: float) -> bytes:
    return np.array([*np.zeros(63), last], np.float32).tobytes()


def test_what_save_wrote_is_read(members: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "again.npz"
    path.write_bytes(containers.write_npz(list(members.items())))
    found, wanted = Reference.load(path), tiny_bundle.made_up()[0]
    np.testing.assert_array_equal(found.top_logits, wanted.top_logits)
    assert list(found.texts) == list(wanted.texts)
    found.top_ids[0, 0, 0] = 5  # they are the caller's own


@pytest.mark.parametrize(
    ("name", "shape", "descr", "data", "words"),
    [
        ("top_ids", "(1000000000000,)", "'<i4'", b"", "no readable|wrong types"),
        ("top_ids", "(2, 4, 8)", "'<i8'", bytes(512), "wrong types of top_ids"),
        ("top_ids", "(2, 4, 8)", "'>i4'", bytes(256), "no readable|wrong types|shapes do"),
        ("top_ids", "(32,)", "'|O'", bytes(256), "no readable|wrong types|shapes do"),
        ("top_ids", "(32,)", "[('a', '<i8')]", bytes(256), "no readable|wrong types|shapes do"),
        ("top_ids", "(9223372036854775807,)", "'|V0'", b"", "no readable|wrong types"),
        ("top_ids", "(-1, -64)", "'<i4'", bytes(256), "no readable|wrong types|shapes do"),
        ("top_ids", "(True, 64)", "'<i4'", bytes(256), "no readable|wrong types|shapes do"),
        ("top_ids", "(4294967296, 4294967296)", "'<i4'", b"", "no readable|wrong types"),
        ("top_ids", "(64,)", "'<i4'", bytes(256), "shapes do not fit"),
        ("top_ids", "(2, 4, 8)", "'<i4'", bytes(255), "no readable|wrong types"),
        ("top_ids", "(2, 4, 8)", "__import__('os')", bytes(256), "head of top_ids cannot be read"),
        ("top_ids", "(" * 200 + ")" * 200, "'<i4'", b"", "head of top_ids cannot be read"),
        ("texts", "(2,)", "'<U1'", struct.pack("<II", 65, 0x110000), "what is no character"),
        ("texts", "(2,)", "'<U1'", struct.pack("<II", 65, 0xDFFF), "what is no character"),
        ("top_logits", "(2, 4, 8)", "'<f4'", _floats(np.nan), "numbers that are not"),
        ("top_logits", "(2, 4, 8)", "'<f4'", _floats(-np.inf), "numbers that are not"),
    ],
)
def test_arrays_that_lie(
    members: dict[str, bytes],
    tmp_path: Path,
    name: str,
    shape: str,
    descr: str,
    data: bytes,
    words: str,
) -> None:
    members[f"{name}.npy"] = containers.npy(shape, descr, data)
    _refused(tmp_path, containers.write_npz(list(members.items())), words)


def test_bombs(members: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before they unfold: by what they say, and by what they do not say."""
    from edge_dtm.formats import reference

    monkeypatch.setattr(reference, "ARRAYS_LIMIT_BYTES", 10**5)
    zeros = bytes(2**20)
    members["top_ids.npy"] = containers.npy("(262144,)", "'<i4'", zeros)
    data = containers.write_npz(list(members.items()))
    _refused(tmp_path, data, "unpacks to .* bytes, the limit is 100000")
    told = struct.pack("<I", len(members["top_ids.npy"]))
    assert data.count(told) == 2, "in the member's head and in the table of contents"
    _refused(tmp_path, data.replace(told, struct.pack("<I", 384)), "no readable")
    members["top_ids.npy"] = containers.npy("(2, 4, 8)", "'<i4'", bytes(256))
    for how in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        _refused(tmp_path, containers.write_npz(list(members.items()), how), "packed in a way")
    many = [(f"{i:05}.npy", b"") for i in range(20_000)]
    _refused(
        tmp_path, containers.write_npz([*members.items(), *many]), "table of contents is too long"
    )


def test_tables_of_contents_elsewhere(members: dict[str, bytes], tmp_path: Path) -> None:
    data = containers.write_npz(list(members.items()))
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive:
        archive.comment = b"PK"
    for spoilt in (out.getvalue(), data + b"x", data[:-1], data[:10], b"", b"PK\5\6" + bytes(18)):
        _refused(tmp_path, spoilt, "is no readable reference file")
    # A record that has the sizes in 64 bits, which zipfile would believe.
    located = data[:-22] + b"PK\6\7" + bytes(16) + data[-22:]
    _refused(tmp_path, located, "was not written by edge-dtm")


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": np.array([4, 9], np.int32)},
        {"lengths": np.array([4, -1], np.int32)},
        {"ids": np.zeros((2, 4), np.float32)},
        {"top_logits": np.full((2, 4, 8), np.nan, np.float32)},
        {"reference_log_probabilities": np.zeros((2, 4), np.int32)},
        {"prefill_tokens_per_s": [1]},
        {"settings": 5},
        {"mode": "x" * 5000},
    ],
)
def test_records(tmp_path: Path, changes: dict[str, Any]) -> None:
    record = tiny_bundle.made_up()[1]
    record.save(tmp_path / "host.npz")
    arrays, head = load_npz(
        tmp_path / "host.npz", [n for n in vars(record) if isinstance(getattr(record, n), np.ndarray)],
        "record",
    )  # fmt: skip
    for name, value in changes.items():
        (arrays if name in arrays else head)[name] = value
    save_npz(tmp_path / "bad.npz", arrays, head)
    with pytest.raises(EdgeDtmError, match="record file|is wrong"):
        Record.load(tmp_path / "bad.npz")


def test_a_head_without_names(tmp_path: Path) -> None:
    good = {"kind": "imatrix", "names": ["a"], "tokens": 5}
    for names in ("a", [1], None):
        save_npz(tmp_path / "i.npz", {"a": np.ones(3, np.float32)}, good | {"names": names})
        with pytest.raises(EdgeDtmError, match="is wrong: "):
            load_imatrix(tmp_path / "i.npz")


@pytest.mark.parametrize("version", [1.0, True, "1", 2])
def test_a_schema_version_is_a_whole_number(tmp_path: Path, version: Any) -> None:
    save_npz(tmp_path / "a.npz", {}, {"kind": "margins", "schema_version": version})
    with pytest.raises(EdgeDtmError, match="has schema version"):
        load_npz(tmp_path / "a.npz", [], "margins")


# --- JSON ------------------------------------------------------------------------------------

_TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), children, max_size=4)
    ),
    max_leaves=20,
)


@given(_TREES, st.booleans())
def test_plain_json_is_read_as_ever(tree: Any, ascii_only: bool) -> None:
    data = json.dumps(tree, ensure_ascii=ascii_only).encode()
    assert strict_json.loads(data) == tree
    assert strict_json.loads(strict_json.dumps(tree).encode()) == tree


def test_what_is_not_finite_is_written_as_null() -> None:
    tree = {"b": (math.inf, -math.inf, 1.5), "a": {"c": math.nan, "d": [True, None, "NaN", 2]}}
    text = strict_json.dumps(tree)
    assert strict_json.loads(text.encode()) == {
        "a": {"c": None, "d": [True, None, "NaN", 2]}, "b": [None, None, 1.5]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[-Infinity]", "invalid number"),
        (b"[-1e400]", "too large"),
        (b"9" * 100_000, "out of range"),
        (b"9" * 20, "too large"),
        (b"[" * 33 + b"]" * 33, "nested too deeply"),
        (b"[" * 10**5, "recursion limit"),
        (b'{"a":' * 40 + b"0" + b"}" * 40, "nested too deeply"),
        (rb'["\ud800"]', "hex escape"),
        (rb'{"\udfff": 1}', "surrogate"),
        (b"\xff", "expected value"),
        (b"\xef\xbb\xbf{}", "expected value"),
        (b"", "EOF"),
        (b"{}x", "trailing"),
    ],
)
def test_json_that_surprises_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        strict_json.loads(data)
    assert len(str(caught.value)) < 200
