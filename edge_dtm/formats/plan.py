"""What is done to each component, and exactly how many bytes that makes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.core.strict_json import Share, StrictModel, check_version, validated
from edge_dtm.formats import ggml_types
from edge_dtm.formats.ggml_types import SPARSE_TYPES

SCHEMA_VERSION = 1
TENSOR_ALIGNMENT_BYTES = 32  # GGUF's default alignment; every tensor's data is padded to it

SPARSE_LEVELS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True, order=True)
class Treatment:
    """A GGML type and the share of zeros in every row (0 where nothing is pruned)."""

    type: str
    zero_share: float = 0.0

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 1) -> str:
        """`Q8_0+50.0% zeros`; digits: behind the point. With enough of them no two are the same."""
        # A float's own % multiplies, which can make one of two neighbours.
        share = self.zero_share if digits == 1 else Decimal(self.zero_share)
        return f"{self.type}+{share:.{digits}%} zeros" if self.zero_share else self.type

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "zero_share": self.zero_share}


@dataclass(frozen=True)
class Component:
    """A weight matrix: its GGUF tensor name without `.weight`, rows (outputs), row length."""

    name: str
    rows: int
    row_length: int

    @property
    def weights(self) -> int:
        return self.rows * self.row_length

    @property
    def in_block(self) -> bool:
        """Whether it belongs to a transformer block; only those are pruned."""
        return self.name.startswith("blk.")

    def zeros(self, treatment: Treatment) -> int:
        """Number of zeros the treatment's mask puts into the matrix."""
        return self.rows * zeros_per_row(self.row_length, treatment.zero_share)

    def size_bytes(self, treatment: Treatment) -> int:
        """Bytes it takes in a GGUF file, padding included."""
        size = self.rows * ggml_types.row_bytes(treatment.type, self.row_length)
        return -(-size // TENSOR_ALIGNMENT_BYTES) * TENSOR_ALIGNMENT_BYTES

    def fits(self, type_name: str) -> bool:
        return self.row_length % ggml_types.block_size(type_name) == 0


def distinct_texts(treatments: Iterable[Treatment]) -> dict[Treatment, str]:
    """Treatment -> its text, with more digits than usual only where two would read the same."""
    out: dict[Treatment, str] = {}
    left, digits = set(treatments), 1
    while left:
        alike = Counter(t.text(digits) for t in left)
        out |= {t: t.text(digits) for t in left if alike[t.text(digits)] == 1}
        left -= set(out)
        digits += 1
    return out


def zeros_per_row(row_length: int, zero_share: float) -> int:
    return round(row_length * zero_share)


def candidate_treatments(
    component: Component, types: Iterable[str], sparse: bool = True, held: float = 0.0
) -> list[Treatment]:
    """The treatments a component may get: types that divide its rows, zeros only in blocks. held:
    share of zeros that it has already and that are to stay, so that nothing below comes into
    question."""
    fitting = [t for t in types if component.fits(t)]
    if not component.in_block or not (sparse or held):
        return [Treatment(t) for t in fitting]
    levels = (*([held] if held else []), *(s for s in SPARSE_LEVELS if s > held))
    masked = [Treatment(t, s) for t in SPARSE_TYPES if t in fitting for s in levels]
    return masked if held else [*(Treatment(t) for t in fitting), *masked]


def least_bytes_with_zeros(
    components: Iterable[Component], types: Iterable[str], zero_share: float
) -> float:
    """About the fewest bytes of all components with that average of zeros over the block matrices:
    what has zeros has them at the highest level, the rest takes the smallest type. Infinite when
    it cannot be reached at all."""
    types, total, wanted, extra = tuple(types), 0.0, 0.0, []
    for c in components:
        sizes = {t: c.size_bytes(Treatment(t)) for t in types if c.fits(t)}
        least = min(sizes.values())
        total += least
        masked = [sizes[t] for t in SPARSE_TYPES if t in sizes]
        if c.in_block:
            wanted += zero_share * c.weights
            if masked:
                zeros = c.zeros(Treatment(SPARSE_TYPES[0], SPARSE_LEVELS[-1]))
                extra.append(((min(masked) - least) / zeros, zeros))
    for rate, zeros in sorted(extra):
        taken = min(zeros, wanted)
        total += rate * taken
        wanted -= taken
    return total if wanted <= 0.5 else float("inf")


@dataclass(frozen=True)
class Plan:
    """Component -> treatment, with the bytes of everything else in the file (`fixed_bytes`)."""

    components: tuple[Component, ...]
    treatments: tuple[Treatment, ...]
    fixed_bytes: int

    @property
    def pairs(self) -> list[tuple[Component, Treatment]]:
        return list(zip(self.components, self.treatments, strict=True))

    def by_name(self) -> dict[str, Treatment]:
        return {c.name: t for c, t in self.pairs}

    @property
    def size_bytes(self) -> int:
        """The exact size of the GGUF file."""
        return self.fixed_bytes + sum(c.size_bytes(t) for c, t in self.pairs)

    @property
    def zeros(self) -> int:
        """Zeros of all masks, which only block matrices have."""
        return sum(c.zeros(t) for c, t in self.pairs if c.in_block)

    @property
    def zero_share(self) -> float:
        """Zeros of the masks over all weights of the block matrices."""
        total = sum(c.weights for c in self.components if c.in_block)
        return self.zeros / total if total else 0.0

    def type_counts(self) -> dict[str, tuple[int, int]]:
        """Treatment text -> (components, bytes), in order of falling bytes."""
        counts: dict[str, tuple[int, int]] = {}
        for c, t in self.pairs:
            n, size = counts.get(str(t), (0, 0))
            counts[str(t)] = (n + 1, size + c.size_bytes(t))
        return dict(sorted(counts.items(), key=lambda item: -item[1][1]))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of the treatments, in hex."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "fixed_bytes": self.fixed_bytes,
            "components": [
                {"name": c.name, "rows": c.rows, "row_length": c.row_length, **t.to_json()}
                for c, t in self.pairs
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """EdgeDtmError when the schema is another one or a field is missing or wrong."""
        check_version(data, SCHEMA_VERSION, "the plan")
        file = validated(_PlanFile, data, "the plan", "make it again with compress")
        return cls(
            tuple(Component(r.name, r.rows, r.row_length) for r in file.components),
            tuple(Treatment(r.type, r.zero_share) for r in file.components),
            file.fixed_bytes,
        )


_Size = Annotated[int, Field(ge=0, lt=2**53)]  # rows, weights or bytes


class _PlanRow(StrictModel, extra="ignore"):
    name: str
    rows: _Size
    row_length: _Size
    type: str
    zero_share: Share

    @model_validator(mode="after")
    def _type_fits(self) -> Self:
        try:
            ggml_types.row_bytes(self.type, self.row_length)
        except EdgeDtmError as error:
            raise ValueError(str(error)) from None
        return self


class _PlanFile(StrictModel, extra="ignore"):
    fixed_bytes: _Size
    components: list[_PlanRow]


def uniform(components: Iterable[Component], type_name: str, fixed_bytes: int) -> Plan:
    components = tuple(components)
    return Plan(components, tuple(Treatment(type_name) for _ in components), fixed_bytes)
