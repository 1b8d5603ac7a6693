"""Files that are there whole or not at all, what they depend on, and where they are kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_dtm.core.errors import EdgeDtmError, os_errors

Advance = Callable[[int], None]  # the amount done since the last call
StageProgress = Callable[[str, int], Advance]  # stage, its amount in all

CACHE_VARIABLE = "EDGE_DTM_CACHE"


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


def cache_dir() -> Path:
    """The folder named by EDGE_DTM_CACHE, else ``~/.cache/edge-dtm``; it need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "edge-dtm"


def default_model_dir() -> Path:
    """The Hugging Face folder used where no model is named; tools/make_smollm2.py makes it."""
    return cache_dir() / "smollm2-135m-instruct"
