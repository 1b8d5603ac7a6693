"""The JSON files of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_dtm.core.errors import EdgeDtmError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when the file is missing. EdgeDtmError when it is malformed."""
    try:
        data = json.loads(path.read_text("utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EdgeDtmError(f"{path} cannot be read ({error}): get it again") from None
    return data
