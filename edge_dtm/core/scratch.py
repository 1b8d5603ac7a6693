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
from pathlib import Path

_SUFFIX = ".edge-dtm"


class Scratch:
    """A new folder, hidden in parent and readable by its owner only; a context manager.

    name: says what it is for, such as the name of the file to be made. Folders that killed runs
    left in parent under the same name are removed first, if they are the user's own. OSError when
    parent cannot be written.
    """

    def __init__(self, name: str, parent: Path) -> None:
        _remove_abandoned(name, parent)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=_SUFFIX, dir=parent))
            try:
                lock = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # another run took it for abandoned, before it was locked
            # None: a file system without locks.
            if _lock(lock) is not False and self.path.exists():
                self._lock: int | None = lock
                return
            os.close(lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder with all that is in it; a second call does nothing."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


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
