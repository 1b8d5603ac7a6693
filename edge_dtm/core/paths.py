"""Where edge-dtm keeps what it can make or fetch again."""

import os
from pathlib import Path

CACHE_VARIABLE = "EDGE_DTM_CACHE"
DEFAULT_MODEL_NAME = "smollm2-135m-instruct"


def cache_dir() -> Path:
    """The folder named by EDGE_DTM_CACHE, else ``~/.cache/edge-dtm``; it need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "edge-dtm"


def default_model_dir() -> Path:
    """The Hugging Face folder used where no model is named; tools/make_smollm2.py makes it."""
    return cache_dir() / DEFAULT_MODEL_NAME
