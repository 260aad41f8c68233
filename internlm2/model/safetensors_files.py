"""Tensor files of a checkpoint folder, one tensor in memory at a time.

A safetensors file is 8 bytes of header length, a JSON header {name: dtype, shape, byte range}, and the bytes. It is
read and written here rather than by the library, whose messages name neither file nor tensor and whose writer wants
every tensor in memory at once. PyTorch .bin files are read with weights_only=True and are never written.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm2.config import ConfigError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies and how to get it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds; the tensors are read later, one by one.

    ConfigError where the file is no safetensors, or is truncated, or holds a type that is no weight.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > LARGEST_HEADER:
            raise ConfigError(f"{path} is not a safetensors file: its first 8 bytes are no header length.")
        if 8 + length > size:
            raise ConfigError(f"{path} is truncated inside its header: copy or download it again.")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a safetensors file: its header does not parse.") from error
    tensors = {}
    for name, (code, shape, start, stop) in entries.items():
        if code not in _DTYPES:
            raise ConfigError(
                f"{path}: tensor {name} is stored as {code}, not as a plain float. "
                "Quantized checkpoints are not read: use the original weights."
            )
        begin, end = 8 + length + start, 8 + length + stop
        if end > size:
            raise ConfigError(
                f"{path} is truncated: tensor {name} ends at byte {end:,}, the file has {size:,}. Download it again."
            )
        elements = 1
        for extent in shape:
            elements *= extent
        if elements * _DTYPES[code].itemsize != end - begin:
            raise ConfigError(f"{path}: tensor {name} has {end - begin} bytes, which do not fit {code} {list(shape)}.")
        tensors[name] = StoredTensor(path, shape, _DTYPES[code], _slice_reader(path, begin, end, _DTYPES[code], shape))
    return tensors


def _slice_reader(path: Path, begin: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        content = torch.empty(end - begin, dtype=torch.uint8)
        with open(path, "rb") as file:
            file.seek(begin)
            if file.readinto(content.numpy().data) != end - begin:
                raise ConfigError(f"{path} became shorter while it was read.")
        return content.view(dtype).view(shape)

    return read


def read_pytorch_file(path: Path) -> dict[str, StoredTensor]:
    """What a PyTorch state-dict file holds. Loaded with weights_only=True and memory-mapped; no code in it runs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"{path} cannot be loaded as plain tensors ({str(error).splitlines()[0]}). "
            "Files that need to run code are refused: convert it to safetensors where it came from."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ConfigError(f"{path} holds something else than a flat dictionary of tensors.")

    def reader(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor.clone()

    return {
        name: StoredTensor(path, tuple(tensor.shape), tensor.dtype, reader(tensor)) for name, tensor in state.items()
    }


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder: sharded with an index, or in one file; safetensors before PyTorch files."""
    for stem, suffix, read in (
        ("model", "safetensors", read_safetensors),
        ("pytorch_model", "bin", read_pytorch_file),
    ):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            return _read_sharded(index, read)
        if single.is_file():
            return read(single)
    raise ConfigError(
        f"{folder} holds no weights: expected model.safetensors or model.safetensors.index.json "
        "(or the same with pytorch_model and .bin)."
    )


def _read_sharded(index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} is not an index: it has no weight_map of tensor names to files.") from error
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, file in weight_map.items():
        if file not in shards:
            if not (index.parent / file).is_file():
                raise ConfigError(f"{index.parent / file} is missing; {index.name} says that it holds {name}.")
            shards[file] = read(index.parent / file)
        if name not in shards[file]:
            raise ConfigError(f"{index.parent / file} does not hold {name}, although {index.name} says so.")
    return {name: shards[file][name] for name, file in weight_map.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: what the header needs before any data is there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        elements = 1
        for extent in self.shape:
            elements *= extent
        return elements * self.dtype.itemsize


class SafetensorsWriter:
    """Writes one file tensor by tensor, in any order; `close` makes it durable and says what never came."""

    def __init__(self, path: Path, plan: Iterable[PlannedTensor]) -> None:
        self.path = path
        self._left: dict[str, tuple[PlannedTensor, int]] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in plan:
            header[entry.name] = {
                "dtype": _CODES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.bytes],
            }
            self._left[entry.name] = entry, offset
            offset += entry.bytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
        self._data_start = 8 + len(text)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close or discard)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """One planned tensor, cast to its planned dtype."""
        if name not in self._left:
            raise ConfigError(f"{name} was given twice for {self.path.name}.")
        entry, offset = self._left.pop(name)
        if tuple(tensor.shape) != entry.shape:
            raise ConfigError(
                f"{name} has shape {list(tensor.shape)}, {self.path.name} has room for {list(entry.shape)}."
            )
        content = tensor.detach().to("cpu", entry.dtype).contiguous().reshape(-1)
        self._file.seek(self._data_start + offset)
        if content.numel():
            self._file.write(content.view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Flush and fsync. ConfigError where a planned tensor was not written."""
        if self._left:
            raise ConfigError(f"{next(iter(self._left))} was not given ({len(self._left)} tensors missing in all).")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Close without any promise; safe to call after `close`."""
        self._file.close()
