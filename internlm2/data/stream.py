"""Training rows as a pure function of (seed, position): O(1) seek, independent of ranks, micro-batches and restarts.

Documents are divided into pools, one for each source and length bucket. A slot table gives each position its pool and
its place in that pool; the pool's packing plan holds rows; a keyed permutation gives each epoch its own order of them.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from internlm2.config import ConfigError, TrainConfig
from internlm2.data.corpus import Corpus
from internlm2.data.long_conversations import POLICIES, Shortened, shorten
from internlm2.data.mixture import SlotTable
from internlm2.data.packing import FORMAT as PACKING_FORMAT
from internlm2.data.packing import PackingPlan, plan_of
from internlm2.data.rows import Row, build_row
from internlm2.data.usage import PoolUse
from internlm2.permutation import derive_key, permute
from internlm2.sources.source import check_weights

if TYPE_CHECKING:
    from internlm2.data.batch import PackedBatch

FORMAT = 1

logger = logging.getLogger(__name__)


class LengthBucket(Protocol):
    """Share `weight` of the tokens from documents of min_tokens <= length < max_tokens (None: no limit)."""

    @property
    def weight(self) -> float: ...
    @property
    def min_tokens(self) -> int | None: ...
    @property
    def max_tokens(self) -> int | None: ...


@dataclass(frozen=True)
class Pool:
    """Rows of one source and length bucket, and their share of all tokens."""

    source: str
    source_index: int
    min_tokens: int
    max_tokens: int | None
    share: float
    documents: int
    plan: PackingPlan
    key: int

    @property
    def name(self) -> str:
        """Source and, where there are buckets, its lengths."""
        if self.min_tokens == 0 and self.max_tokens is None:
            return self.source
        upper = "" if self.max_tokens is None else f"{self.max_tokens:,}"
        return f"{self.source} [{self.min_tokens:,}..{upper})"

    def row(self, turn: int) -> np.ndarray:
        """[n, 3] segments of the pool's `turn`-th row; each epoch shows every row once, in an order of its own."""
        epoch, place = divmod(turn, self.plan.rows)
        return self.plan.row(permute(place, self.plan.rows, derive_key(self.key, epoch)))


