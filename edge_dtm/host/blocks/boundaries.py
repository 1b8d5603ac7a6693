"""What stands between two blocks, as files: the residual stream and the margins' gradients there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from edge_dtm.core.errors import EdgeDtmError

Kind = Literal["hidden", "gradient"]


class Boundaries:
    """A folder of boundary files; number l stands before block l, number L behind the last.

    hidden: (tokens, hidden); gradient: (tokens + measured_tokens, hidden), the first random signs
    of all tokens, then the second of the measured ones. float32, or bfloat16 (kept as its bits).
    """

    def __init__(self, folder: Path, tokens: int, measured_tokens: int, hidden: int) -> None:
        self.folder, self.hidden = folder, hidden
        self._rows = {"hidden": tokens, "gradient": tokens + measured_tokens}
        self._tokens = tokens

    @property
    def size_bytes(self) -> int:
        """Of one boundary."""
        return 4 * self.hidden * sum(self._rows.values())

    def path(self, kind: Kind, number: int) -> Path:
        return self.folder / f"{kind}-{number:03d}.npy"

    def has(self, kind: Kind, number: int) -> bool:
        return self.path(kind, number).is_file()

    def remove(self, kind: Kind, number: int) -> None:
        self.path(kind, number).unlink(missing_ok=True)

    @contextmanager
    def writing(self, kind: Kind, number: int) -> Iterator[npt.NDArray[np.float32]]:
        """A new file's rows, float32, whole once the block ends without an error."""
        path = self.path(kind, number)
        temporary = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows: Any = np.lib.format.open_memmap(
                temporary, "w+", np.float32, (self._rows[kind], self.hidden)
            )
            # A mapped file without room would end the process when its rows are written.
            if hasattr(os, "posix_fallocate"):
                with temporary.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            yield rows
            rows.flush()
            temporary.replace(path)
        except OSError as error:
            raise EdgeDtmError(
                f"{path} could not be written ({error.strerror or error}): free some space"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def rows(self, kind: Kind, number: int) -> npt.NDArray[np.float32]:
        """EdgeDtmError when the file is damaged."""
        path = self.path(kind, number)
        try:
            rows: npt.NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
            if rows.shape != (self._rows[kind], self.hidden) or rows.dtype != np.float32:
                raise ValueError(f"shape {rows.shape}")
            return rows
        except (OSError, ValueError, EOFError) as error:
            raise EdgeDtmError(
                f"{path} cannot be read ({error}): run edge-dtm compress again with --no-resume"
            ) from None

    def place(self, places: torch.Tensor, draw: int) -> npt.NDArray[np.int64]:
        """Rows of a gradient file for tokens at `places`, int64 (tokens,)."""
        rows: npt.NDArray[np.int64] = places.numpy() + draw * self._tokens
        return rows
