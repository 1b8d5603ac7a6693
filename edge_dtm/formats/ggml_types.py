"""One table of facts a GGML type; every other list of types in edge-dtm is derived from it.

Sources, all of the llama.cpp in llama-cpp-python 0.3.36: ggml/src/ggml-common.h (blocks),
ggml/src/ggml-cpu/ggml-cpu.c (vec_dot_type), ggml/src/ggml.c (importance),
ggml/src/ggml-cpu/repack.cpp and amx/common.h (repacked layouts), common/arg.cpp (KV cache).

Imports neither numpy nor gguf, so that listing profiles stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edge_dtm.core.errors import EdgeDtmError

if TYPE_CHECKING:
    import gguf

Role = Literal["default", "on request", "known", "activations", "data"]
Activations = Literal["float", "half", "bfloat16", "q8_0", "q8_K"]
Importance = Literal["ignored", "used", "needed"]


@dataclass(frozen=True, eq=False)
class GgmlType:
    """The facts of one GGML type.

    Attributes:
        name: as gguf-py writes it, for instance `Q4_K`.
        number: its value in `enum ggml_type`.
        block_size: weights in one block; the length of a row must be a multiple of it.
        parts: the bytes of one block, part by part.
        role: `default`, a candidate of every plan; `on request`, a candidate once `--types` names
            it; `known`, only read; `activations`, only what kernels round inputs to; `data`, no
            weights.
        activations: how the CPU kernel rounds the input of a matrix of this type. Q8_1, the
            partner of types with an offset, rounds as Q8_0 does. None where there is no kernel.
        importance: whether ggml's quantizer needs an importance vector, uses one or ignores it.
        holds_zeros: whether zeros of a mask stay zero and can be told from rounded weights.
        kv_cache: whether llama.cpp takes it for --cache-type-k and --cache-type-v.
        repacked: (CPU feature, what the number of rows must divide by), for each feature with
            which llama.cpp stores the weights in another layout with faster kernels. Where several
            apply the last one counts.
    """

    name: str
    number: int
    block_size: int
    parts: Mapping[str, int]
    role: Role
    activations: Activations | None = None
    importance: Importance = "ignored"
    holds_zeros: bool = False
    kv_cache: bool = False
    repacked: tuple[tuple[str, int], ...] = ()

    @property
    def block_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.block_bytes / self.block_size

    @property
    def quantized(self) -> bool:
        """Whether several weights share a block."""
        return self.block_size > 1

    @property
    def takes_feedback(self) -> bool:
        """Whether error feedback (GPTQ) pays: the grid of floats is too fine for it to matter."""
        return self.quantized


_AMX = ("AMX_INT8", 32)  # two tiles of 16 rows
_AVX2, _AVX512 = ("AVX2", 8), ("AVX512", 8)


def _arm(rows: int) -> tuple[tuple[str, int], ...]:
    return (("DOTPROD", rows), ("MATMUL_INT8", rows))


# In the order in which candidates are listed: from fine to coarse within a family.
_TABLE: Sequence[GgmlType] = (
    GgmlType("F32", 0, 1, {"weight": 4}, "known", "float", holds_zeros=True, kv_cache=True),
    GgmlType("F16", 1, 1, {"weight": 2}, "default", "half", holds_zeros=True, kv_cache=True),
    GgmlType("BF16", 30, 1, {"weight": 2}, "known", "bfloat16", holds_zeros=True, kv_cache=True),
    GgmlType("Q8_0", 8, 32, {"scale": 2, "weights": 32},
             "default", "q8_0", holds_zeros=True, kv_cache=True, repacked=(_AMX, *_arm(4))),
    GgmlType("Q6_K", 14, 256, {"low bits": 128, "high bits": 64, "scales": 16, "scale": 2},
             "default", "q8_K", "used", repacked=(_AMX, *_arm(8))),
    GgmlType("Q5_K", 13, 256,
             {"scale": 2, "minimum": 2, "scales": 12, "high bits": 32, "low bits": 128},
             "default", "q8_K", "used", repacked=(_AMX, *_arm(8))),
    GgmlType("Q4_K", 12, 256, {"scale": 2, "minimum": 2, "scales": 12, "weights": 128},
             "default", "q8_K", "used", repacked=(_AMX, *_arm(8), _AVX2)),
    GgmlType("Q5_1", 7, 32, {"scale": 2, "minimum": 2, "high bits": 4, "low bits": 16},
             "default", "q8_0", "used", kv_cache=True),
    GgmlType("Q5_0", 6, 32, {"scale": 2, "high bits": 4, "low bits": 16},
             "default", "q8_0", "used", kv_cache=True),
    GgmlType("Q4_1", 3, 32, {"scale": 2, "minimum": 2, "weights": 16},
             "default", "q8_0", "used", kv_cache=True, repacked=(_AMX,)),
    GgmlType("Q4_0", 2, 32, {"scale": 2, "weights": 16},
             "default", "q8_0", "used", kv_cache=True, repacked=(_AMX, *_arm(4), _AVX2)),
    GgmlType("IQ4_NL", 20, 32, {"scale": 2, "weights": 16},
             "default", "q8_0", "used", kv_cache=True, repacked=(("DOTPROD", 4), _AVX2)),
    # Coarser ones are worth their bytes only far below 4 bits a weight.
    GgmlType("Q3_K", 11, 256, {"high bits": 32, "low bits": 64, "scales": 12, "scale": 2},
             "on request", "q8_K", "used"),
    GgmlType("Q2_K", 10, 256, {"scales": 16, "weights": 64, "scale": 2, "minimum": 2},
             "known", "q8_K", "used", repacked=(_AVX512,)),
    GgmlType("IQ4_XS", 23, 256, {"scale": 2, "scales, high": 2, "scales, low": 4, "weights": 128},
             "known", "q8_K", "used", repacked=(_AMX,)),
    GgmlType("IQ3_S", 21, 256,
             {"scale": 2, "indices": 64, "indices, high": 8, "signs": 32, "scales": 4},
             "known", "q8_K", "used"),
    GgmlType("IQ3_XXS", 18, 256, {"scale": 2, "indices": 64, "signs and scales": 32},
             "known", "q8_K", "used"),
    GgmlType("IQ2_S", 22, 256,
             {"scale": 2, "indices and signs": 64, "indices, high": 8, "scales": 8},
             "known", "q8_K", "used"),
    GgmlType("IQ2_XS", 17, 256, {"scale": 2, "indices and signs": 64, "scales": 8},
             "known", "q8_K", "needed"),
    GgmlType("IQ2_XXS", 16, 256, {"scale": 2, "indices, signs and scales": 64},
             "known", "q8_K", "needed"),
    GgmlType("IQ1_M", 29, 256, {"indices": 32, "indices, high": 16, "scales": 8},
             "known", "q8_K", "used"),
    GgmlType("IQ1_S", 19, 256, {"scale": 2, "indices": 32, "indices, high, and scales": 16},
             "known", "q8_K", "needed"),
    GgmlType("TQ2_0", 35, 256, {"weights": 64, "scale": 2}, "known", "q8_K"),
    GgmlType("TQ1_0", 34, 256, {"weights": 48, "the last 16 weights": 4, "scale": 2},
             "known", "q8_K"),
    GgmlType("MXFP4", 39, 32, {"exponent": 1, "weights": 16},
             "known", "q8_0", repacked=(("DOTPROD", 4), _AVX2)),
    GgmlType("NVFP4", 40, 64, {"scales": 4, "weights": 32}, "known", "q8_0"),
    GgmlType("Q1_0", 41, 128, {"scale": 2, "signs": 16}, "known", "q8_0"),
    GgmlType("Q8_1", 9, 32, {"scale": 2, "sum": 2, "values": 32}, "activations"),
    GgmlType("Q8_K", 15, 256, {"scale": 4, "values": 256, "sums": 32}, "activations"),
    GgmlType("I8", 24, 1, {"number": 1}, "data"),
    GgmlType("I16", 25, 1, {"number": 2}, "data"),
    GgmlType("I32", 26, 1, {"number": 4}, "data"),
    GgmlType("I64", 27, 1, {"number": 8}, "data"),
    GgmlType("F64", 28, 1, {"number": 8}, "data"),
)  # fmt: skip

TYPES: Mapping[str, GgmlType] = {t.name: t for t in _TABLE}
DEFAULT_TYPES = tuple(t.name for t in _TABLE if t.role == "default")
"""The candidates of a plan when `--types` names none."""
ALLOWED_TYPES = tuple(t.name for t in _TABLE if t.role in ("default", "on request"))
"""The types that `--types` takes."""
SPARSE_TYPES = tuple(
    t.name
    for t in sorted(_TABLE, key=lambda t: t.bits)
    if t.holds_zeros and t.name in ALLOWED_TYPES
)
"""The types in which a plan may have zeros, the smallest first."""
WEIGHT_TYPES = frozenset(t.name for t in _TABLE if t.role not in ("activations", "data"))
KV_TYPES = frozenset(t.name for t in _TABLE if t.kv_cache)


def facts(type_name: str) -> GgmlType:
    """The facts of a type such as `Q8_0`; EdgeDtmError when the name is unknown."""
    try:
        return TYPES[type_name]
    except KeyError:
        raise EdgeDtmError(
            f"{type_name!r} is not a GGML type; see `edge-dtm compress --help`"
        ) from None


def by_number(number: int) -> GgmlType:
    """The type with this number in `enum ggml_type`; EdgeDtmError when it is unknown."""
    for ggml_type in _TABLE:
        if ggml_type.number == number:
            return ggml_type
    raise EdgeDtmError(f"GGML type {number} is unknown: update edge-dtm")


def ggml_type(type_name: str) -> gguf.GGMLQuantizationType:
    """gguf-py's enum member of a type; EdgeDtmError when the name is unknown."""
    import gguf

    return gguf.GGMLQuantizationType(facts(type_name).number)


def block_size(type_name: str) -> int:
    """Weights in one block of the type; EdgeDtmError when the name is unknown."""
    return facts(type_name).block_size


def row_bytes(type_name: str, row_length: int) -> int:
    """Bytes of one row. EdgeDtmError when the row length is no multiple of the block size."""
    f = facts(type_name)
    if row_length % f.block_size:
        raise EdgeDtmError(
            f"{type_name} needs rows that divide by {f.block_size}, not {row_length}"
        )
    return row_length // f.block_size * f.block_bytes
