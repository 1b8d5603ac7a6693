"""Temporary folders that a killed run cannot leave behind for good.

Whoever uses one holds a lock on it, which the kernel drops when the process dies. So the next run
can tell what was abandoned from what another process is still filling.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIX = ".edge-dtm"


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
