"""Data files that the package reads."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def packaged_records() -> list[dict[str, Any]]:
    """The packaged prompts: of each the text `prompt`, or the chat `messages`."""
    text = resources.files(__name__).joinpath("prompts.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]
