"""What a stage takes over from the one before it: which weights, and which values were inherited or overridden."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from internlm2.config import Config, ConfigError, ModelConfig
from internlm2.model.layouts import REWARD_HEAD
from internlm2.model.scalar import ScalarModel, load_scalar_weights
from internlm2.model.transformer import CausalLM
from internlm2.model.values import Values, stored_values
from internlm2.model.weights import Weights, load_weights, open_weights
from internlm2.text.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

SHAPES = (
    "vocab_size",
    "hidden_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "intermediate_size",
    "tie_embeddings",
)


@dataclass
class Inherited:
    """One row of the hand-over table."""

    key: str
    inherited: str
    used: str
    note: str


def check(source: Path, config: Config, tokenizer: Tokenizer) -> tuple[Weights, list[Inherited]]:
    """The weights at `source`, not read yet, and the table of what the stage inherits and what it overrides.

    Raises ConfigError where shapes, vocabulary or tokenizer do not fit.
    """
    weights = open_weights(source)
    for key in SHAPES:
        theirs, ours = getattr(weights.config, key), getattr(config.model, key)
        if theirs != ours:
            raise ConfigError(
                f"init_from={config.init_from}: {source} has model.{key}={theirs}, this stage has model.{key}={ours}. "
                "Choose the model that the checkpoint was trained with."
            )
    rows = [_compare_tokenizers(weights.tokenizer, tokenizer, config)]
    return weights, rows + _compare_values(weights.config, config.model)


def load(
    model: CausalLM | ScalarModel, source: Path, config: Config, tokenizer: Tokenizer
) -> tuple[Values | None, list[Inherited]]:
    """Load the weights at `source` into `model`, or return them in pieces where it has no memory (on "meta"); and the
    table, which is also printed.

    A ScalarModel takes the head that the weights bring, or a new one drawn from `config.seed`.
    """
    weights, table = check(source, config, tokenizer)
    values, head_seed = None, None
    if isinstance(model, ScalarModel):
        has_head = REWARD_HEAD in weights.dtypes
        head_seed = None if has_head else config.seed
        drawn = f"random, seed {config.seed}"
        table.append(Inherited("v_head", "there" if has_head else "none", "there" if has_head else drawn, "one output"))
    if next(model.parameters()).is_meta:
        values = stored_values(model, weights, str(source), head_seed)
    elif isinstance(model, ScalarModel):
        load_scalar_weights(model, weights, str(source), head_seed)
    else:
        load_weights(model, weights, str(source))
    for row in table:
        value = row.used if row.inherited == row.used else f"{row.inherited} -> {row.used}"
        log.info("hand-over: %-30s %s (%s)", row.key, value, row.note)
    return values, table


def as_rows(table: list[Inherited]) -> list[dict[str, str]]:
    """The table as JSON."""
    return [asdict(row) for row in table]


def _compare_tokenizers(folder: Path | None, tokenizer: Tokenizer, config: Config) -> Inherited:
    ours = tokenizer.fingerprint[:12]
    if folder is None:
        return Inherited("tokenizer", "unknown", ours, "the source has no tokenizer to compare with")
    given = load_tokenizer(folder)
    theirs = given.fingerprint[:12]
    added = ", ".join(sorted(tokenizer.aliases.keys() - given.aliases.keys()))
    same_file = load_tokenizer(folder, tokenizer.aliases).fingerprint == tokenizer.fingerprint
    if added and same_file and given.aliases.items() <= tokenizer.aliases.items():
        # A spare piece that became a marker changes no id of a text.
        return Inherited("tokenizer", theirs, ours, f"same file, with {added}")
    if theirs != ours:
        raise ConfigError(
            f"init_from={config.init_from}: the tokenizer in {folder} is another one than that of "
            f"data={config.data.name} ({theirs} and {ours}), so the ids would mean other tokens. "
            "Point data.tokenizer at the one in that folder."
        )
    return Inherited("tokenizer", theirs, ours, "same file")


def _compare_values(given: ModelConfig, used: ModelConfig) -> list[Inherited]:
    rows = [Inherited("weights", given.name, used.name, "all shapes equal")]
    for key in ("rope_base", "rope_scaling", "max_position_embeddings", "norm_eps"):
        before, after = _show(getattr(given, key)), _show(getattr(used, key))
        note = "inherited" if before == after else "set by this stage"
        rows.append(Inherited(f"model.{key}", before, after, note))
    return rows


def _show(value: object) -> str:
    if hasattr(value, "kind") and hasattr(value, "factor"):
        return f"{value.kind} x {value.factor:g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) and value >= 1 else str(value)
