"""A folder that `ollama create` makes a model of: the GGUF and a Modelfile.

Rules of the Modelfile: Ollama's docs/modelfile.mdx. It holds FROM and the parameters of greedy
decoding. Ollama chooses the chat template: the one it knows whose Jinja text is nearest to that of
the GGUF, or the bare prompt where none is near (template/template.go, Named).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_dtm.core.errors import EdgeDtmError, os_errors
from edge_dtm.formats.archive import open_bundle
from edge_dtm.formats.bundle import MODEL
from edge_dtm.formats.profile import packaged_profile

MODELFILE = "Modelfile"
DEFAULT_CONTEXT_TOKENS = 4096  # where no profile says for how many the memory was planned


def write_folder(bundle_folder: Path, out_dir: Path) -> None:
    """Put the GGUF of a checked bundle and then a Modelfile into out_dir.

    The GGUF is linked where the file system can, else copied. EdgeDtmError when out_dir holds
    other files.
    """
    bundle = open_bundle(bundle_folder)
    model = bundle.path(MODEL)
    context_tokens = min(model_context(model), planned_context(bundle.manifest.provenance))
    with os_errors(f"cannot write {out_dir}"):
        out_dir.mkdir(exist_ok=True)
        if {item.name for item in out_dir.iterdir()} - {MODEL, MODELFILE}:
            raise EdgeDtmError(f"{out_dir} holds other files: give another name with -o")
        for name in (MODELFILE, MODEL):
            (out_dir / name).unlink(missing_ok=True)
        try:
            os.link(model, out_dir / MODEL)
        except OSError:  # another file system, or one without links
            shutil.copyfile(model, out_dir / MODEL)
        (out_dir / MODELFILE).write_text(modelfile(context_tokens), encoding="utf-8")


def modelfile(context_tokens: int) -> str:
    """The text of a Modelfile that lies beside model.gguf."""
    return f"""# Made by edge-dtm pack --for ollama. To use it: ollama create NAME -f Modelfile
FROM ./{MODEL}

# Greedy, as it was measured: other settings give other tokens than the report tells of.
PARAMETER temperature 0
PARAMETER repeat_penalty 1
PARAMETER num_ctx {context_tokens}

# Ollama chooses the chat template. To see which: ollama show --template NAME
"""


def model_context(path: Path) -> int:
    """The context length of a GGUF, in tokens. EdgeDtmError when it cannot be read."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError) as error:
        raise EdgeDtmError(f"{path} cannot be read as GGUF: {error}") from None
    architecture = reader.get_field("general.architecture")
    context = architecture and reader.get_field(f"{architecture.contents()}.context_length")
    if not context:
        raise EdgeDtmError(f"{path} does not say its context length: convert the model again")
    return int(context.contents())


def planned_context(provenance: Mapping[str, Any]) -> int:
    """The context length in tokens for which a bundle's memory was planned."""
    profile = packaged_profile(provenance.get("profile"))
    return DEFAULT_CONTEXT_TOKENS if profile is None else profile.n_ctx
