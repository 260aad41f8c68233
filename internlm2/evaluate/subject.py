"""The model that is evaluated, its tokenizer, and the run that it comes from."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from internlm2.config import ConfigError
from internlm2.config.evaluate import EvaluateConfig, GenerationConfig
from internlm2.config.precision import settled_dtype
from internlm2.config.schema import RopeScalingConfig
from internlm2.generation import Engine
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import load_weights, open_weights
from internlm2.text.chat import IM_END, IM_START
from internlm2.text.tokenizer import Tokenizer, load_tokenizer


@dataclass
class Subject:
    """A model under evaluation."""

    source: str
    model: CausalLM
    tokenizer: Tokenizer
    generation: GenerationConfig
    batch_tokens: int

    @cached_property
    def engine(self) -> Engine:
        """The generation engine over the model's weights, made at the first use."""
        settings = self.generation
        # Lengths beyond what a model was trained to are the point of some suites: the cache alone is the limit.
        return Engine(
            self.model,
            max_rows=settings.max_rows,
            kv_tokens=settings.kv_tokens,
            max_length=settings.kv_tokens,
            quantize=settings.quantize,
            vocab_size=self.tokenizer.vocab_size,
        )

    @property
    def trained_to(self) -> int:
        """Tokens of the longest sequences in training."""
        return self.model.config.max_position_embeddings

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a text or a turn."""
        special = self.tokenizer.special_ids
        return tuple(dict.fromkeys((self.tokenizer.eos_id, *((special[IM_END],) if IM_END in special else ()))))

    def first_ids(self) -> list[int]:
        """What every plain text begins with: `<s>`, or nothing where the vocabulary's `<s>` is a chat marker."""
        tokenizer = self.tokenizer
        return [] if tokenizer.bos_id == tokenizer.special_ids.get(IM_START) else [tokenizer.bos_id]


def load_subject(source: str, config: EvaluateConfig) -> Subject:
    """Load the model that `source` names. Raises ConfigError."""
    device = device_of(config)
    path = weights_of(source)
    weights = open_weights(path)
    folder = config.tokenizer or weights.tokenizer
    if folder is None:
        raise ConfigError(f"{source} comes without a tokenizer: name its folder with tokenizer=.")
    tokenizer = load_tokenizer(folder)
    shape = weights.config
    if config.rope_scaling.kind != "as_trained":
        shape = replace(shape, rope_scaling=RopeScalingConfig(config.rope_scaling.kind, config.rope_scaling.factor))
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} ids, the model in {source} {shape.vocab_size:,}: "
            "name the one that belongs to it with tokenizer=."
        )
    model = CausalLM.from_config(shape, device=device, dtype=dtype_of(config), attention=config.attention, seed=None)
    load_weights(model, weights, source)
    model.eval().requires_grad_(False)
    return Subject(source, model, tokenizer, config.generation, config.batch_tokens)


def device_of(config: EvaluateConfig) -> str:
    """What `device` means here. ConfigError where it is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device here: use device=cpu or auto.")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def dtype_of(config: EvaluateConfig) -> torch.dtype:
    """What `dtype` means on that device."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[settled_dtype(config.dtype, device_of(config))]


def weights_of(source: str) -> str:
    """Where the weights lie that `source` means: of a whole run the newest export, of a stage with adapters its merged
    export, else the path itself.
    """
    folder = Path(source)
    if (folder / "adapter").is_dir() and (folder / "export" / "config.json").is_file():
        return str(folder / "export")
    exports = list(folder.glob("*/export/config.json"))
    if exports and not (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir():
        return str(max(exports, key=lambda file: file.stat().st_mtime).parent)
    return source


def stage_of(source: str) -> Path | None:
    """The run directory that a path is, or lies in."""
    path = Path(weights_of(source)).resolve()
    for folder in (path, *list(path.parents)[:2]):
        if (folder / "metrics.jsonl").is_file() and (folder / "config.yaml").is_file():
            return folder
    return None


def read_text(key: str, path: str) -> str:
    """A text file that a key names; ConfigError where it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"{key}={path} cannot be read: {reason}.") from error
