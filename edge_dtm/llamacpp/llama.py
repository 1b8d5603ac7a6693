"""The llama.cpp library: loaded on first use, with its log caught, and models loaded through it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from edge_dtm.core.errors import EdgeDtmError

LOG_VARIABLE = "EDGE_DTM_LLAMA_LOG"  # 1: show llama.cpp's log on stderr
_LOG_LEVEL_ERROR, _LOG_LEVEL_CONTINUE = 4, 5  # enum ggml_log_level
last_errors: deque[str] = deque(maxlen=3)  # llama.cpp's own last error lines


def runtime_info() -> dict[str, Any]:
    """Versions and machine: what one needs to know to explain a different argmax."""
    import llama_cpp

    lib = library()
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "system_info": lib.llama_print_system_info().decode(errors="replace").strip(),
        "cpus": os.cpu_count() or 1,
        "machine": platform.machine(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


@cache
def library() -> Any:
    """llama_cpp's low-level module, its log and ggml's redirected."""
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        raise EdgeDtmError(
            f"llama-cpp-python cannot be imported ({error}): pip install llama-cpp-python"
        ) from None
    lib: Any = llama_cpp
    last_level = 0

    def log(level: int, text: bytes, user_data: object) -> None:
        nonlocal last_level
        last_level = last_level if level == _LOG_LEVEL_CONTINUE else level
        line = text.decode(errors="replace")
        if last_level == _LOG_LEVEL_ERROR and line.strip():
            last_errors.append(" ".join(line.split()))
        if os.environ.get(LOG_VARIABLE) == "1":
            sys.stderr.write(line)

    lib.edge_dtm_log = lib.llama_log_callback(log)  # ctypes does not keep it alive
    redirect_log(lib)
    lib.llama_backend_init()
    return lib


def redirect_log(lib: Any) -> None:
    """Again, since whoever else loaded a model in this process may have redirected the log."""
    lib.llama_log_set(lib.edge_dtm_log, ctypes.c_void_p(0))
    last_errors.clear()


def load_model(
    path: Path, *, vocab_only: bool = False, repack: bool = False, pre: str | None = None
) -> Any:
    """A llama_model pointer, to be freed by llama_model_free.

    vocab_only: load no weights. pre: a value of tokenizer.ggml.pre in place of the file's.
    EdgeDtmError with llama.cpp's own words when it refuses the file.
    """
    lib = library()
    redirect_log(lib)
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocab_only
    params.use_extra_bufts = repack
    # Repacked weights are copies: with the file mapped both would count, twice the model at the
    # peak. Without repacking the map is the cheapest, since the system may drop its pages.
    if hasattr(params, "load_mode"):
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE if repack else lib.LLAMA_LOAD_MODE_MMAP
    else:  # llama-cpp-python before 0.3.36
        params.use_mmap = not repack
    overrides = (lib.llama_model_kv_override * 2)()  # an empty key ends the list
    if pre is not None:
        overrides[0].key = b"tokenizer.ggml.pre"
        overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_STR
        overrides[0].value.val_str = pre.encode()
        params.kv_overrides = overrides
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        reason = error_text() or " (set EDGE_DTM_LLAMA_LOG=1 to see its log)"
        raise EdgeDtmError(f"{path}: llama.cpp cannot load the model{reason}")
    return model


def error_text() -> str:
    return f" ({'; '.join(last_errors)})" if last_errors else ""
