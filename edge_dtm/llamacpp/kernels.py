"""ggml's matrix kernels on this machine against plain arithmetic, type by type.

For every GGML type and row length among a GGUF's matrices some rows of a real one are multiplied
by ggml, one column (what decoding does) and several (prefill), in the file's layout and in each
repacked layout this CPU uses. The same bytes, decoded by gguf-py's own dequantizer in numpy,
are multiplied in float64.

A quantized type's kernel rounds the activations to 8 bits first. They are chosen here so that
nothing is lost by it: multiples of 2^-7 of at most 127/128, in every block of 32 one of exactly
that size. A block's scale is then +-2^-7 (its largest size over 127: Q8_0, Q8_1, Q8_K), every value
a whole number of steps, and the block sums, below 2^11 steps, fit the half precision of Q8_1. So
what is left is rounding of float32 sums, and the limit can be strict:

    error = |ggml - exact| / sum |weight * activation|, the worst over rows and columns.

- 1e-5: n float32 additions err by at most n 2^-24 of that sum, in practice by about 1e-7, on
  AVX2 as on emulated Cortex-A72 and A76 (the kernels keep several partial sums). Types with an offset (Q4_1, Q4_K and the like) subtract two
  numbers a few times larger.
- F16, 1e-3: ARM kernels may add up in half precision; 3e-4 on an emulated Cortex-A76.
- KleidiAI's layouts, 5e-3: they round activations and Q8_0 weights once more, in a way of their
  own.

The whole product is about 1 / sqrt(n) of that sum: a kernel that computes something else is off
by 0.01 or more at n = 8192, a single wrong scale of a block by 32 / n, and one wrong weight by
1 / n, which is above 1e-5 for all rows in use.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import ggml_types
from edge_dtm.llamacpp import ggml
from edge_dtm.llamacpp.runner import LOG_VARIABLE

Layout = Literal["plain", "repacked"]
# One for gemv; five is a group of four and a rest for the repacked kernels; 32 fills any tile.
COLUMNS = (1, 5, 32)
MAX_ROWS = 256
_GROUP = 64  # a multiple of the rows that any repacked layout interleaves
_TOLERANCE, _TOLERANCE_F16, _TOLERANCE_KLEIDIAI = 1e-5, 1e-3, 5e-3
_STEP, _LARGEST, _BLOCK = 2.0**-7, 127, 32
_SEED = 22011
_CPU_DEVICE = 0  # enum ggml_backend_dev_type


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a GGUF file; offset: where in the file its first byte is."""

    component: str
    type: str
    rows: int
    row_length: int
    offset: int

    @property
    def row_bytes(self) -> int:
        return ggml_types.row_bytes(self.type, self.row_length)


@dataclass(frozen=True)
class KernelResult:
    """One kernel's worst relative error (see the module) on some rows of one real matrix.

    path: "plain", the file's own layout, or "repacked", that of `buffer`, which is ggml's name of
    the kind of memory the weights were in. relative_error is inf where ggml gave no finite number.
    """

    type: str
    path: Layout
    buffer: str
    columns: int
    rows: int
    row_length: int
    component: str
    relative_error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.relative_error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        error = self.relative_error if math.isfinite(self.relative_error) else None
        return asdict(self) | {"relative_error": error, "ok": self.ok}


def check_kernels(path: Path, threads: int) -> list[KernelResult]:
    """All kernels that the matrices of a GGUF need on this CPU, in the order of the file.

    At most MAX_ROWS rows of one matrix are in memory, and nothing else of the file but its head,
    read by ggml: gguf-py takes seconds for a large vocabulary. EdgeDtmError when the file is no
    whole GGUF, has no matrix, or has a type that gguf-py cannot decode.
    """
    path = Path(path)
    results: list[KernelResult] = []
    done: set[tuple[str, int, int]] = set()
    with Cpu(threads) as cpu:
        for matrix in cpu.matrices(path):
            # An odd vocabulary is not repacked, while other matrices of its type are.
            key = (matrix.type, matrix.row_length, matrix.rows % _GROUP)
            if key not in done:
                done.add(key)
                data = _some_data(path, matrix)
                weights = decode(matrix.type, data)
                results += check_rows(cpu, matrix.component, matrix.type, data, weights)
    if not results:
        raise EdgeDtmError(f"{path} has no weight matrix: it is no model; compress one")
    return results


def worst(results: Sequence[KernelResult]) -> KernelResult:
    """The one that comes closest to its tolerance, or exceeds it the most; ValueError if none."""
    return max(results, key=lambda r: r.relative_error / r.tolerance)


