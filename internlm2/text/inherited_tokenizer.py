"""`data.tokenizer.kind=inherit`: the tokenizer that came with the weights that a stage starts from."""

import json
import logging
from dataclasses import replace
from pathlib import Path

from internlm2.config import Config, ConfigError, TokenizerConfig
from internlm2.config.start import initial_weights
from internlm2.model.weights import open_weights
from internlm2.text.tokenizer import ALIASES, load_tokenizer

# Pieces that well-known vocabularies hold in reserve; one of them serves as a marker that a vocabulary lacks. Those of
# InternLM2 are found by `tokenizer.find_markers`.
SPARE_PIECES = (
    "<|reserved_special_token_0|>",  # Llama 3
    "<|extra_0|>",  # Qwen
    "<|fim_pad|>",  # Qwen 2.5, StarCoder
    "<reponame>",  # SmolLM, SmolLM2
    "[unused0]",
)

log = logging.getLogger(__name__)


def settle_tokenizer(config: Config, *, needs: str | None = None) -> TokenizerConfig:
    """`data.tokenizer`, with kind=inherit replaced by the file that came with the weights of `init_from`.

    `needs`: a marker that the stage cannot do without. Where the vocabulary has none, a piece that it is known to hold
    in reserve serves as one; ConfigError, which names data.tokenizer.aliases, where it has no such piece either.
    """
    settings = config.data.tokenizer
    if settings.kind == "inherit":
        settings = _inherited(config)
    if needs is None or settings.kind not in ("sentencepiece", "huggingface"):
        return settings
    path = Path(str(settings.path)).expanduser()
    tokenizer = load_tokenizer(path, settings.aliases)
    if needs in tokenizer.special_ids:
        return settings
    for piece in SPARE_PIECES:
        if tokenizer.has_piece(piece):
            log.info(
                "the vocabulary has no %s: its spare piece %s serves as one (data.tokenizer.aliases)", needs, piece
            )
            return replace(settings, aliases={**settings.aliases, needs: piece})
    tokenizer.special_id(needs)  # raises
    return settings


def _inherited(config: Config) -> TokenizerConfig:
    source, settings = initial_weights(config), config.data.tokenizer
    folder = None if source is None else open_weights(source).tokenizer
    if folder is None:
        raise ConfigError(
            f"data.tokenizer.kind=inherit: init_from={config.init_from} has no tokenizer beside its weights. "
            "Name one with data.tokenizer.kind and data.tokenizer.path."
        )
    stored = folder / ALIASES
    aliases = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    for kind, name in (("sentencepiece", "tokenizer.model"), ("huggingface", "tokenizer.json")):
        if (folder / name).is_file():
            return replace(
                settings, kind=kind, path=str(folder / name), vocab_size=None, aliases={**aliases, **settings.aliases}
            )
    raise ConfigError(f"data.tokenizer.kind=inherit: {folder} holds neither tokenizer.model nor tokenizer.json.")
