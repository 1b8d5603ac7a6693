"""Importance vectors as the imatrix files of llama.cpp's tools.

llama-imatrix records for each matrix the sum of the squares of its inputs, and llama-quantize
weights the squared error of each column with their mean. Source of the format and of all rules
here: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp of the
llama.cpp in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError, os_errors

if TYPE_CHECKING:
    from edge_dtm.formats.plan import Component

FloatArray = npt.NDArray[np.float32]

# What llama-imatrix leaves out: looked-up rows have no inputs; `output` only with
# --process-output; a tied head, whose tensor is called token_embd, never.
OPTIONAL = ("token_embd", "output")
COMMAND = "llama-imatrix -m MODEL.gguf -f TEXT.txt --process-output -o imatrix.gguf"

_WEIGHT, _SUMS, _COUNTS = ".weight", ".in_sum2", ".counts"
_EXPERTS = "_exps" + _WEIGHT
_CHUNK_TOKENS = 512  # llama-imatrix's own; for display


def write_imatrix(
    path: Path, vectors: Mapping[str, FloatArray], tokens: int, datasets: Sequence[str]
) -> None:
    """Write what llama-imatrix would have written, under a temporary name until complete.

    vectors: component -> float32 (row_length,), the mean square of its inputs. tokens: how many
    tokens the mean is over; it is the weight of this file when llama-imatrix merges several.
    datasets: names of the calibration texts, at least one, since llama-quantize refuses a file
    without.

    The file holds sums in float32, not means, so that llama-quantize may get back a value that
    differs in the last bit, which is enough for other bytes in many a matrix. With a power of two
    as `tokens` it gets exactly `vectors`. Equal arguments give equal bytes. EdgeDtmError when
    values are negative or not finite or the file cannot be written.
    """
    import gguf

    count = np.float32(tokens)
    with np.errstate(over="ignore"):
        sums = {name: vector * count for name, vector in vectors.items()}
    if bad := [name for name, values in sums.items() if not _usable(values)]:
        raise EdgeDtmError(
            f"{_listed(bad, len(vectors), 'importance vectors')} hold values that are NaN, "
            "negative or too large: check the model for infinite activations"
        )
    temporary = path.with_name(path.name + ".tmp")
    try:
        with (
            os_errors(f"cannot write {path}"),
            closing(gguf.GGUFWriter(temporary, "imatrix")) as writer,
        ):
            writer.kv_data[0].clear()  # general.architecture, which llama-imatrix does not write
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", list(datasets))
            writer.add_uint32("imatrix.chunk_count", tokens // _CHUNK_TOKENS)
            writer.add_uint32("imatrix.chunk_size", _CHUNK_TOKENS)
            for tensor in sorted(name + _WEIGHT for name in sums):
                writer.add_tensor(tensor + _SUMS, sums[tensor.removesuffix(_WEIGHT)])
                writer.add_tensor(tensor + _COUNTS, np.array([count]))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_imatrix(path: Path) -> dict[str, FloatArray]:
    """Component -> float32 (row_length,), the mean square of its inputs, of an imatrix file.

    The values are those llama-quantize uses: ones where nothing was counted. EdgeDtmError when
    the file is no GGUF (the older binary form is none), is not whole, holds NaN, infinite or
    negative values, or mixtures of experts.
    """
    if not path.exists():
        raise EdgeDtmError(f"{path} does not exist: make it with {COMMAND}")
    with os_errors(f"cannot read {path}"), path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise EdgeDtmError(
            f"{path} is no GGUF (the older binary form of imatrix files is not read): make it "
            f"again as GGUF with a current llama-imatrix: {COMMAND}"
        )
    try:
        return _means(path)
    # gguf-py does not check what it reads; a damaged file ends in any of these.
    except (ValueError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise EdgeDtmError(
            f"{path} is no whole imatrix file ({text}): make it again with {COMMAND}"
        ) from None


def check_imatrix(vectors: Mapping[str, FloatArray], components: Iterable[Component]) -> None:
    """EdgeDtmError listing every component whose vector is missing or has another length.

    Those of OPTIONAL may be missing: they are quantized without importance then.
    """
    components, bad = list(components), []
    for c in components:
        vector = vectors.get(c.name)
        if vector is None:
            if c.name not in OPTIONAL:
                bad.append(f"{c.name} (missing)")
        elif len(vector) != c.row_length:
            bad.append(f"{c.name} ({len(vector)} values, not {c.row_length})")
    if bad:
        raise EdgeDtmError(
            f"the imatrix does not fit this model in {_listed(bad, len(components), 'components')}: "
            f"make it from this very model with {COMMAND}"
        )


def _listed(names: Sequence[str], total: int, what: str) -> str:
    return f"{len(names)} of {total} {what} ({', '.join(names)})"


def _usable(values: FloatArray) -> bool:
    return bool((np.isfinite(values) & (values >= 0)).all())


def _means(path: Path) -> dict[str, FloatArray]:
    """ValueError and gguf-py's own for what is not whole."""
    import gguf

    reader = gguf.GGUFReader(path)
    field = reader.get_field("general.type")
    kind = None if field is None else field.contents()
    if kind != "imatrix":
        raise ValueError(f"its general.type is {kind!r}, not 'imatrix'")
    tensors = {t.name: t for t in reader.tensors}
    ends = (_SUMS, _COUNTS)
    names = dict.fromkeys(n.removesuffix(end) for n in tensors for end in ends if n.endswith(end))
    if not names:
        raise ValueError("it has no entries")
    means: dict[str, FloatArray] = {}
    experts = []
    for name in names:
        if not {name + end for end in ends} <= tensors.keys():
            raise ValueError(f"{name} lacks {_SUMS} or {_COUNTS}")
        pair = [tensors[name + end] for end in ends]
        if any(t.tensor_type != gguf.GGMLQuantizationType.F32 for t in pair):
            raise ValueError(f"{name} is not in F32")
        sums, counts = (t.data.reshape(-1) for t in pair)
        if not counts.size or not sums.size or sums.size % counts.size:
            raise ValueError(f"{name} has {sums.size} values for {counts.size} counts")
        if not (_usable(sums) and _usable(counts)):
            raise ValueError(f"values or counts of {name} are NaN, infinite or negative")
        if counts.size > 1 or name.endswith(_EXPERTS):
            experts.append(name.removesuffix(_WEIGHT))
        # As lround: halves go up, which np.round does not do. Where nothing was counted
        # llama-quantize takes ones, that is no weighting.
        whole = np.float32(np.floor(float(counts[0]) + 0.5))
        means[name.removesuffix(_WEIGHT)] = np.divide(sums, whole) if whole else np.ones_like(sums)
    if experts:
        raise EdgeDtmError(
            f"{path}: {_listed(experts, len(means), 'entries')} belong to a mixture of experts, "
            "which edge-dtm does not support: use the imatrix of a plain Llama model"
        )
    return means