def decode(type_name: str, data: ggml.ByteArray) -> ggml.FloatArray:
    """The weights that blocks stand for by gguf-py, which shares no code with the kernels.

    data: uint8 (rows, row_bytes); float32 (rows, row_length). EdgeDtmError for a type it lacks.
    """
    kind = ggml_types.ggml_type(type_name)
    plain = {"F32": np.float32, "F16": np.float16}.get(type_name, np.uint8)
    try:
        return np.asarray(gguf.quants.dequantize(data.view(plain), kind), dtype=np.float32)
    except NotImplementedError:
        raise EdgeDtmError(
            f"the kernels of {type_name} cannot be checked, since gguf-py cannot decode it: "
            "update gguf"
        ) from None


def check_rows(
    cpu: Cpu, component: str, type_name: str, data: ggml.ByteArray, weights: ggml.FloatArray
) -> list[KernelResult]:
    """Multiply the bytes in each layout and for each number of columns, and compare.

    data: uint8 (rows, row_bytes), what ggml is handed; weights (rows, row_length): what they mean.
    """
    rows, row_length = weights.shape
    x = activations(max(COLUMNS), row_length)
    exact = x.astype(np.float64) @ weights.T.astype(np.float64)
    scale = np.abs(x).astype(np.float64) @ np.abs(weights).T.astype(np.float64)
    results = []
    for buffer, number, product in cpu.products(type_name, data, x, COLUMNS):
        results.append(
            KernelResult(
                type=type_name,
                path="plain" if buffer == cpu.plain else "repacked",
                buffer=buffer,
                columns=number,
                rows=rows,
                row_length=row_length,
                component=component,
                relative_error=_relative_error(product, exact[:number], scale[:number]),
                tolerance=_tolerance(type_name, buffer),
            )
        )
    return results


def activations(columns: int, row_length: int) -> ggml.FloatArray:
    """float32 (columns, row_length) that 8-bit rounding leaves as they are (see the module).

    Half of each block of 32 is positive, so that its sum is at most 16 * 127 steps.
    """
    random = np.random.default_rng(_SEED)
    blocks = -(-row_length // _BLOCK)
    steps = random.integers(0, _LARGEST + 1, (columns, blocks, _BLOCK))
    steps[..., 0] = _LARGEST
    steps[..., _BLOCK // 2 :] *= -1
    steps = random.permuted(steps, axis=2)
    # Either sign may be the one of the largest.
    steps *= random.choice((-1, 1), (columns, blocks, 1))
    flat = steps.reshape(columns, -1)[:, :row_length]
    return np.ascontiguousarray(flat * _STEP, dtype=np.float32)


def _some_rows(rows: int) -> npt.NDArray[np.int64]:
    """At most MAX_ROWS, evenly spread. Divided by _GROUP their number leaves the same rest as the
    whole's, so that a layout that needs whole groups of rows is taken if it is for the whole."""
    count = rows if rows <= MAX_ROWS else MAX_ROWS - _GROUP + rows % _GROUP
    return np.arange(count, dtype=np.int64) * rows // count


def _some_data(path: Path, matrix: Matrix) -> ggml.ByteArray:
    """The bytes of some rows, uint8 (rows, row_bytes). EdgeDtmError when the file ends before."""
    shape = (matrix.rows, matrix.row_bytes)
    try:
        whole = np.memmap(path, np.uint8, "r", matrix.offset, shape)
    except ValueError:
        raise EdgeDtmError(f"{path} is truncated in {matrix.component}: copy it again") from None
    return np.array(whole[_some_rows(matrix.rows)])


def _relative_error(
    product: ggml.FloatArray, exact: npt.NDArray[np.float64], scale: npt.NDArray[np.float64]
) -> float:
    difference = np.abs(product - exact)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A row of zeros has to give exactly zero; anything else of it is infinitely wrong.
        error = np.where(difference == 0, 0.0, difference / scale)
    return float(np.where(np.isnan(error), np.inf, error).max())


def _tolerance(type_name: str, buffer: str) -> float:
    if "KLEIDIAI" in buffer.upper():
        return _TOLERANCE_KLEIDIAI
    return _TOLERANCE_F16 if type_name == "F16" else _TOLERANCE


class _InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class _GgufParams(ctypes.Structure):
    """struct gguf_init_params"""

    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.POINTER(ctypes.c_void_p))]


