"""Writes a checkpoint folder that other programs open: the official InternLM2 layout, or the Llama layout.

A folder of the official layout holds safetensors under the released names, a config.json written by hand, our own two
model files for transformers 5 (auto_map), and tokenizer files without code. It appears under its name only when it is
complete.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from internlm2.config import ConfigError, ModelConfig
from internlm2.model import huggingface
from internlm2.model.config_json import write_config
from internlm2.model.layouts import EMBEDDING, OUTPUT, REWARD_HEAD, llama_shapes, official_shapes, split_wqkv
from internlm2.model.safetensors_files import PlannedTensor, write_safetensors
from internlm2.model.tokenizer_export import TokenizerFacts, export_tokenizer
from internlm2.model.weights import Weights

LAYOUTS = ("internlm2", "llama")
SHARD_BYTES = 5_000_000_000
_CODE_FILES = ("configuration_internlm2.py", "modeling_internlm2.py")


@dataclass(frozen=True)
class Export:
    """What was written, for a line in a log."""

    folder: Path
    layout: str
    dtype: torch.dtype
    parameters: int
    files: list[str]
    notes: list[str]


def export_weights(
    weights: Weights,
    output: str | Path,
    *,
    layout: str = "internlm2",
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    keep_dynamic_rope: bool = False,
    overwrite: bool = False,
) -> Export:
    """Write `weights` as a folder of `layout` (internlm2 or llama) at `output`, one tensor in memory at a time.

    dtype      of all tensors; None keeps each as it is stored, which makes a re-save bit-equal
    tokenizer  folder with tokenizer.model or tokenizer.json; None takes the one that came with the weights
    overwrite  replace a folder that is an export; anything else at `output` is left alone and refused

    The folder is built beside `output` and renamed, so `output` is the old folder or the whole new one, never half.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} does not exist: use internlm2 or llama.")
    if layout == "llama" and REWARD_HEAD in weights.dtypes:
        raise ConfigError("A reward model has no Llama layout: its v_head has no place there. Use --to internlm2.")
    output = Path(output).absolute()
    _check_target(output, overwrite)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        result = _fill(partial, weights, layout, dtype, tokenizer or weights.tokenizer, shard_bytes, keep_dynamic_rope)
        files = sorted(entry.name for entry in partial.iterdir())
        for name in files:
            _sync(partial / name)
        _sync(partial)
        _publish(partial, output)
    except OSError as error:
        raise ConfigError(
            f"{output} could not be written: {error.strerror or error}. Nothing there was changed."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    dtype_written, parameters, notes = result
    return Export(output, layout, dtype_written, parameters, files, notes)


def _check_target(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "config.json").is_file():
        raise ConfigError(f"{output} exists and is no export: choose another place.")
    if not overwrite:
        raise ConfigError(f"{output} holds an export already: choose another place, or pass --overwrite.")


def _publish(partial: Path, output: Path) -> None:
    """Rename into place. An older export moves aside first and is deleted last; a crash between leaves it beside."""
    replaced = output.parent / f".{output.name}.replaced-{os.getpid()}"
    if output.exists():
        os.rename(output, replaced)
    try:
        os.rename(partial, output)
    except OSError:
        if replaced.exists():
            os.rename(replaced, output)
        raise
    _sync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _fill(
    folder: Path,
    weights: Weights,
    layout: str,
    dtype: torch.dtype | None,
    tokenizer: Path | None,
    shard_bytes: int,
    keep_dynamic_rope: bool,
) -> tuple[torch.dtype, int, list[str]]:
    config, notes = weights.config, []
    if tokenizer is None:
        facts = TokenizerFacts(config.vocab_size, bos=1, eos=2, pad=2, stop=[2])
        notes.append("no tokenizer was found: the folder holds none, and special ids are assumed to be 1, 2, 2")
    else:
        facts = export_tokenizer(tokenizer, folder)
        if facts.vocab_size > config.vocab_size:
            raise ConfigError(
                f"The tokenizer in {tokenizer} has {facts.vocab_size} tokens, the weights have rows for "
                f"{config.vocab_size}: it belongs to another model."
            )
    if config.rope_scaling.kind == "dynamic" and not keep_dynamic_rope:
        limit = config.max_position_embeddings
        notes.append(f"dynamic NTK was left out: the same up to {limit} tokens, and engines disagree beyond")
    _, parameters = write_tensors(folder, weights, layout, dtype, shard_bytes)
    token_ids = {"bos": facts.bos, "eos": facts.eos, "pad": facts.pad}
    written = dtype or weights.dtype
    content = write_config(config, layout, written, token_ids=token_ids, keep_dynamic=keep_dynamic_rope)
    if REWARD_HEAD in weights.dtypes:
        content["architectures"] = ["InternLM2ForRewardModel"]
        content.pop("auto_map")
    _write_json(folder / "config.json", content)
    generation = {"bos_token_id": facts.bos, "eos_token_id": facts.stop, "pad_token_id": facts.pad}
    _write_json(folder / "generation_config.json", generation)
    if "auto_map" in content:
        for name in _CODE_FILES:
            shutil.copyfile(Path(huggingface.__file__).parent / name, folder / name)
    return written, parameters, notes


def write_tensors(
    folder: Path, weights: Weights, layout: str, dtype: torch.dtype | None, shard_bytes: int
) -> tuple[list[str], int]:
    """model.safetensors, or shards of at most `shard_bytes` with their index -> (file names, number of parameters)."""
    plan: list[tuple[str, list[PlannedTensor]]] = []  # for each official tensor, what is written for it
    config = weights.config
    for name, stored in weights.dtypes.items():
        shapes = {name: _shape(config, name)} if layout == "internlm2" else llama_shapes(config, name)
        plan.append((name, [PlannedTensor(part, shape, dtype or stored) for part, shape in shapes.items()]))
    if layout == "internlm2" and config.tie_embeddings:
        # llama.cpp and others know no InternLM2 without an output matrix: a tied one repeats the embedding.
        shape = (config.vocab_size, config.hidden_size)
        plan.append((EMBEDDING, [PlannedTensor(OUTPUT, shape, dtype or weights.dtypes[EMBEDDING])]))
    shards = _shards(plan, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for file, shard in zip(names, shards):
        entries = list(itertools.chain.from_iterable(parts for _, parts in shard))
        write_safetensors(folder / file, entries, _tensors(weights, layout, [name for name, _ in shard]))
        weight_map |= {entry.name: file for entry in entries}
        total += sum(entry.bytes for entry in entries)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    parameters = sum(torch.Size(_shape(config, name)).numel() for name in weights.dtypes)
    return names, parameters


def _shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    return (1, config.hidden_size) if name == REWARD_HEAD else official_shapes(config)[name]


def _shards(plan: list[tuple[str, list[PlannedTensor]]], limit: int) -> list[list[tuple[str, list[PlannedTensor]]]]:
    shards: list[list[tuple[str, list[PlannedTensor]]]] = [[]]
    used = 0
    for name, parts in plan:
        size = sum(part.bytes for part in parts)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append((name, parts))
        used += size
    return shards


def _tensors(weights: Weights, layout: str, names: list[str]) -> Iterator[Tensor]:
    for name in names:
        tensor = weights.read(name)
        if layout == "llama" and name.endswith("attention.wqkv.weight"):
            yield from split_wqkv(tensor, weights.config)
        else:
            yield tensor


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
