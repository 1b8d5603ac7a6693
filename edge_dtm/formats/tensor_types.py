"""A plan for the stock llama-quantize: a file of tensor types and the command line.

    llama-quantize --imatrix imatrix.gguf --tensor-type-file types.txt \\
        ./model-f32.gguf ./model-mixed.gguf Q4_K_S

makes a GGUF whose tensors have exactly the plan's types (`quantize_command` writes this line). The
source must be in F32, F16 or BF16, since requantizing costs quality and is not asked for.

Source of all rules: tools/quantize/quantize.cpp and src/llama-quant.cpp of the llama.cpp in
llama-cpp-python 0.3.36. Its file is a list of `regex=type` with white space between, without
comments. The regex is lower-cased and searched anywhere in the tensor's name, the first that fits
wins. It reaches token_embd and output too, as long as --token-embedding-type and
--output-tensor-type are not given, which come before it. The list is ignored altogether when the
file type is F32, F16 or BF16.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats.ggml_types import ALLOWED_TYPES, facts
from edge_dtm.formats.plan import Plan

# llama-quantize's Q4_K and Q5_K mean Q4_K_M and Q5_K_M, mixtures that this file is not.
_FILE_TYPES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}


def tensor_type_file(plan: Plan) -> str:
    """The text for `llama-quantize --tensor-type-file`, one line a component in the plan's order.

    EdgeDtmError that lists every component with zeros, which llama-quantize cannot make.
    """
    if sparse := [f"{c.name} {t}" for c, t in plan.pairs if t.zero_share]:
        raise EdgeDtmError(
            f"llama-quantize cannot prune, and {len(sparse)} of {len(plan.pairs)} components "
            f"have zeros ({', '.join(sparse)}): compress without --sparsity"
        )
    return "".join(f"^{re.escape(c.name + '.weight')}$={t.type.lower()}\n" for c, t in plan.pairs)


def quantize_command(
    plan: Plan, types_file: Path, imatrix_file: Path, source: Path, target: Path
) -> str:
    """The command line, quoted for a POSIX shell, that makes `target` from `source`.

    types_file: holds tensor_type_file(plan). source: a GGUF in F32, F16 or BF16.
    """
    words = ["llama-quantize", "--imatrix", str(imatrix_file)]
    words += ["--tensor-type-file", str(types_file)]
    # "./", since llama-quantize takes a target such as 7b.gguf for the number of a file type.
    words += [str(p) if p.is_absolute() else f"./{p}" for p in (source, target)]
    return shlex.join([*words, _file_type(plan)])


def _file_type(plan: Plan) -> str:
    """What llama-quantize calls the file: after the quantized type with most bytes.

    It fills general.file_type and the types of matrices that are not in the plan.
    """
    sizes: Counter[str] = Counter()
    for c, t in plan.pairs:
        sizes[t.type] += c.size_bytes(t)
    if len(sizes) == 1 and not facts(only := next(iter(sizes))).quantized:
        return only  # the list is ignored, and not needed
    # Only a quantized file type lets the list through, so Q8_0 for F16 and F32 together, say.
    ranked = sorted(sizes, key=lambda t: (-sizes[t], t))
    quantized = [t for t in ranked if t in ALLOWED_TYPES and facts(t).quantized] + ["Q8_0"]
    return _FILE_TYPES.get(quantized[0], quantized[0])
