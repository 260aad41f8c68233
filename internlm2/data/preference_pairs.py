"""All pairs of the sources of a stage: which answer was preferred to which.

Pairs whose sides are equal, also when they become so because they are cut to the greatest length, repetitions of a
pair and, if asked, pairs with too long an answer are dropped and counted.
"""

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from internlm2.config import ConfigError
from internlm2.data.corpus import Corpus
from internlm2.data.reward_sequence import RewardSequences
from internlm2.data.shards import Shard


@dataclass
class SourcePairs:
    """What one source has, on one side of the hold-out: counts for the log and for data.json."""

    source: str
    pairs: int = 0
    held_out_pairs: int = 0
    tokens: int = 0  # of the training pairs; an answer that stands in several pairs of a record counts once
    domains: str = ""
    equal: int = 0
    repeated: int = 0
    too_long: int = 0
    cut_answers: int = 0


@dataclass
class PairTable:
    """P pairs of one side of the hold-out; arrays over pairs. A record is one prompt with its answers.

    Sequences are numbered over all sources: source s, document d is `first_sequence[s] + d`.
    """

    chosen: np.ndarray  # [P] int64 sequence
    rejected: np.ndarray  # [P] int64 sequence
    gaps: np.ndarray  # [P] float64, score of the chosen minus score of the rejected
    domains: np.ndarray  # [P] int64, index into PreferencePairs.domains
    sources: np.ndarray  # [P] int64
    records: np.ndarray  # [P] int64, number of the record; pairs of one record are neighbours

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, chosen: np.ndarray) -> "PairTable":
        """The pairs at these places."""
        return PairTable(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass
class PreferencePairs:
    """`training` and `held_out` pairs of the sources of a corpus, and `ids(sequence, domain)`.

    `drop_long`: leave out pairs of which an answer would have to be cut, instead of cutting it.
    Raises ConfigError where a source holds no answers to compare.
    """

    corpus: Corpus
    sources: list[str]
    sequences: RewardSequences
    drop_long: bool = False
    domains: list[str] = field(init=False)
    counts: list[SourcePairs] = field(init=False)
    training: PairTable = field(init=False)
    held_out: PairTable = field(init=False)

    def __post_init__(self) -> None:
        self._end_id, self._start_id = map(self.sequences.tokenizer.special_id, ("<|im_end|>", "<|im_start|>"))
        self.shards = [self.corpus.shard(source) for source in self.sources]
        for shard in self.shards:
            if not shard.domains:
                raise ConfigError(
                    f"data.sources.{shard.name} holds no preferences: use kind=preferences, or a part of kind=stdlib, "
                    "package or toy that has answers to compare."
                )
        self.domains = sorted({domain for shard in self.shards for domain in shard.domains})
        self.first_sequence = np.cumsum([0, *(shard.documents for shard in self.shards)])
        self._seen: set[bytes] = set()  # also over sources: a pair that two of them hold counts once
        tables = [self._table(number, shard) for number, shard in enumerate(self.shards)]
        self._seen.clear()
        self.counts = [counts for _, _, counts in tables]
        self.training = _joined([training for training, _, _ in tables])
        self.held_out = _joined([held_out for _, held_out, _ in tables])

    def ids(self, sequence: int, domain: str) -> np.ndarray:
        """[length] int64: what the model reads for an answer, under a domain's condition."""
        return self.sequences.ids(self._conversation(sequence), domain)

    def lengths(self, sequences: np.ndarray, domains: np.ndarray) -> np.ndarray:
        """[S] int64: tokens of sequences under the conditions of `domains` (indices)."""
        stored = np.concatenate([shard.lengths for shard in self.shards])[sequences]
        conditions = self.sequences.conditions
        added = np.array([len(conditions.get(domain, ())) + 1 for domain in self.domains], np.int64)
        return np.minimum(stored, self.sequences.room) + added[domains]

    def answer_length(self, sequence: int) -> int:
        """Tokens of the answer alone: what follows the last turn's header, without its end."""
        tokens = self.sequences.shorten(self._conversation(sequence))
        start = int(np.flatnonzero(tokens == self._start_id)[-1])
        return int(np.flatnonzero(tokens == self._end_id)[-1]) - start - 1

    def _conversation(self, sequence: int) -> np.ndarray:
        source = int(np.searchsorted(self.first_sequence, sequence, side="right")) - 1
        document = self.shards[source].document(sequence - int(self.first_sequence[source]))
        return np.asarray(document, np.int64)

    def _table(self, source: int, shard: Shard) -> tuple[PairTable, PairTable, SourcePairs]:
        """The pairs of one source on both sides of the hold-out."""
        records, scores, domain_index = np.asarray(shard.records), np.asarray(shard.scores), shard.domain_index
        starts = np.flatnonzero(np.diff(records, prepend=-1))
        held = shard.held_out(self.corpus.validation_fraction)
        counts = SourcePairs(shard.name, domains=", ".join(shard.domains))
        long = np.asarray(shard.lengths) > self.sequences.room
        counts.cut_answers = 0 if self.drop_long else int(long.sum())
        rows: list[tuple[int, int, float, int, int, int]] = []
        base = int(self.first_sequence[source])
        for start, stop in itertools.pairwise([*starts.tolist(), len(records)]):
            domain = self.domains.index(shard.domains[int(domain_index[start])])
            hashes = [self.digest(base + document) for document in range(start, stop)]
            for a, b in itertools.combinations(range(start, stop), 2):
                if scores[a] == scores[b]:
                    continue
                if self.drop_long and (long[a] or long[b]):
                    counts.too_long += 1
                    continue
                better, worse = (a, b) if scores[a] > scores[b] else (b, a)
                sides = hashes[better - start] + hashes[worse - start]
                key = sides + domain.to_bytes(4, "little")
                if hashes[better - start] == hashes[worse - start]:
                    counts.equal += 1
                elif key in self._seen:
                    counts.repeated += 1
                else:
                    self._seen.add(key)
                    gap = float(scores[better] - scores[worse])
                    rows.append((base + better, base + worse, gap, domain, source, int(records[start])))
        table = _table_of(rows)
        held_pairs = held[table.chosen - base]
        training, held_out = table.take(~held_pairs), table.take(held_pairs)
        counts.pairs, counts.held_out_pairs = len(training), len(held_out)
        used, places = np.unique(np.concatenate([training.chosen, training.rejected]), return_index=True)
        counts.tokens = int(self.lengths(used, np.tile(training.domains, 2)[places]).sum())
        return training, held_out, counts

    def digest(self, sequence: int) -> bytes:
        """Hash of a conversation as the model reads it, without its condition."""
        tokens = self.sequences.shorten(self._conversation(sequence))
        return hashlib.blake2b(tokens.tobytes(), digest_size=12).digest()


def _table_of(rows: list[tuple[int, int, float, int, int, int]]) -> PairTable:
    columns: list[Any] = list(zip(*rows)) if rows else [[]] * 6
    kinds = (np.int64, np.int64, np.float64, np.int64, np.int64, np.int64)
    return PairTable(*(np.array(column, kind) for column, kind in zip(columns, kinds)))


def _joined(tables: list[PairTable]) -> PairTable:
    names = list(PairTable.__dataclass_fields__)
    return PairTable(*(np.concatenate([getattr(table, name) for table in tables]) for name in names))
