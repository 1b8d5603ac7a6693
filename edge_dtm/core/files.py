"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from edge_dtm.core.errors import EdgeDtmError


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name until complete. EdgeDtmError when the disk is full."""
    # Hidden: a bundle with half a file in it would not be as it was made.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EdgeDtmError(
            f"{path} could not be written ({error.strerror or error}): free some space"
        ) from None
