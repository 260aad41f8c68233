"""Fixed rows of held-out documents, by source: the same for every run, stage and seed with the same corpus."""

from collections.abc import Iterable

import numpy as np

from internlm2.config import ConfigError
from internlm2.data.corpus import Corpus
from internlm2.data.long_conversations import shorten
from internlm2.data.packing import plan_rows
from internlm2.data.rows import Row, build_row
from internlm2.permutation import derive_key, shuffled


def validation_rows(
    corpus: Corpus,
    seq_len: int,
    rows: int,
    sources: Iterable[str] | None = None,
    long_conversations: str = "cut",
) -> dict[str, list[Row]]:
    """Up to `rows` rows of at most `seq_len` tokens for each source that has held-out documents.

    Documents stay whole where they fit (best fit); longer ones are cut, and every piece is used, except of
    conversations (`long_conversations`): an answer without its question would measure something else.
    """
    found: dict[str, list[Row]] = {}
    for source in corpus.source_names if sources is None else sources:
        documents = corpus.held_out_documents(source)
        if not len(documents):
            continue
        shard = corpus.shard(source)
        lengths = shard.lengths[documents]
        documents, lengths, _ = shorten(shard, documents, lengths, seq_len, long_conversations)
        if not len(documents):
            continue
        row_starts, segments = plan_rows(documents, lengths, seq_len, "best_fit", derive_key("validation", source))
        chosen = shuffled(len(row_starts) - 1, derive_key("validation rows", source))[:rows]
        index = corpus.source_names.index(source)
        found[source] = [
            build_row(shard, index, segments[row_starts[row] : row_starts[row + 1]].tolist()) for row in sorted(chosen)
        ]
    return found


def long_validation_rows(
    corpus: Corpus, seq_len: int, rows: int, min_tokens: int, sources: Iterable[str] | None = None
) -> dict[str, list[Row]]:
    """Rows for loss by position: each is the beginning of one held-out document of at least `min_tokens` tokens, cut at
    `seq_len`.

    Position t of such a row has exactly t tokens of its own document before it. The longest documents come first;
    sources without any are left out. Raises ConfigError where no source has one.
    """
    found: dict[str, list[Row]] = {}
    longest = 0
    for source in corpus.source_names if sources is None else sources:
        documents = corpus.held_out_documents(source)
        lengths = corpus.shard(source).lengths[documents]
        longest = max(longest, int(lengths.max(initial=0)))
        order = np.argsort(-lengths, kind="stable")
        order = order[lengths[order] >= min_tokens][:rows]
        index = corpus.source_names.index(source)
        taken = [(int(documents[place]), 0, int(min(lengths[place], seq_len))) for place in order]
        if taken:
            found[source] = [build_row(corpus.shard(source), index, [segment]) for segment in taken]
    if not found:
        raise ConfigError(
            f"no held-out document has {min_tokens:,} tokens (the longest has {longest:,}): "
            "raise data.validation_fraction, or measure at a shorter length."
        )
    return found
