"""Opens a checkpoint of any kind."""

from __future__ import annotations

from pathlib import Path

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.checkpoint import Checkpoint
from edge_dtm.host.checkpoint.gguf_checkpoint import GgufCheckpoint
from edge_dtm.host.checkpoint.hf_checkpoint import HfCheckpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """An HF folder or a GGUF file. EdgeDtmError when it is neither or not supported."""
    if path.is_dir():
        return HfCheckpoint(path)
    if path.is_file():
        return GgufCheckpoint(path)
    raise EdgeDtmError(f"{path} does not exist: give an HF checkpoint folder or a .gguf file")
