"""Memory and speed of one GGUF in a process of its own, so that neither hears of any other model.

    python -m edge_dtm.device.probe MODEL.gguf '{"threads": 4}'

prints one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.machine import peak_rss_bytes
from edge_dtm.formats.record import RunSettings
from edge_dtm.llamacpp.gguf_header import check_gguf
from edge_dtm.llamacpp.runner import LlamaRunner

PROMPT_TOKENS, DECODE_TOKENS = 128, 64
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Probed:
    """Peak resident memory of the whole process, and speeds in tokens per second."""

    peak_rss_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def probe_here(path: Path, settings: RunSettings) -> Probed:
    """Load the model into this process and measure."""
    check_gguf(path)
    with LlamaRunner(path, settings, PROMPT_TOKENS + DECODE_TOKENS) as runner:
        prefill, decode = runner.measure_speed(PROMPT_TOKENS, DECODE_TOKENS)
    return Probed(peak_rss_bytes(), prefill, decode)


def probe(path: Path, settings: RunSettings) -> Probed:
    """The same in a child. EdgeDtmError with the child's last words when it fails."""
    return in_child(__name__, path, settings.to_json(), lambda data: Probed(**data))


def in_child(
    module: str, path: Path, request: Mapping[str, Any], parse: Callable[[Any], Answer]
) -> Answer:
    """`python -m module path request`, whose last line is the JSON that parse is given.

    EdgeDtmError with the child's last words when it fails or parse finds something missing.
    """
    words = [sys.executable, "-m", module, str(path), json.dumps(request)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    try:
        return parse(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EdgeDtmError(
            f"{path} could not be measured: {last.removeprefix('error: ')}"
        ) from None


if __name__ == "__main__":
    try:
        print(
            json.dumps(
                asdict(
                    probe_here(Path(sys.argv[1]), RunSettings.from_json(json.loads(sys.argv[2])))
                )
            )
        )
    except EdgeDtmError as error:
        sys.exit(f"error: {error}")
