"""Loads the compiled kernels beside this file, or says once how to build them."""

import ctypes
import functools
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
BUILD_COMMAND = "pip install -e . --no-build-isolation"


@functools.cache
def load_cpu() -> bool:
    """True when libinternlm2_cpu.so is there and loads; otherwise one warning a process, and False ever after."""
    library = FOLDER / "libinternlm2_cpu.so"
    reason = None if library.is_file() else "it was not built"
    if reason is None:
        try:
            torch.ops.load_library(str(library))
        except OSError as error:  # built against another torch
            reason = str(error)
    if reason is not None:
        warnings.warn(
            f"internlm2's CPU kernels are not used ({reason}): plain PyTorch runs instead, several times slower. "
            f"Build them in the source folder with `{BUILD_COMMAND}`.",
            stacklevel=2,
        )
    return reason is None


@torch.compiler.assume_constant_result
def loaded(device_type: str) -> bool:
    """Whether the kernels for "cpu" or "cuda" tensors are there; loads them at the first call."""
    return {"cpu": load_cpu, "cuda": load_cuda}.get(device_type, bool)()


def native(operator: str, device: torch.device, backend: str = "auto") -> bool:
    """Whether the compiled operator runs on this device. `backend`: native insists on it, reference rules it out."""
    if backend not in ("auto", "native", "reference"):
        raise ValueError(f"backend {backend!r} does not exist: use auto, native or reference.")
    there = (
        backend != "reference"
        and loaded(device.type)
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"internlm2::{operator}", device.type.upper())
    )
    if backend == "native" and not there:
        raise ValueError(f"internlm2's {operator} is not built for {device.type}.")
    return there


def instruction_set() -> str:
    """Which of the CPU kernels runs here: avx512_bf16, avx512, avx2 or portable; "none" where not built."""
    if not load_cpu():
        return "none"
    name = ctypes.CDLL(str(FOLDER / "libinternlm2_cpu.so")).internlm2_cpu_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()


@functools.cache
def load_cuda() -> bool:
    """True when this torch has CUDA and libinternlm2_cuda.so is there and loads. Quiet: other backends are as good."""
    library = FOLDER / "libinternlm2_cuda.so"
    if torch.version.cuda is None or not library.is_file():
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        warnings.warn(f"internlm2's CUDA kernels do not load: {error}. Rebuild: `{BUILD_COMMAND}`.", stacklevel=2)
        return False
    return True
