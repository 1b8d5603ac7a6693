"""ggml's CPU backend, called directly: single matrix products in each layout of the weights."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np

from edge_dtm.core.errors import EdgeDtmError
from edge_dtm.formats import ggml_types
from edge_dtm.llamacpp import ggml, llama

_CPU_DEVICE = 0  # enum ggml_backend_dev_type


class _InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


_POINTER, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
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
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead": (_SIZE, []),
}


class CpuBackend(AbstractContextManager["CpuBackend"]):
    """ggml's CPU backend, used as llama.cpp uses it: weights in a kind of buffer, then a graph."""

    def __init__(self, threads: int) -> None:
        """EdgeDtmError when the library has no CPU backend."""
        llama.redirect_log(llama.library())  # ggml says on stderr what it repacks
        self._lib = ggml.library()
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        device = self._lib.ggml_backend_dev_by_type(_CPU_DEVICE)
        if not device:
            raise EdgeDtmError("ggml has no CPU backend: reinstall llama-cpp-python")
        self._device = device
        self._backend = self._lib.ggml_backend_dev_init(device, None)
        if set_threads := self._procedure("ggml_backend_set_n_threads"):
            ctypes.CFUNCTYPE(None, _POINTER, _INT)(set_threads)(self._backend, max(1, threads))
        self._plain_type = self._lib.ggml_backend_dev_buffer_type(device)
        self.plain = self._name(self._plain_type)

    def __exit__(self, *error: object) -> None:
        self._lib.ggml_backend_free(self._backend)

    def products(
        self, type_name: str, data: ggml.ByteArray, x: ggml.FloatArray, columns: Sequence[int]
    ) -> Iterator[tuple[str, int, ggml.FloatArray]]:
        """ggml's products of the rows with the first columns of x, in each layout there is.

        data: uint8 (rows, row_bytes); x: float32 (max(columns), row_length). Yields the layout's
        buffer name, the number of columns and float32 (number, rows).
        """
        for buffer_type in (self._plain_type, *self._extra_types()):
            for number in columns:
                product = self._product(buffer_type, type_name, data, x[:number])
                if product is not None:
                    yield self._name(buffer_type), number, product

    def _name(self, buffer_type: int) -> str:
        return str(self._lib.ggml_backend_buft_name(buffer_type).decode())

    def _procedure(self, name: str) -> int | None:
        registry = self._lib.ggml_backend_dev_backend_reg(self._device)
        address: int | None = self._lib.ggml_backend_reg_get_proc_address(registry, name.encode())
        return address

    def _extra_types(self) -> list[int]:
        """Kinds of buffer that repack weights; none where the CPU has no use for it."""
        address = self._procedure("ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        get = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)
        pointers, types = get(self._device), list[int]()
        while pointers and pointers[len(types)]:  # ends with a null pointer
            types.append(int(pointers[len(types)]))
        return types

    def _context(self, stack: ExitStack, tensors: int) -> int:
        size = tensors * self._lib.ggml_tensor_overhead() + self._lib.ggml_graph_overhead()
        context: int = self._lib.ggml_init(_InitParams(size, None, True))
        stack.callback(self._lib.ggml_free, context)
        return context

    def _allocate(self, stack: ExitStack, context: int, buffer_type: int) -> None:
        """Memory of that kind for all tensors of the context."""
        buffer = self._lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            raise EdgeDtmError("no memory to check the kernels: close other programs")
        stack.callback(self._lib.ggml_backend_buffer_free, buffer)

    def _product(
        self, buffer_type: int, type_name: str, data: ggml.ByteArray, x: ggml.FloatArray
    ) -> ggml.FloatArray | None:
        """The product, or None where this kind of buffer has no layout for such weights."""
        lib = self._lib
        data, x = np.ascontiguousarray(data), np.ascontiguousarray(x)
        number, float_number = (ggml_types.facts(t).number for t in (type_name, "F32"))
        with ExitStack() as stack:
            weights_context, context = self._context(stack, 1), self._context(stack, 4)
            weights = lib.ggml_new_tensor_2d(weights_context, number, x.shape[1], len(data))
            inputs = lib.ggml_new_tensor_2d(context, float_number, *x.shape[::-1])
            outputs = lib.ggml_mul_mat(context, weights, inputs)
            self._allocate(stack, weights_context, buffer_type)
            if not lib.ggml_backend_dev_supports_op(self._device, outputs):
                return None
            graph = lib.ggml_new_graph(context)
            lib.ggml_build_forward_expand(graph, outputs)
            self._allocate(stack, context, self._plain_type)
            lib.ggml_backend_tensor_set(weights, data.ctypes.data, 0, data.nbytes)
            lib.ggml_backend_tensor_set(inputs, x.ctypes.data, 0, x.nbytes)
            if status := lib.ggml_backend_graph_compute(self._backend, graph):
                raise EdgeDtmError(f"ggml could not multiply a matrix (status {status})")
            out = np.empty((len(x), len(data)), dtype=np.float32)
            lib.ggml_backend_tensor_get(outputs, out.ctypes.data, 0, out.nbytes)
            return out