_POINTER, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_load_all_from_path": (None, [ctypes.c_char_p]),
    "ggml_backend_dev_by_type": (_POINTER, [_INT]),
    "ggml_backend_dev_init": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_dev_backend_reg": (_POINTER, [_POINTER]),
    "ggml_backend_dev_buffer_type": (_POINTER, [_POINTER]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_POINTER, _POINTER]),
    "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, [_POINTER, _POINTER]),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_free": (None, [_POINTER]),
    "ggml_backend_graph_compute": (_INT, [_POINTER, _POINTER]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_init": (_POINTER, [_InitParams]),
    "ggml_free": (None, [_POINTER]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _INT, _LONG, _LONG]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_get_tensor": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_n_dims": (_INT, [_POINTER]),
    "ggml_nrows": (_LONG, [_POINTER]),
    "ggml_nelements": (_LONG, [_POINTER]),
    "gguf_init_from_file": (_POINTER, [ctypes.c_char_p, _GgufParams]),
    "gguf_free": (None, [_POINTER]),
    "gguf_get_n_tensors": (_LONG, [_POINTER]),
    "gguf_get_tensor_name": (ctypes.c_char_p, [_POINTER, _LONG]),
    "gguf_get_tensor_type": (_INT, [_POINTER, _LONG]),
    "gguf_get_tensor_offset": (_SIZE, [_POINTER, _LONG]),
    "gguf_get_data_offset": (_SIZE, [_POINTER]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead": (_SIZE, []),
}

_SILENCE = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)(lambda level, text, data: None)


def _type_name(kind: int) -> str:
    try:
        return str(gguf.GGMLQuantizationType(kind).name)
    except ValueError:
        raise EdgeDtmError(f"gguf-py does not know GGML type {kind}: update gguf") from None


