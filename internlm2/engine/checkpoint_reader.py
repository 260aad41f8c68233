"""Reading checkpoints: the newest that is whole, on any number of ranks, only the ranges that a rank needs."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from internlm2.engine.base import Engine, Fragment
from internlm2.engine.checkpoint_format import (
    FORMAT,
    INDEX,
    STATE,
    CheckpointError,
    file_hash,
    list_checkpoints,
    parse_key,
    step_directory,
)

log = logging.getLogger(__name__)

SumOverRanks = Callable[[Sequence[float]], list[float]]


def find_fault(path: Path, *, rank: int = 0, world_size: int = 1) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, or None. Of the hashes this rank checks every `world_size`-th
    file.
    """
    try:
        index = json.loads((path / INDEX).read_text())
        files = index["files"]
        if index["format"] != FORMAT:
            return f"its format is {index['format']}, this version reads {FORMAT}"
        for number, (name, entry) in enumerate(sorted(files.items())):
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != entry["bytes"]:
                return (
                    f"{name} is truncated: {size} of {entry['bytes']} bytes"
                    if size < entry["bytes"]
                    else f"{name} is too long"
                )
            if number % world_size == rank and file_hash(file) != entry["sha256"]:
                return f"{name} is corrupted: its SHA-256 is not the one in {INDEX}"
    except FileNotFoundError:
        return f"it is incomplete: no {INDEX}"
    except (KeyError, TypeError, AttributeError, ValueError):
        return f"{INDEX} is corrupted"
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def find_newest(
    directory: Path, *, rank: int = 0, world_size: int = 1, reduce_sum: SumOverRanks = list
) -> tuple[Path | None, list[str]]:
    """(newest checkpoint below `directory` that every rank finds whole, one sentence for each newer one that was
    skipped).

    None where there is no usable checkpoint. Collective: every rank calls it and gets the same path. The candidates are
    those that rank 0 sees, after its writer has published: another rank's listing may be older.
    """
    skipped: list[str] = []
    listed = [step for step, _ in reversed(list_checkpoints(directory))] if rank == 0 else []
    for number in range(int(reduce_sum([float(len(listed))])[0])):
        step = int(reduce_sum([float(listed[number]) if rank == 0 else 0.0])[0])
        path = step_directory(directory, step)
        fault = find_fault(path, rank=rank, world_size=world_size)
        if reduce_sum([0.0 if fault is None else 1.0])[0] == 0:
            return path, skipped
        skipped.append(f"Skipped {path}: {fault or 'another rank found a fault'}.")
        log.warning(skipped[-1])
    return None, skipped


class CheckpointReader:
    """One checkpoint directory. Opens the ranks' files through memory maps and reads only what is asked for.

    It does not check hashes; `find_newest` and `find_fault` do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            index = json.loads((path / INDEX).read_text())
            self.state: dict[str, Any] = json.loads((path / STATE).read_text())
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(shape) for name, shape in index["parameters"].items()
            }
            self.step: int = int(self.state["step"])
            self._files = {
                name: safe_open(path / name, "pt") for name in index["files"] if name.endswith(".safetensors")
            }
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is no complete checkpoint: {error.filename or error} is missing.") from error
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}.") from error
        # (name, kind) -> (start, end, file, key) of each stored piece
        self._pieces: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for file, handle in self._files.items():
            for key in handle.keys():  # noqa: SIM118 (a handle, not a dict)
                name, kind, offset = parse_key(key)
                length = handle.get_slice(key).get_shape()[0]
                self._pieces.setdefault((name, kind), []).append((offset, offset + length, file, key))

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError, naming the tensor and both shapes, unless the checkpoint holds exactly `expected`."""
        for name, shape in expected.items():
            if name not in self.shapes:
                raise CheckpointError(
                    f"{self.path} has no tensor {name}, which this model trains: is it another model's checkpoint?"
                )
            if self.shapes[name] != tuple(shape):
                raise CheckpointError(
                    f"{self.path} holds {name} with shape {list(self.shapes[name])} but this model has {list(shape)}"
                    f"{_vocabulary_hint(name, self.shapes[name], tuple(shape))}."
                )
        unknown = sorted(self.shapes.keys() - expected.keys())
        if unknown:
            raise CheckpointError(
                f"{self.path} holds {unknown[0]}, which this model does not train: is it another model's checkpoint?"
            )

    def read(self, name: str, kind: str, start: int, end: int, into: torch.Tensor) -> None:
        """Copy elements [start, end) of the flattened tensor into the 1-D tensor `into` (any device, any float
        dtype).
        """
        covered = 0
        for first, last, file, key in self._pieces.get((name, kind), []):
            low, high = max(first, start), min(last, end)
            if low < high:
                into[low - start : high - start].copy_(self._files[file].get_slice(key)[low - first : high - first])
                covered += high - low
        if covered != end - start:
            raise CheckpointError(
                f"{self.path} holds {covered} of the {end - start} elements of {name} ({kind}) from {start} to {end}: "
                "it is damaged, or a rank's file belongs to another save."
            )

    def full(self, name: str, kind: str = "weight") -> torch.Tensor:
        """One whole tensor, fp32, on the host."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.path} has no tensor {name}.")
        tensor = torch.empty(self.shapes[name], dtype=torch.float32)
        self.read(name, kind, 0, tensor.numel(), tensor.view(-1))
        return tensor

    @torch.no_grad()
    def load_fragments(self, fragments: Iterable[Fragment]) -> None:
        """Fill the live views of `fragments`, whatever partition the checkpoint was saved with."""
        for fragment in fragments:
            end = fragment.offset + fragment.view.numel()
            self.read(fragment.name, fragment.kind, fragment.offset, end, fragment.view)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter in full, fp32, on the host, one after the other: for a hand-over or an export."""
        for name in self.shapes:
            yield name, self.full(name)

    def restore(self, engine: Engine, *, after_rollback: bool = False) -> None:
        """Weights, moments and the engine's own state into `engine`; shapes are checked before anything is touched."""
        self.check_shapes(engine.shapes())
        self.load_fragments(engine.fragments())
        engine.fragments_changed()
        engine.load_state_dict(self.state["engine"], after_rollback=after_rollback)


def restore_newest(
    engine: Engine, directory: Path, *, after_rollback: bool = False
) -> tuple[dict[str, Any] | None, list[str]]:
    """Restore `engine` from the newest whole checkpoint below `directory`.

    Returns (its state.json, skipped), or (None, skipped) where there is none and the engine is as it was.
    """
    path, skipped = find_newest(directory, rank=engine.rank, world_size=engine.world_size, reduce_sum=engine.reduce_sum)
    if path is None:
        return None, skipped
    reader = CheckpointReader(path)
    reader.restore(engine, after_rollback=after_rollback)
    return reader.state, skipped


def _vocabulary_hint(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    tables = ("tok_embeddings", "output", "embed_tokens", "lm_head")
    if any(table in name for table in tables) and stored[1:] == wanted[1:]:
        return f": the vocabulary has {stored[0]} tokens there and {wanted[0]} here"
    return ""
