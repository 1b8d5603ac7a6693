"""Opens a checkpoint of any kind."""

from __future__ import annotations

from pathlib import Path

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, ModelConfig
from edge_dtm.host.checkpoint.gguf_checkpoint import GgufCheckpoint
from edge_dtm.host.checkpoint.hf_checkpoint import HfCheckpoint, read_config
from edge_dtm.host.checkpoint.weights import check_headers


def open_checkpoint(path: Path) -> Checkpoint:
    """An HF folder or a GGUF file. EdgeDtmError when it is neither, not supported or not whole."""
    if not path.exists():
        raise EdgeDtmError(f"{path} does not exist: give an HF checkpoint folder or a .gguf file")
    checkpoint = HfCheckpoint(path) if path.is_dir() else GgufCheckpoint(path)
    check_headers(checkpoint)
    return checkpoint


def open_config(path: Path) -> ModelConfig:
    """The shape alone: of a folder no more than config.json is needed."""
    return read_config(path) if path.is_dir() else open_checkpoint(path).config