class Cpu:
    """ggml's CPU backend, used as llama.cpp uses it: weights in a kind of buffer, then a graph.

    A context manager, which frees it.
    """

    def __init__(self, threads: int) -> None:
        """EdgeDtmError when the library has no CPU backend."""
        base = Path(ggml.library()._name)
        # The registry; dlsym on its handle also finds what is in the libraries it links.
        registry = base.with_name(base.name.replace("ggml-base", "ggml"))
        try:
            self._lib: Any = ctypes.CDLL(str(registry))
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self._lib, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise EdgeDtmError(
                f"ggml cannot be used directly ({error}): reinstall llama-cpp-python"
            ) from None
        device = self._lib.ggml_backend_dev_by_type(_CPU_DEVICE)
        if not device:
            # A build whose CPU backends are plug-ins beside the library.
            self._lib.ggml_backend_load_all_from_path(str(base.parent).encode())
            device = self._lib.ggml_backend_dev_by_type(_CPU_DEVICE)
        if not device:
            raise EdgeDtmError("ggml has no CPU backend: reinstall llama-cpp-python")
        self._device = device
        self._backend = self._lib.ggml_backend_dev_init(device, None)
        if set_threads := self._procedure("ggml_backend_set_n_threads"):
            ctypes.CFUNCTYPE(None, _POINTER, _INT)(set_threads)(self._backend, max(1, threads))
        self._plain_type = self._lib.ggml_backend_dev_buffer_type(device)
        self.plain = self._name(self._plain_type)

    def __enter__(self) -> Cpu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lib.ggml_backend_free(self._backend)

    def matrices(self, path: Path) -> list[Matrix]:
        """The weight matrices of a GGUF file in its order, from its head alone.

        EdgeDtmError when ggml cannot read it or it has a type that gguf-py does not know.
        """
        lib, context = self._lib, _POINTER()
        with self._quiet():
            file = lib.gguf_init_from_file(
                os.fsencode(path), _GgufParams(True, ctypes.pointer(context))
            )
        if not file:
            raise EdgeDtmError(f"{path} cannot be read as GGUF: copy it again")
        found = []
        try:
            start = lib.gguf_get_data_offset(file)
            for i in range(lib.gguf_get_n_tensors(file)):
                name = lib.gguf_get_tensor_name(file, i)
                tensor = lib.ggml_get_tensor(context, name)
                if lib.ggml_n_dims(tensor) != 2:
                    continue
                rows = int(lib.ggml_nrows(tensor))
                found.append(
                    Matrix(
                        component=name.decode(errors="replace").removesuffix(".weight"),
                        type=_type_name(lib.gguf_get_tensor_type(file, i)),
                        rows=rows,
                        row_length=int(lib.ggml_nelements(tensor)) // rows,
                        offset=int(start + lib.gguf_get_tensor_offset(file, i)),
                    )
                )
        finally:
            lib.gguf_free(file)
            lib.ggml_free(context)
        return found

    def products(
        self, type_name: str, data: ggml.ByteArray, x: ggml.FloatArray, columns: Sequence[int]
    ) -> Iterator[tuple[str, int, ggml.FloatArray]]:
        """ggml's products of the rows with the first columns of x, in each layout there is.

        data: uint8 (rows, row_bytes); x: float32 (max(columns), row_length). Yields the layout's
        buffer name, the number of columns and float32 (number, rows).
        """
        for buffer_type in (self._plain_type, *self._extra_types()):
            with self._weights(buffer_type, type_name, data, x.shape[1]) as (tensor, fill):
                for number in columns:
                    product = self._multiply(tensor, fill, len(data), x[:number])
                    if product is not None:
                        yield self._name(buffer_type), number, product

    def _name(self, buffer_type: int) -> str:
        return str(self._lib.ggml_backend_buft_name(buffer_type).decode())

    def _procedure(self, name: str) -> int | None:
        registry = self._lib.ggml_backend_dev_backend_reg(self._device)
        found: int | None = self._lib.ggml_backend_reg_get_proc_address(registry, name.encode())
        return found

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """ggml says on stderr what it repacks; the log is the process's, so it is given back."""
        if os.environ.get(LOG_VARIABLE) == "1" or not hasattr(self._lib, "ggml_log_get"):
            yield
            return
        callback, user_data = _POINTER(), _POINTER()
        self._lib.ggml_log_get(ctypes.byref(callback), ctypes.byref(user_data))
        self._lib.ggml_log_set(_SILENCE, None)
        try:
            yield
        finally:
            self._lib.ggml_log_set(callback, user_data)

    def _extra_types(self) -> list[int]:
        """Kinds of buffer that repack weights; none where the CPU has no use for it."""
        address = self._procedure("ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        get = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)
        found, out = get(self._device), list[int]()
        while found and found[len(out)]:  # ends with a null pointer
            out.append(int(found[len(out)]))
        return out

    @contextmanager
    def _context(self, tensors: int) -> Iterator[int]:
        size = tensors * self._lib.ggml_tensor_overhead() + self._lib.ggml_graph_overhead()
        context = self._lib.ggml_init(_InitParams(size, None, True))
        try:
            yield context
        finally:
            self._lib.ggml_free(context)

    @contextmanager
    def _weights(
        self, buffer_type: int, type_name: str, data: ggml.ByteArray, row_length: int
    ) -> Iterator[tuple[int, Callable[[], None]]]:
        """A weight tensor in that kind of buffer, and what copies (and repacks) the bytes to it."""
        data = np.ascontiguousarray(data)
        with self._context(1) as context:
            kind = int(ggml_types.ggml_type(type_name))
            tensor = self._lib.ggml_new_tensor_2d(context, kind, row_length, len(data))
            buffer = self._lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            if not buffer:
                raise EdgeDtmError("no memory to check the kernels: close other programs")
            filled = False

            def fill() -> None:
                nonlocal filled
                if not filled:
                    with self._quiet():
                        self._lib.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
                filled = True

            try:
                yield tensor, fill
            finally:
                self._lib.ggml_backend_buffer_free(buffer)

    def _multiply(
        self, weights: int, fill: Callable[[], None], rows: int, x: ggml.FloatArray
    ) -> ggml.FloatArray | None:
        """The product, or None where this kind of buffer has no layout for such weights."""
        lib = self._lib
        with self._context(4) as context:
            inputs = lib.ggml_new_tensor_2d(
                context, int(ggml_types.ggml_type("F32")), *x.shape[::-1]
            )
            outputs = lib.ggml_mul_mat(context, weights, inputs)
            if not lib.ggml_backend_dev_supports_op(self._device, outputs):
                return None
            graph = lib.ggml_new_graph(context)
            lib.ggml_build_forward_expand(graph, outputs)
            buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, self._plain_type)
            if not buffer:
                raise EdgeDtmError("no memory to check the kernels: close other programs")
            try:
                fill()
                x = np.ascontiguousarray(x)
                lib.ggml_backend_tensor_set(inputs, x.ctypes.data, 0, x.nbytes)
                status = lib.ggml_backend_graph_compute(self._backend, graph)
                if status:
                    raise EdgeDtmError(f"ggml could not multiply a matrix (status {status})")
                out = np.empty((len(x), rows), dtype=np.float32)
                lib.ggml_backend_tensor_get(outputs, out.ctypes.data, 0, out.nbytes)
                return out
            finally:
                lib.ggml_backend_buffer_free(buffer)