class TokenStream:
    """`stream[position]` is the packed row at a global position; the whole state is the position.

    `weights` gives each source its share of the tokens (not of the documents or rows); inside a length bucket the
    shares are renormalised over the sources that have documents there. Raises ConfigError for weights that name no
    source or are all zero, buckets that overlap or hold no document, and a corpus shorter than one row.
    """

    def __init__(
        self,
        corpus: Corpus,
        weights: Mapping[str, float],
        seq_len: int,
        packing: str = "best_fit",
        length_buckets: Sequence[LengthBucket] = (),
        seed: int = 0,
        long_conversations: str = "split",
    ) -> None:
        check_weights(weights, corpus.shards, "data.weights")
        if packing not in ("concatenate", "best_fit"):
            raise ConfigError(f"data.packing={packing}: must be concatenate or best_fit")
        if long_conversations not in POLICIES:
            raise ConfigError(f"data.long_conversations={long_conversations}: must be one of {', '.join(POLICIES)}")
        self.long_conversations = long_conversations
        self.shortened: dict[str, Shortened] = {}  # by source, what the policy left out
        self.corpus, self.seq_len, self.packing, self.seed = corpus, seq_len, packing, seed
        self.source_names = corpus.source_names
        weights = {name: float(weights[name]) for name in self.source_names if weights.get(name, 0) > 0}
        self.pools = self._make_pools(weights, _bounds(length_buckets))
        # A turn yields a row, and rows differ in fill: turns are proportional to tokens wanted over tokens a row.
        self._slots = SlotTable([pool.share * pool.plan.rows / pool.plan.tokens for pool in self.pools])
        for source, shortened in self.shortened.items():
            if shortened.conversations:
                logger.warning("%s", shortened.sentence(source, seq_len, long_conversations))
        self.parts = self._fingerprint_parts(weights)
        self.fingerprint = hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:32]

    def __getitem__(self, position: int) -> Row:
        """The row at a position from 0; there is no last one, epochs follow each other."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        number, turn = self._slots.locate(position)
        pool = self.pools[number]
        segments = [(document, first, length) for document, first, length in pool.row(turn).tolist()]
        return build_row(self.corpus.shards[pool.source], pool.source_index, segments)

    def batch(self, positions: Iterable[int]) -> "PackedBatch":
        """The rows at `positions`, one after another, as torch tensors."""
        from internlm2.data.batch import (
            collate,
        )  # torch is imported here, so that the rest of the room works without it

        return collate([self[position] for position in positions])

    def micro_batches(self, position: int, train: TrainConfig, rank: int, world_size: int) -> list["PackedBatch"]:
        """This rank's micro-batches of the step at `position`; its rows do not depend on how they are split."""
        rows, size = range(position + rank, position + train.rows_per_step, world_size), train.micro_batch
        return [self.batch(rows[start : start + size]) for start in range(0, len(rows), size)]

    def next_position(self, position: int, train: TrainConfig) -> int:
        """Where the step after the one at `position` begins."""
        return position + train.rows_per_step

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps so that a resumed run goes on with the same rows."""
        return {"position": position, "fingerprint": self.fingerprint, "parts": self.parts}

    def check_fingerprint(self, saved: Mapping[str, Any], on_change: str = "refuse") -> list[str]:
        """Compare a saved `state` with this stream; returns the names of the parts that differ.

        With `on_change="refuse"` a difference raises ConfigError; with "accept" it is a warning, and the position
        counts rows of the new stream.
        """
        return refuse_changed(saved, self.fingerprint, self.parts, on_change)

    def describe(self, rows: int) -> list[PoolUse]:
        """What the first `rows` positions take from each pool: tokens, share and epochs."""
        counts = self._slots.counts(rows).tolist()
        tokens = [count / pool.plan.rows * pool.plan.tokens for count, pool in zip(counts, self.pools)]
        total = sum(tokens) or 1.0
        return [
            PoolUse(
                name=pool.name,
                source=pool.source,
                documents=pool.documents,
                tokens_per_epoch=pool.plan.tokens,
                rows=count,
                tokens=part,
                share=part / total,
                epochs=count / pool.plan.rows,
            )
            for pool, count, part in zip(self.pools, counts, tokens)
        ]

    def _make_pools(self, weights: dict[str, float], bounds: list[tuple[float, int, int | None]]) -> list[Pool]:
        documents = {source: self.corpus.training_documents(source) for source in weights}
        lengths = {source: self.corpus.shards[source].lengths[documents[source]] for source in weights}
        total = sum(int(values.sum()) for values in lengths.values())
        if total < self.seq_len:
            raise ConfigError(
                f"train.seq_len={self.seq_len} is longer than all training text together ({total:,} tokens in "
                f"{', '.join(weights)}): use more data or a shorter length."
            )
        empty = [source for source, values in lengths.items() if not len(values)]
        if empty:
            raise ConfigError(
                f"data.sources.{empty[0]} has no document to train on: data.validation_fraction="
                f"{self.corpus.validation_fraction} holds all of them out. Lower it, or leave the source "
                "out of data.weights."
            )
        pools: list[Pool] = []
        bucket_total = sum(weight for weight, _, _ in bounds)
        for weight, low, high in bounds:
            chosen = {source: (values >= low) & (values < (high or np.inf)) for source, values in lengths.items()}
            present = [source for source in weights if chosen[source].any()]
            if not present:
                raise ConfigError(
                    f"data.length_buckets: no training document of {', '.join(weights)} has {low:,} <= tokens"
                    + (f" < {high:,}" if high else "")
                    + f"; the longest has {max(int(values.max(initial=0)) for values in lengths.values()):,}."
                )
            inside = sum(weights[source] for source in present)
            for source in present:
                share = weight / bucket_total * weights[source] / inside
                pools.append(
                    self._make_pool(
                        source, low, high, share, documents[source][chosen[source]], lengths[source][chosen[source]]
                    )
                )
        for source in weights.keys() - {pool.source for pool in pools}:
            logger.warning("%s has a weight, but none of its documents falls into data.length_buckets", source)
        return pools

    def _make_pool(
        self, source: str, low: int, high: int | None, share: float, documents: np.ndarray, lengths: np.ndarray
    ) -> Pool:
        shard = self.corpus.shards[source]
        key = derive_key(self.seed, "pool", source, low, high)
        documents, lengths = self._shorten(source, documents, lengths)
        identity = (
            PACKING_FORMAT,
            shard.folder.name,
            shard.content,
            self.corpus.validation_fraction,
            self.seq_len,
            self.packing,
            self.long_conversations,
            key,
        )
        folder = self.corpus.cache_dir / "plans" / f"{source}-{derive_key(*identity):016x}"
        plan = plan_of(folder, documents, lengths, self.seq_len, self.packing, key)
        return Pool(source, self.source_names.index(source), low, high, share, len(documents), plan, key)

    def _shorten(self, source: str, documents: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shard, policy = self.corpus.shards[source], self.long_conversations
        if policy != "split" and shard.mask is not None and self.packing == "concatenate":
            raise ConfigError(
                f"data.packing=concatenate cuts the conversations of {source} where a row ends: "
                "use data.packing=best_fit, or data.long_conversations=split to have it so"
            )
        documents, lengths, done = shorten(shard, documents, lengths, self.seq_len, policy)
        if not len(documents):
            raise ConfigError(
                f"data.long_conversations={policy}: every conversation of {source} is longer than "
                f"train.seq_len={self.seq_len}"
            )
        self.shortened[source] = self.shortened.get(source, Shortened()) + done
        return documents, lengths

    def _fingerprint_parts(self, weights: dict[str, float]) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "format": FORMAT,
            "tokenizer": self.corpus.tokenizer_fingerprint,
            "seq_len": self.seq_len,
            "packing": self.packing,
            "long_conversations": self.long_conversations,
            "seed": self.seed,
            "validation_fraction": self.corpus.validation_fraction,
            "mixture": [[pool.name, int(turns)] for pool, turns in zip(self.pools, self._slots.turns)],
        }
        for source in weights:
            parts[f"source {source}"] = self.corpus.shards[source].content
        for pool in self.pools:
            parts[f"rows of {pool.name}"] = pool.plan.content
        return parts


def refuse_changed(saved: Mapping[str, Any], fingerprint: str, parts: Mapping[str, Any], on_change: str) -> list[str]:
    """The names of the parts in which a saved state differs; ConfigError or, with on_change="accept", a warning."""
    if saved["fingerprint"] == fingerprint:
        return []
    before = saved.get("parts", {})
    changed = [name for name in sorted(before.keys() | parts.keys()) if before.get(name) != parts.get(name)]
    message = f"the training data changed since the checkpoint ({', '.join(changed) or 'fingerprint'})"
    if on_change != "accept":
        raise ConfigError(
            f"{message}, so that position {saved['position']} would mean other rows. Restore it, or set "
            "data.on_change=accept to go on at the same position of the new data."
        )
    logger.warning("%s; going on at position %s of the new data", message, saved["position"])
    return changed


def _bounds(buckets: Sequence[LengthBucket]) -> list[tuple[float, int, int | None]]:
    """(weight, min, max) of each bucket with a positive weight; one without limits where none is given."""
    if not buckets:
        return [(1.0, 0, None)]
    bounds = [
        (float(bucket.weight), int(bucket.min_tokens or 0), bucket.max_tokens)
        for bucket in buckets
        if bucket.weight > 0
    ]
    if not bounds:
        raise ConfigError("data.length_buckets: all weights are zero")
    ordered = sorted((low, high) for _, low, high in bounds)
    for low, high in ordered:
        if high is not None and high <= low:
            raise ConfigError(f"data.length_buckets: max_tokens={high} must exceed min_tokens={low}")
    for (_, high), (low, _) in itertools.pairwise(ordered):
        if high is None or low < high:
            raise ConfigError(f"data.length_buckets overlap at {low} tokens; a document must fall into one bucket")
    return bounds
