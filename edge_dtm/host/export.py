"""A plan and a checkpoint in, one GGUF out, tensor by tensor."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from edge_dtm import __version__
from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.ggml_types import ggml_type, row_bytes
from edge_dtm.formats.plan import TENSOR_ALIGNMENT_BYTES, Component, Plan, Treatment, uniform
from edge_dtm.host.checkpoint.checkpoint import Checkpoint, FloatArray
from edge_dtm.host.checkpoint.pre_tokenizer import write_head
from edge_dtm.host.quantize.treat import treat

Importance = Mapping[str, FloatArray | None]
Blocks = Callable[[Component, Treatment], npt.NDArray[np.uint8]]
KEY_SDT, KEY_FDT, KEY_PLAN = "edge_dtm.heldout_sdt", "edge_dtm.heldout_fdt", "edge_dtm.plan_sha256"


def _writer(checkpoint: Checkpoint, plan: Plan, path: Path) -> gguf.GGUFWriter:
    """A writer with all metadata and tensor heads; its size does not depend on the plan."""
    c = checkpoint.config
    w = gguf.GGUFWriter(path, "llama")
    w.add_name(c.name)
    w.add_vocab_size(c.vocab)
    w.add_context_length(c.context_length)
    w.add_embedding_length(c.hidden)
    w.add_block_count(c.layers)
    w.add_feed_forward_length(c.ffn)
    w.add_head_count(c.heads)
    w.add_head_count_kv(c.kv_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_theta)
    w.add_layer_norm_rms_eps(c.rms_epsilon)
    if c.rope_linear:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(c.rope_linear)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    checkpoint.tokenizer.add_metadata(w)
    w.add_string("edge_dtm.version", __version__)
    w.add_string("edge_dtm.gguf_py_version", version("gguf"))
    w.add_string(KEY_PLAN, plan.hash)
    # Both are measured on this very file in llama.cpp, hence written in place afterwards.
    w.add_float32(KEY_SDT, math.nan)
    w.add_float32(KEY_FDT, math.nan)
    for name, length in checkpoint.vectors():
        w.add_tensor_info(name, (length,), np.dtype(np.float32), 4 * length)
    for component, treatment in plan.pairs:
        w.add_tensor_info(
            component.name + ".weight",
            (component.rows, component.row_length),
            np.dtype(np.float32),
            component.rows * row_bytes(treatment.type, component.row_length),
            raw_dtype=ggml_type(treatment.type),
        )
    return w


def fixed_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the file besides the components: metadata, tensor heads, norms, biases."""
    plan = uniform(checkpoint.components(), "F32", 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        with closing(_writer(checkpoint, plan, path)) as writer:
            write_head(writer)
        head = path.stat().st_size
    head += -head % TENSOR_ALIGNMENT_BYTES
    vectors = (Component(name, 1, length) for name, length in checkpoint.vectors())
    return head + sum(vector.size_bytes(Treatment("F32")) for vector in vectors)


def export_gguf(
    checkpoint: Checkpoint,
    plan: Plan,
    path: Path,
    blocks: Importance | Blocks,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the GGUF to `path` through a temporary name, after it was read back and compared.

    blocks: (component, treatment) -> uint8 (rows, row_bytes) in GGUF's row order; or, for plain
    rounding, component -> importance, float32 (row_length,) or None. progress: called with
    weights written.
    EdgeDtmError when the disk is full or what was written is not what the plan says.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with closing(_writer(checkpoint, plan, temporary)) as writer:
            write_head(writer)
            for name, _ in checkpoint.vectors():
                writer.write_tensor_data(checkpoint.tensor(name))
            for component, treatment in plan.pairs:
                if callable(blocks):
                    data = blocks(component, treatment)
                else:
                    weights = checkpoint.tensor(component.name + ".weight")
                    data = treat(weights, treatment, blocks.get(component.name))
                writer.write_tensor_data(data)
                if progress:
                    progress(component.weights)
            writer.flush()
            assert writer.fout is not None
            os.fsync(writer.fout[0].fileno())
        compare_with_plan(temporary, plan)
        temporary.replace(path)
    except OSError as error:
        raise EdgeDtmError(
            f"{path} could not be written ({error.strerror or error}); it takes "
            f"{plan.size_bytes:,} bytes: free some space or choose another folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def compare_with_plan(path: Path, plan: Plan) -> None:
    """EdgeDtmError listing every tensor whose type or shape is not the plan's, or a wrong size."""
    reader = gguf.GGUFReader(path)
    written = {t.name: (t.tensor_type.name, tuple(t.shape.tolist()[::-1])) for t in reader.tensors}
    wrong = []
    for c, treatment in plan.pairs:
        in_file = written.get(c.name + ".weight")
        expected = (treatment.type, (c.rows, c.row_length))
        if in_file != expected:
            wrong.append(f"{c.name} is {in_file}, not {expected}")
    if path.stat().st_size != plan.size_bytes:
        wrong.append(f"the file has {path.stat().st_size:,} bytes, not {plan.size_bytes:,}")
    if wrong:
        raise EdgeDtmError(f"{path} is not as planned: {'; '.join(wrong)}; please report this")


def write_measured(path: Path, sdt: float, fdt: float) -> None:
    """Put the measured SDT (share) and mean FDT (tokens) into the file, in place."""
    reader = gguf.GGUFReader(path, "r+")
    for key, value in ((KEY_SDT, sdt), (KEY_FDT, fdt)):
        field = reader.get_field(key)
        assert field is not None
        field.parts[field.data[0]][0] = value
    reader.data.flush()


def f16_plan(checkpoint: Checkpoint, fixed: int) -> Plan:
    """Every component in F16: llama.cpp's own noise floor is measured with it."""
    return uniform(checkpoint.components(), "F16", fixed)


def packages() -> dict[str, str]:
    """Versions of everything that has a hand in the numbers."""
    names = ("torch", "transformers", "gguf", "llama-cpp-python", "numpy")
    return {name: version(name) for name in names}


def provenance(checkpoint: Checkpoint, sha256: str) -> dict[str, Any]:
    """What the numbers were made of. sha256: of the weights."""
    return {
        "model": checkpoint.config.name,
        "model_sha256": sha256,
        "edge_dtm": __version__,
        "packages": packages(),
    }
