"""The checkpoint on disk: names, the index, and one file of fragments a rank.

    checkpoints/step_00000400/
        rank00000.safetensors   1-D fp32 tensors `name|kind|offset`: the pieces that this rank owned
        rank00001.safetensors   ...
        index.json              {"format": 1, "world_size", "parameters": {name: shape},
                                 "files": {file: {"bytes", "sha256"}}}
        state.json              step, position, generators, the engine's and the stage's own state

Any safetensors reader opens the files. A directory whose name starts with a dot is not a checkpoint: it is being
written, replaced or deleted.
"""

import base64
import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
INDEX = "index.json"
STATE = "state.json"
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the text says which, why, and what to do."""


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` (number of finished steps) lies."""
    return directory / f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """File of the fragments that `rank` owned."""
    return f"rank{rank:05d}.safetensors"


def fragment_key(name: str, kind: str, offset: int) -> str:
    """Key of a fragment in its file."""
    return f"{name}|{kind}|{offset}"


def parse_key(key: str) -> tuple[str, str, int]:
    """(name, kind, offset) of a key; a parameter's name may itself hold bars."""
    name, kind, offset = key.rsplit("|", 2)
    return name, kind, int(offset)


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that carries a checkpoint's name, oldest first. Says nothing about whether it can be
    read.
    """
    if not directory.is_dir():
        return []
    found = [(_STEP.fullmatch(entry.name), entry) for entry in directory.iterdir() if entry.is_dir()]
    return sorted((int(match[1]), entry) for match, entry in found if match)


def write_fragments(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write 1-D fp32 host tensors as safetensors, fsync, return {"bytes", "sha256"}.

    Written here rather than by safetensors' own `save_file`, which builds a second copy of everything in memory and
    would need a second pass over the file for the hash.
    """
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * 4
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in (len(text).to_bytes(8, "little"), text, *(_bytes_of(t) for t in tensors.values())):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}


def _bytes_of(tensor: torch.Tensor) -> memoryview | bytes:
    return tensor.numpy().data.cast("B") if tensor.numel() else b""


def write_json(path: Path, content: str) -> dict[str, Any]:
    """Write a JSON text, fsync, return {"bytes", "sha256"}."""
    data = content.encode()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; file systems that cannot (some network ones) say EINVAL."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def pack_generator(generator: torch.Generator) -> str:
    """State of a random generator as text for state.json."""
    return base64.b64encode(zlib.compress(generator.get_state().numpy().tobytes())).decode()


def unpack_generator(text: str, generator: torch.Generator) -> None:
    """Restore what `pack_generator` gave into a generator of the same device type."""
    data = bytearray(zlib.decompress(base64.b64decode(text)))
    generator.set_state(torch.frombuffer(data, dtype=torch.uint8))
