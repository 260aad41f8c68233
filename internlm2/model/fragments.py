"""Weights out of a training checkpoint of ours: 1-D float32 fragments `name|kind|offset`, one file a rank.

<run>/config.yaml                                the composed config; its key `model` is the shape
<run>/checkpoints/step_00000400/index.json       {"parameters": {name: shape}, "files": {file: ...}}
<run>/checkpoints/step_00000400/rank*.safetensors
"""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from internlm2.config import ConfigError, ModelConfig, RopeScalingConfig
from internlm2.model.safetensors_files import StoredTensor, read_safetensors

_STEP = re.compile(r"step_(\d+)")


class Checkpoint:
    """One checkpoint folder: `config`, `shapes` of its parameters, `run` (the stage's directory), `read(name)`."""

    def __init__(self, path: Path):
        self.path, self.run = path, path.resolve().parent.parent
        self.config = read_run_config(self.run)
        index = _json(path / "index.json")
        try:
            shapes = {name: tuple(shape) for name, shape in index["parameters"].items()}
            # A PPO checkpoint holds its critic beside the policy, for training to go on.
            self.shapes = {name: shape for name, shape in shapes.items() if not name.startswith("critic.")}
        except (KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path / 'index.json'} is damaged: it has no parameters with shapes.") from error
        self._pieces: dict[str, list[tuple[int, StoredTensor]]] = {}
        for file in sorted(path.glob("rank*.safetensors")):
            for key, tensor in read_safetensors(file).items():
                name, kind, offset = key.rsplit("|", 2)
                if kind == "weight":
                    self._pieces.setdefault(name, []).append((int(offset), tensor))

    def read(self, name: str) -> Tensor:
        """One whole tensor, float32; ConfigError where its fragments do not cover it."""
        shape = self.shapes[name]
        flat = torch.empty(shape, dtype=torch.float32).view(-1)
        covered = 0
        for offset, piece in sorted(self._pieces.get(name, []), key=lambda item: item[0]):
            if offset != covered:
                break
            flat[offset : offset + piece.shape[0]] = piece.read()
            covered += piece.shape[0]
        if covered != flat.numel():
            raise ConfigError(
                f"{self.path} holds {covered:,} of the {flat.numel():,} elements of {name} in one piece: "
                "a rank's file is missing or belongs to another save."
            )
        return flat.view(shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint at `folder`, or the newest one of the stage's run directory `folder`."""
    if (folder / "index.json").is_file():
        return Checkpoint(folder)
    steps = [
        (int(found[1]), entry)
        for entry in (folder / "checkpoints").glob("step_*")
        if (found := _STEP.fullmatch(entry.name)) and (entry / "index.json").is_file()
    ]
    if steps:
        return Checkpoint(max(steps)[1])
    stages = sorted(entry.parent.name for entry in folder.glob("*/checkpoints") if entry.is_dir())
    if stages:
        raise ConfigError(f"{folder} is a run of several stages: name one of them, for instance {folder / stages[-1]}.")
    raise ConfigError(
        f"{folder} holds neither config.json with weights nor a finished checkpoint (checkpoints/step_*/index.json)."
    )


def read_run_config(run: Path) -> ModelConfig:
    """Key `model` of a run directory's config.yaml."""
    path = run / "config.yaml"
    try:
        stored: dict[str, Any] = dict(yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
        stored["rope_scaling"] = RopeScalingConfig(**stored["rope_scaling"])
        return ModelConfig(**{field.name: stored[field.name] for field in fields(ModelConfig)})
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: a checkpoint is read together with its run's config.yaml.") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} has no readable `model` section ({error}): was it written by this program?"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: it is not JSON.") from error
