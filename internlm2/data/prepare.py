"""From a data config to what a stage trains on: the tokenizer and the tokenized corpus, made once and cached."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from internlm2.config import ConfigError, DataConfig
from internlm2.data.cache import build_once
from internlm2.data.corpus import Corpus
from internlm2.data.encoding import split_hash
from internlm2.data.shards import shard_of
from internlm2.permutation import derive_key, shuffled
from internlm2.sources import toy_tokenizer
from internlm2.sources.documents import BadRecord
from internlm2.sources.source import Source, check_sources, open_sources
from internlm2.text.huggingface_tokenizer import HuggingFaceTokenizer
from internlm2.text.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm2.text.tokenizer import Tokenizer
from internlm2.text.tokenizer_training import TRAINER_VERSION, train_model

logger = logging.getLogger(__name__)


def prepare(
    config: DataConfig, vocab_size: int, progress: bool = True, sources: Iterable[str] | None = None
) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and corpus of a config. `sources` limits which are tokenized (None: all); a trained tokenizer sees all
    of them anyway.

    Safe to call from many processes at once: one works, the others wait and read. Raises ConfigError for missing or
    empty sources, for bad records under `strict`, and where the tokenizer has more ids than the model's `vocab_size`.
    """
    check_sources(config)
    opened = open_sources(config)
    cache_dir = Path(config.cache_dir).expanduser()
    manifests = {name: source.manifest() for name, source in opened.items()}
    tokenizer = make_tokenizer(config, opened, manifests, cache_dir)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} ids but model.vocab_size={vocab_size:,}: "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or use another tokenizer."
        )
    wanted = list(opened) if sources is None else list(sources)
    for name in wanted:
        if name not in opened:
            raise ConfigError(f"there is no source {name!r}; data.sources has {', '.join(opened)}")
    shards = {
        name: shard_of(
            source,
            tokenizer,
            cache_dir,
            workers=config.workers,
            strict=config.strict,
            progress=progress,
            manifest=manifests[name],
        )
        for name, source in opened.items()
        if name in wanted
    }
    return tokenizer, Corpus(shards, tokenizer.fingerprint, config.validation_fraction, cache_dir)


def make_tokenizer(
    config: DataConfig, sources: dict[str, Source], manifests: dict[str, str], cache_dir: Path
) -> Tokenizer:
    """Load the tokenizer that the config names, or train it on the sources (once; cached by their content)."""
    settings = config.tokenizer
    aliases = {str(name): str(piece) for name, piece in (settings.aliases or {}).items()}
    if settings.kind == "sentencepiece":
        return SentencePieceTokenizer(Path(str(settings.path)).expanduser(), aliases)
    if settings.kind == "huggingface":
        return HuggingFaceTokenizer(Path(str(settings.path)).expanduser(), aliases)
    if settings.kind == "toy":
        return _toy_tokenizer(cache_dir, aliases)
    size = settings.vocab_size
    if size is None:
        raise ConfigError("data.tokenizer.kind=train needs data.tokenizer.vocab_size")
    identity = (
        f"{TRAINER_VERSION} {size} {settings.train_bytes} {config.validation_fraction} {sorted(manifests.items())}"
    )
    folder = cache_dir / "tokenizers" / f"bpe{size}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def build(temporary: Path) -> None:
        logger.info("training a tokenizer of %d ids on %.1f MB", size, settings.train_bytes / 1e6)
        texts = sample_texts(list(sources.values()), settings.train_bytes, config.validation_fraction)
        (temporary / "tokenizer.model").write_bytes(train_model(texts, size))

    build_once(folder, lambda folder: (folder / "tokenizer.model").is_file(), build)
    return SentencePieceTokenizer(folder / "tokenizer.model", aliases)


def _toy_tokenizer(cache_dir: Path, aliases: dict[str, str]) -> Tokenizer:
    """The tokenizer of the toy language, written once for each version of its words."""
    words = hashlib.sha256("\0".join(toy_tokenizer.vocabulary()).encode()).hexdigest()[:16]
    folder = cache_dir / "tokenizers" / f"toy-{words}"
    build_once(folder, lambda folder: (folder / "tokenizer.json").is_file(), toy_tokenizer.write_tokenizer)
    return HuggingFaceTokenizer(folder, aliases)


def sample_texts(sources: list[Source], limit: int, validation_fraction: float) -> Iterator[str]:
    """About `limit` bytes of training text, in equal parts from each source; what a small one leaves over goes to the
    others.

    Units of a source are taken in a fixed random order, so that a part of a large source is a sample of all its files.
    """
    texts = [source for source in sources if source.kind != "internevo"]
    held_out = int(validation_fraction * 2.0**64)
    left = limit
    for number, source in enumerate(sorted(texts, key=lambda source: source.input_bytes())):
        budget = left // (len(texts) - number)
        units = source.units()
        for place in shuffled(len(units), derive_key("tokenizer sample", source.name)):
            if budget <= 0:
                break
            for document in units[place].documents():
                if isinstance(document, BadRecord) or (text := document.plain_text) is None:
                    continue
                content = text.encode("utf-8")
                if split_hash(document.split_key.encode() if document.split_key else content) < held_out:
                    continue
                yield text
                budget -= len(content)
                left -= len(content)
                if budget <= 0:
                    break
