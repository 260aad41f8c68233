"""What a stage takes over from the one before it: which weights, and which values were inherited or overridden."""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from internlm2.config import Config, ConfigError, ModelConfig
from internlm2.data.tokenizer import Tokenizer
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import read_weights

log = logging.getLogger(__name__)

SHAPE_KEYS = ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim", "intermediate_size", "tie_embeddings")


@dataclass
class Inherited:
    """One row of the hand-over table."""

    key: str
    inherited: str
    used: str
    note: str


def resolve(config: Config) -> Path | None:
    """The directory that `init_from` means: None for random weights. Raises ConfigError where it is not there."""
    if config.init_from is None:
        return None
    run = Path(config.root) / config.name
    stage = config.stage.previous if config.init_from == "previous" else config.init_from
    candidates = [run / str(stage), Path(config.init_from)]
    for path in candidates:
        if path.exists():
            return path
    raise ConfigError(
        f"init_from={config.init_from}: neither {candidates[0]} nor {candidates[1]} exists. Run stage={stage} with "
        f"name={config.name} first, give a checkpoint or export folder, or init_from=null for random weights."
    )


def load(model: CausalLM, source: Path, config: Config, tokenizer: Tokenizer) -> list[Inherited]:
    """Load `source`'s weights into `model`; the table of what was inherited and what the config overrides.

    Raises ConfigError where shapes, vocabulary or tokenizer do not fit, before any weight is read."""
    given, tensors, tokenizer_folder = read_weights(source)
    for key in SHAPE_KEYS:
        if getattr(given, key) != getattr(config.model, key):
            raise ConfigError(
                f"init_from={config.init_from}: {source} has model.{key}={getattr(given, key)}, this stage has "
                f"model.{key}={getattr(config.model, key)}. Choose the model that the checkpoint was trained with."
            )
    table = [_compare_tokenizers(tokenizer_folder, tokenizer, config)]
    table += _compare_values(given, config.model)
    copy_weights(model, tensors, source)
    for row in table:
        log.info("hand-over  %-28s %s", row.key, row.used if row.inherited == row.used else f"{row.inherited} -> {row.used}")
    return table


def _compare_tokenizers(folder: Path | None, tokenizer: Tokenizer, config: Config) -> Inherited:
    if folder is None:
        return Inherited("tokenizer", "unknown", tokenizer.fingerprint[:12], "the source has no tokenizer to compare with")
    theirs = Tokenizer.fingerprint_of(folder)
    if theirs != tokenizer.fingerprint:
        raise ConfigError(
            f"init_from={config.init_from}: the tokenizer in {folder} differs from the one of data={config.data.name} "
            f"({theirs[:12]} and {tokenizer.fingerprint[:12]}): its ids would mean other tokens. Point data.tokenizer at that folder."
        )
    return Inherited("tokenizer", theirs[:12], tokenizer.fingerprint[:12], "same file")


def _compare_values(given: ModelConfig, used: ModelConfig) -> list[Inherited]:
    rows = [Inherited("weights", given.name, used.name, "all shapes equal")]
    for key in ("rope_base", "rope_scaling", "max_position_embeddings", "norm_eps"):
        before, after = getattr(given, key), getattr(used, key)
        if key == "rope_scaling":
            before, after = (f"{value.kind} x {value.factor}" for value in (before, after))
        rows.append(Inherited(f"model.{key}", str(before), str(after), "inherited" if before == after else "set by this stage"))
    return rows


@torch.no_grad()
def copy_weights(model: CausalLM, tensors: Iterable[tuple[str, torch.Tensor]], source: Path) -> None:
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name, tensor in tensors:
        if name not in parameters:
            if name == "output.weight" and model.config.tie_embeddings:
                continue  # the official layout repeats tied embeddings
            raise ConfigError(f"{source} has a tensor {name} that the model does not know.")
        if parameters[name].shape != tensor.shape:
            raise ConfigError(f"{source}: {name} is {list(tensor.shape)}, the model needs {list(parameters[name].shape)}.")
        parameters[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise ConfigError(f"{source} lacks {len(missing)} tensors of the model, the first is {min(missing)}.")


def as_rows(table: list[Inherited]) -> list[dict[str, str]]:
    """The table as JSON."""
    return [asdict(row) for row in table]
