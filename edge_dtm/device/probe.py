"""Memory and speed of one GGUF in a process of its own, so that neither hears of any other model.

    python -m edge_dtm.device.probe MODEL.gguf '{"threads": 4}'

prints one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_dtm.device.runner import LlamaRunner, RunSettings, check_gguf, peak_rss_bytes
from edge_dtm.errors import EdgeDtmError

PROMPT_TOKENS, DECODE_TOKENS = 128, 64


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
    words = [sys.executable, "-m", __name__, str(path), json.dumps(settings.to_json())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    try:
        return Probed(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EdgeDtmError(
            f"{path} could not be measured: {last.removeprefix('error: ')}"
        ) from None


if __name__ == "__main__":
    try:
        print(
            json.dumps(
                asdict(probe_here(Path(sys.argv[1]), RunSettings(**json.loads(sys.argv[2]))))
            )
        )
    except EdgeDtmError as error:
        sys.exit(f"error: {error}")
