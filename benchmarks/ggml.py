"""llama.cpp's Q4_0 matrix product, through the C API of the ggml libraries that llama-cpp-python carries.

The weights lie in ggml's "repack" buffers where this processor has one: the fast layout that llama.cpp itself picks
when it loads a model. Activations are float32, as ggml takes them; it rounds them to int8 in blocks of 32 inside.
"""

import ctypes
import importlib.util
import itertools
import math
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

F32, Q4_0 = 0, 2  # enum ggml_type
INSTALL = "pip install llama-cpp-python"


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    names = [folder / name for name in ("libggml-base.so", "libggml-cpu.so")]
    if not all(name.is_file() for name in names):
        return None
    base, cpu = (ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL) for name in names)
    signatures = {
        "ggml_init": (c_void_p, [_InitParams]),
        "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
        "ggml_new_graph": (c_void_p, [c_void_p]),
        "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
        "ggml_quantize_chunk": (
            c_size_t,
            [c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)],
        ),
        "ggml_row_size": (c_size_t, [c_int, c_int64]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
        "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
        "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
        "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
        "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
        "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_backend_cpu_init.restype = cpu.ggml_backend_cpu_reg.restype = c_void_p
    cpu.ggml_backend_cpu_set_n_threads.argtypes = [c_void_p, c_int]
    return base, cpu


def missing() -> str | None:
    return None if _libraries() else f"it is not installed: {INSTALL}"


@cache
def _repack_buffers() -> int | None:
    """The buffer type that rearranges Q4_0 weights for this processor, or None."""
    libraries = _libraries()
    assert libraries is not None
    base, cpu = libraries
    registry = cpu.ggml_backend_cpu_reg()
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(base.ggml_backend_reg_dev_get(registry, 0))
    for index in itertools.count():
        if not listed or not listed[index]:
            return None
        if b"REPACK" in base.ggml_backend_buft_name(listed[index]).upper():
            return listed[index]
    return None


class _Product:
    """x [M, K] float32 times a Q4_0 weight [N, K]."""

    def __init__(self, backend: int, weight: Tensor, x: Tensor):
        libraries = _libraries()
        assert libraries is not None
        self.base = base = libraries[0]
        self.backend = backend
        (outputs, inputs), rows = weight.shape, len(x)
        weights, rest = (base.ggml_init(_InitParams(1 << 20, None, True)) for _ in range(2))
        w = base.ggml_new_tensor_2d(weights, Q4_0, inputs, outputs)
        self.x = base.ggml_new_tensor_2d(rest, F32, inputs, rows)
        self.y = base.ggml_mul_mat(rest, w, self.x)
        self.graph = base.ggml_new_graph(rest)
        base.ggml_build_forward_expand(self.graph, self.y)
        repack = _repack_buffers()
        if repack:
            base.ggml_backend_alloc_ctx_tensors_from_buft(weights, repack)
        else:
            base.ggml_backend_alloc_ctx_tensors(weights, backend)
        base.ggml_backend_alloc_ctx_tensors(rest, backend)
        size = base.ggml_row_size(Q4_0, inputs) * outputs
        codes = ctypes.create_string_buffer(size)
        source = weight.float().contiguous()
        floats = ctypes.cast(source.data_ptr(), POINTER(c_float))
        base.ggml_quantize_chunk(Q4_0, floats, codes, 0, outputs, inputs, None)
        base.ggml_backend_tensor_set(w, codes, 0, size)
        self.out = torch.empty(rows, outputs)
        self.load(x)

    def load(self, x: Tensor) -> None:
        x = x.float().contiguous()
        self.base.ggml_backend_tensor_set(self.x, x.data_ptr(), 0, x.nbytes)

    def run(self) -> None:
        self.base.ggml_backend_graph_compute(self.backend, self.graph)

    def result(self) -> Tensor:
        self.base.ggml_backend_tensor_get(self.y, self.out.data_ptr(), 0, self.out.nbytes)
        return self.out


def q4_0_side(weight: Tensor, x: Tensor, calls: int, threads: int) -> Callable[[], None] | None:
    """`calls` products over rotating copies of the weight; None where ggml is missing or 32 does not divide K."""
    libraries = _libraries()
    if libraries is None or weight.shape[1] % 32:
        return None
    backend = libraries[1].ggml_backend_cpu_init()
    libraries[1].ggml_backend_cpu_set_n_threads(backend, threads)
    copies = [_Product(backend, weight, x) for _ in range(max(2, math.ceil((160 << 20) / (weight.numel() // 2))))]
    copies[0].run()
    exact = x.float() @ weight.float().t()
    error = ((copies[0].result() - exact).norm() / exact.norm()).item()
    if error > 0.2:  # 4 bits cost about 0.08
        raise RuntimeError(f"ggml's Q4_0 product is off by {error:.2f}: its C API has changed.")
    turn = itertools.cycle(copies)

    def run() -> None:
        for _ in range(calls):
            next(turn).run()

    return run
