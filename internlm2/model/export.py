"""Writes a checkpoint folder that other programs open: the official InternLM2 layout, or the Llama layout.

A folder of the official layout holds safetensors under the released names, a config.json written by hand, our own two
model files for transformers 5 (auto_map), and tokenizer files without code. It appears under its name only when it is
complete.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from internlm2.config import ConfigError, ModelConfig
from internlm2.model import huggingface
from internlm2.model.config_json import write_config
from internlm2.model.layouts import (
    EMBEDDING,
    OUTPUT,
    REWARD_HEAD,
    llama_shapes,
    official_shapes,
    reward_shapes,
    split_wqkv,
)
from internlm2.model.safetensors_files import PlannedTensor, SafetensorsWriter
from internlm2.model.tokenizer_export import TokenizerFacts, export_tokenizer
from internlm2.model.weights import Weights

REWARD_SETTINGS = "reward.json"  # of a reward model: its conditions, and the statistics of its scores
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


def export(
    output: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    tokenizer_folder: Path | None = None,
) -> Export:
    """Write a model that is being trained in the official layout at `output`, replacing an export that lies there.

    `tensors` are (official name, tensor) in any order and on any device, each exactly once; all are cast to `dtype`.
    """
    dtypes = dict.fromkeys(official_shapes(config), dtype)
    return _export(output, config, dtypes, tensors, tokenizer_folder, "internlm2", SHARD_BYTES, False, True)


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
    reward_settings: Path | None = None,
) -> Export:
    """Write `weights` as a folder of `layout` (internlm2 or llama) at `output`, one tensor in memory at a time.

    dtype      of all tensors; None keeps each as it is stored, which makes a re-save bit-equal
    tokenizer  folder with tokenizer.model or tokenizer.json; None takes the one that came with the weights
    overwrite  replace a folder that is an export; anything else at `output` is left alone and refused
    reward_settings  of a reward model, its reward.json; None takes the one that came with the weights
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} does not exist: use internlm2 or llama.")
    if layout == "llama" and REWARD_HEAD in weights.dtypes:
        raise ConfigError("A reward model has no Llama layout: its v_head has no place there. Use --to internlm2.")
    dtypes = {name: dtype or stored for name, stored in weights.dtypes.items()}
    tokenizer = tokenizer or weights.tokenizer
    return _export(
        output,
        weights.config,
        dtypes,
        weights,
        tokenizer,
        layout,
        shard_bytes,
        keep_dynamic_rope,
        overwrite,
        reward_settings or _stored_reward_settings(weights),
    )


def _stored_reward_settings(weights: Weights) -> Path | None:
    """reward.json beside an export's weights, or in the run directory of a checkpoint."""
    if REWARD_HEAD not in weights.dtypes or weights.origin is None:
        return None
    folders = (weights.origin, weights.origin.parent.parent)
    return next((folder / REWARD_SETTINGS for folder in folders if (folder / REWARD_SETTINGS).is_file()), None)


def _export(
    output: str | Path,
    config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Path | None,
    layout: str,
    shard_bytes: int,
    keep_dynamic_rope: bool,
    overwrite: bool,
    reward_settings: Path | None = None,
) -> Export:
    """Build the folder beside `output` and rename it: `output` is the old folder or the whole new one, never half."""
    output = Path(output).absolute()
    _check_target(output, overwrite)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        notes: list[str] = []
        facts = _write_tokenizer(partial, config, tokenizer, notes)
        write_tensors(partial, config, dtypes, tensors, layout, shard_bytes)
        _write_settings(partial, config, dtypes, facts, layout, keep_dynamic_rope, notes)
        if reward_settings is not None:
            shutil.copyfile(reward_settings, partial / REWARD_SETTINGS)
        files = sorted(entry.name for entry in partial.iterdir())
        for name in files:
            _sync(partial / name)
        _sync(partial)
        _publish(partial, output)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{output} could not be written: {reason}. Nothing there was changed.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    parameters = sum(torch.Size(_shape(config, name)).numel() for name in dtypes)
    return Export(output, layout, dtypes[EMBEDDING], parameters, files, notes)


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


