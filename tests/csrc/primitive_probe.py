"""Runs the primitives of csrc/cuda/primitives.cuh, each on 32 lanes, on the emulation or on a GPU."""

import ctypes
from pathlib import Path

import numpy as np

IN_WORDS, OUT_WORDS = 12, 4
SOURCE = Path(__file__).with_name("primitives_probe.cu")


class Probe:
    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def __call__(self, name: str, words: np.ndarray) -> np.ndarray:
        """`words` [32, up to 12] uint32 -> [32, 4] uint32. RuntimeError with the emulation's or CUDA's message."""
        inputs = np.zeros((32, IN_WORDS), dtype=np.uint32)
        inputs[:, : words.shape[1]] = words
        buffer = np.zeros(inputs.size + 4, dtype=np.uint32)  # placed on a 16-byte boundary, as device memory is
        offset = -(buffer.ctypes.data // 4) % 4
        aligned = buffer[offset : offset + inputs.size].reshape(inputs.shape)
        aligned[:] = inputs
        outputs = np.zeros((32, OUT_WORDS), dtype=np.uint32)
        message = ctypes.create_string_buffer(256)
        pointers = (aligned.ctypes.data_as(ctypes.c_void_p), outputs.ctypes.data_as(ctypes.c_void_p))
        if self._library.probe(name.encode(), *pointers, message):
            raise RuntimeError(message.value.decode())
        return outputs
