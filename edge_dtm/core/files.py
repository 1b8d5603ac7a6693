"""Files that are there whole or not at all, what they depend on, and where they are kept.

A temporary folder is locked by whoever uses it, and the kernel drops the lock when the process
dies: so the next run can tell what was abandoned from what another process is still filling.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_dtm.core.errors import EdgeDtmError, os_errors

Advance = Callable[[int], None]  # the amount done since the last call
StageProgress = Callable[[str, int], Advance]  # stage, its amount in all

CACHE_VARIABLE = "EDGE_DTM_CACHE"
_SUFFIX = ".edge-dtm"


def no_progress(stage: str, total: int) -> Advance:
    """A StageProgress that shows nothing."""
    return lambda amount: None


def digest_of(data: Any) -> str:
    """16 hex digits of the SHA-256 of the data's canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def read_within(path: Path, limit_bytes: int) -> bytes:
    """EdgeDtmError when the file cannot be read or is larger."""
    with os_errors(f"cannot read {path}"), path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise EdgeDtmError(f"{path} is above {limit_bytes} bytes: it is none of ours")
    return data


def write_synced(path: Path, data: bytes, mode: str = "wb") -> None:
    """Write and wait until the disk has it. OSError when it cannot; mode: "xb" for a new file."""
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name until complete. EdgeDtmError when the disk is full."""
    # Hidden: a bundle with half a file in it would not be as it was made.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with os_errors(f"cannot write {path}"):
            write_synced(temporary, data)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def scratch_folder(name: str = "edge-dtm", parent: Path | None = None) -> Iterator[Path]:
    """A new folder, hidden in parent (the temporary folder where there is none) and readable by
    its owner only, removed at the end with all that is in it.

    name: says what it is for, such as the name of the file to be made. Folders that killed runs
    left in parent under the same name are removed first, if they are the user's own. OSError when
    parent cannot be written.
    """
    parent = parent or Path(tempfile.gettempdir())
    _remove_abandoned(name, parent)
    while True:
        path = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=_SUFFIX, dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another run took it for abandoned, before it was locked
        # None: a file system without locks.
        if _lock(lock) is not False and path.exists():
            break
        os.close(lock)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_abandoned(name: str, parent: Path) -> None:
    # Eight characters of mkdtemp; a name alone would also fit a folder that someone made by hand.
    ours = re.compile(re.escape(f".{name}.") + r"[a-z0-9_]{8}" + re.escape(_SUFFIX))
    for path in [item for item in parent.iterdir() if ours.fullmatch(item.name)]:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone by now, or no folder, or not ours
        try:
            if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def cache_dir() -> Path:
    """The folder named by EDGE_DTM_CACHE, else ``~/.cache/edge-dtm``; it need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "edge-dtm"


def default_model_dir() -> Path:
    """The Hugging Face folder used where no model is named; tools/make_smollm2.py makes it."""
    return cache_dir() / "smollm2-135m-instruct"