def _write_tokenizer(folder: Path, config: ModelConfig, tokenizer: Path | None, notes: list[str]) -> TokenizerFacts:
    if tokenizer is None:
        notes.append("no tokenizer was found: the folder holds none, and special ids are assumed to be 1, 2, 2")
        return TokenizerFacts(config.vocab_size, bos=1, eos=2, pad=2, stop=[2])
    facts = export_tokenizer(tokenizer, folder)
    if facts.vocab_size > config.vocab_size:
        raise ConfigError(
            f"The tokenizer in {tokenizer} has {facts.vocab_size} tokens, the weights have rows for "
            f"{config.vocab_size}: it belongs to another model."
        )
    return facts


def _write_settings(
    folder: Path,
    config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    facts: TokenizerFacts,
    layout: str,
    keep_dynamic_rope: bool,
    notes: list[str],
) -> None:
    """config.json, generation_config.json and, in the official layout, the two model files that config.json names."""
    if config.rope_scaling.kind == "dynamic" and not keep_dynamic_rope:
        limit = config.max_position_embeddings
        notes.append(f"dynamic NTK was left out: the same up to {limit} tokens, and engines disagree beyond")
    token_ids = {"bos": facts.bos, "eos": facts.eos, "pad": facts.pad}
    content = write_config(config, layout, dtypes[EMBEDDING], token_ids=token_ids, keep_dynamic=keep_dynamic_rope)
    if REWARD_HEAD in dtypes:
        content["architectures"] = ["InternLM2ForRewardModel"]
        content["auto_map"].pop("AutoModelForCausalLM")
        content["auto_map"]["AutoModel"] = "modeling_internlm2.InternLM2ForRewardModel"
        if facts.reward is not None:
            content["reward_token_id"] = facts.reward
    _write_json(folder / "config.json", content)
    generation = {"bos_token_id": facts.bos, "eos_token_id": facts.stop, "pad_token_id": facts.pad}
    _write_json(folder / "generation_config.json", generation)
    if "auto_map" in content:
        for name in _CODE_FILES:
            code = (Path(huggingface.__file__).parent / name).read_text(encoding="utf-8")
            # transformers copies files that are imported relatively; the package itself imports by full names.
            (folder / name).write_text(code.replace(f"from {huggingface.__name__}.", "from ."), encoding="utf-8")


def write_tensors(
    folder: Path,
    config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterable[tuple[str, Tensor]],
    layout: str,
    shard_bytes: int,
) -> None:
    """model.safetensors, or shards of at most `shard_bytes` with their index. One tensor in memory at a time."""
    plan: dict[str, list[PlannedTensor]] = {}  # for each official tensor, what is written for it
    for name, dtype in dtypes.items():
        shapes = {name: _shape(config, name)} if layout == "internlm2" else llama_shapes(config, name)
        plan[name] = [PlannedTensor(part, shape, dtype) for part, shape in shapes.items()]
    if layout == "internlm2" and config.tie_embeddings and REWARD_HEAD not in dtypes:
        # llama.cpp and others know no InternLM2 without an output matrix: a tied one repeats the embedding.
        embedding = plan[EMBEDDING][0]
        plan[EMBEDDING].append(PlannedTensor(OUTPUT, embedding.shape, embedding.dtype))
    shards = _shards(plan, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    entries = [list(itertools.chain.from_iterable(plan[name] for name in shard)) for shard in shards]
    with contextlib.ExitStack() as stack:
        writers: dict[str, SafetensorsWriter] = {}
        for file, shard, contents in zip(names, shards, entries):
            writer = SafetensorsWriter(folder / file, contents)
            stack.callback(writer.discard)
            writers |= dict.fromkeys(shard, writer)
        for name, tensor in tensors:
            if name not in writers:
                raise ConfigError(f"{name} was given for export, but has no place in this model.")
            parts = split_wqkv(tensor, config) if len(plan[name]) == 3 else itertools.repeat(tensor)
            for entry, part in zip(plan[name], parts):
                writers[name].write(entry.name, part)
        for writer in dict.fromkeys(writers.values()):
            writer.close()
    if len(shards) > 1:
        weight_map = {entry.name: file for file, contents in zip(names, entries) for entry in contents}
        total = sum(entry.bytes for contents in entries for entry in contents)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def _shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    return {**official_shapes(config), **reward_shapes(config)}[name]


def _shards(plan: Mapping[str, list[PlannedTensor]], limit: int) -> list[list[str]]:
    """Official names by file: each file as full as the limit allows, in order."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, parts in plan.items():
        size = sum(part.bytes for part in parts)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
