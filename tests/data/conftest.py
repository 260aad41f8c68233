"""A builder of corpora from given documents."""

from collections.abc import Callable
from pathlib import Path

import pytest

from internlm2.data.corpus import Corpus
from internlm2.data.encoding import encode_units
from internlm2.data.shards import Shard, write_shard
from internlm2.sources.documents import Document, MemoryUnit

Sources = dict[str, list[list[int]]]


@pytest.fixture(scope="session")
def build_corpus(tokenizer, tmp_path_factory) -> Callable[..., Corpus]:
    """`build_corpus({source: [tokens of each document]}, validation_fraction)`."""

    def build(sources: Sources, validation_fraction: float = 0.0) -> Corpus:
        folder: Path = tmp_path_factory.mktemp("corpus")
        shards = {}
        for name, documents in sources.items():
            target = folder / f"shard-{name}"
            target.mkdir()
            items = [Document(f"{name}.jsonl", line, tokens=tokens) for line, tokens in enumerate(documents, start=1)]
            write_shard(target, name, encode_units([MemoryUnit(items, len(items))], tokenizer, 1), tokenizer)
            shards[name] = Shard(name, target)
        return Corpus(shards, tokenizer.fingerprint, validation_fraction, folder / "cache")

    return build
