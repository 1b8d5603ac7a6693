"""The JSON files of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_dtm.core.errors import EdgeDtmError


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A JSON object; empty when the file is missing and not required.

    EdgeDtmError when it is malformed, or missing and required.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if required:
            raise EdgeDtmError(f"{path} is missing: give a whole HF checkpoint folder") from None
        return {}
    except (OSError, ValueError) as error:
        raise EdgeDtmError(f"{path} cannot be read ({error}): get it again") from None
    if not isinstance(data, dict):
        raise EdgeDtmError(f"{path} holds no JSON object: get it again")
    return data
