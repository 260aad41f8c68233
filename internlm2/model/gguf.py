"""A reader for GGUF files with numpy alone: metadata, and F32, F16, BF16, Q4_0, Q4_1 and Q8_0 tensors."""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internlm2.config import ConfigError

# Metadata value types of the format: struct code and numpy dtype; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Tensor types: name, weights in a block, bytes in a block.
_BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    kind: int
    start: int


class GGUF:
    """An open file: `metadata`, `shapes` (row-major, as PyTorch writes them) and `read(name)`."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        self._at = 0
        if self._data[:4] != b"GGUF":
            raise ConfigError(f"{path} is not a GGUF file.")
        self._at = 4
        try:
            version, tensors, keys = self._number("I"), self._number("Q"), self._number("Q")
            if version not in (2, 3):
                raise ConfigError(f"{path} is GGUF version {version}; versions 2 and 3 are readable.")
            self.metadata: dict[str, Any] = {}
            for _ in range(keys):
                key = self._string()
                self.metadata[key] = self._value(self._number("I"))
            self._entries = self._tensor_entries(tensors)
        except (struct.error, ValueError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is truncated or damaged inside its header.") from error
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantized to float32."""
        entry = self._entries[name]
        kind, per_block, size = _BLOCKS[entry.kind]
        blocks = math.prod(entry.shape) // per_block
        raw = np.frombuffer(self._data, np.uint8, blocks * size, entry.start)
        return _dequantize(kind, raw.reshape(blocks, size)).reshape(entry.shape)

    def _tensor_entries(self, count: int) -> dict[str, _Entry]:
        found = []
        for _ in range(count):
            name = self._string()
            shape = tuple(self._number("Q") for _ in range(self._number("I")))[::-1]
            found.append((name, shape, self._number("I"), self._number("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        base = -(-self._at // alignment) * alignment
        entries = {}
        for name, shape, kind, offset in found:
            if kind not in _BLOCKS:
                known = ", ".join(block[0] for block in _BLOCKS.values())
                raise ConfigError(f"{self.path}: tensor {name} has quantization type {kind}; readable are {known}.")
            _, per_block, size = _BLOCKS[kind]
            end = base + offset + math.prod(shape) // per_block * size
            if end > len(self._data):
                raise ConfigError(
                    f"{self.path} is truncated: tensor {name} ends at byte {end:,}, the file has {len(self._data):,}."
                )
            entries[name] = _Entry(shape, kind, base + offset)
        return entries

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._number("Q")
        if self._at + length > len(self._data):
            raise ValueError("a string runs past the end")
        content = self._data[self._at : self._at + length]
        self._at += length
        return content.decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._number("I"), self._number("Q")
            if element not in _SCALARS:
                return [self._value(element) for _ in range(count)]
            dtype = np.dtype("<" + _SCALARS[element])
            values = np.frombuffer(self._data, dtype, count, self._at)
            self._at += values.nbytes
            return values.tolist()
        return self._number(_SCALARS[kind])


def _dequantize(kind: str, blocks: np.ndarray) -> np.ndarray:
    """uint8 blocks [n, bytes] -> float32 [n, weights]."""
    if kind == "F32":
        return blocks.view("<f4").copy()
    if kind == "F16":
        return blocks.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == "Q8_0":
        return blocks[:, 2:].copy().view(np.int8) * scale
    # Four-bit blocks hold the first 16 weights in the low halves of the bytes, the last 16 in the high halves.
    low = 2 if kind == "Q4_0" else 4
    nibbles = np.concatenate([blocks[:, low:] & 15, blocks[:, low:] >> 4], axis=1).astype(np.float32)
    if kind == "Q4_0":
        return (nibbles - 8) * scale
    return nibbles * scale + blocks[:, 2:4].copy().view("<f2").astype(np.float32)
