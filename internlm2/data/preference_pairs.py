"""All pairs of the sources of a stage: which answer was preferred to which, and the tokens that the reward model reads.

A sequence is `<s>`, the condition of its domain, prompt and answer in the chat format, and the reward token, at whose
place the score is read (report 4.2.1). Too long an answer loses tokens before its `<|im_end|>`, never that or the
reward token. Pairs whose sides are equal, before or after that, and repetitions of a pair are dropped and counted.
"""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from internlm2.config import ConfigError
from internlm2.data.corpus import Corpus
from internlm2.data.shards import Shard
from internlm2.data.tokenizer import Tokenizer

REWARD_TOKEN = "<|reward|>"


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
    """`training` and `held_out` pairs of a corpus, and `ids(sequence, domain)`.

    conditions  domain -> tokens that stand behind `<s>`; {} for a model without conditions
    seq_len     most tokens of a sequence, condition and reward token included
    Raises ConfigError where a source holds no answers to compare, or the vocabulary has no reward token.
    """

    corpus: Corpus
    sources: list[str]
    tokenizer: Tokenizer
    conditions: Mapping[str, list[int]]
    seq_len: int
    domains: list[str] = field(init=False)
    counts: list[SourcePairs] = field(init=False)
    training: PairTable = field(init=False)
    held_out: PairTable = field(init=False)

    def __post_init__(self) -> None:
        self.reward_id = self.tokenizer.special_id(REWARD_TOKEN)
        self.end_id = self.tokenizer.special_id("<|im_end|>")
        self.start_id = self.tokenizer.special_id("<|im_start|>")
        self.shards = [self.corpus.shard(source) for source in self.sources]
        for shard in self.shards:
            if not shard.domains:
                raise ConfigError(
                    f"data.sources.{shard.name} holds no preferences: use kind=preferences, or a part of kind=stdlib, "
                    "package or toy that has answers to compare."
                )
        self.domains = sorted({domain for shard in self.shards for domain in shard.domains})
        longest = max((len(ids) for ids in self.conditions.values()), default=0)
        # The same for every domain, so that a sequence under another's condition is the same text.
        self.room = self.seq_len - longest - 1
        if self.room < 8:
            raise ConfigError(
                f"train.seq_len={self.seq_len} leaves no room for a conversation: the longest condition has {longest} "
                "tokens."
            )
        self.first_sequence = np.cumsum([0, *(shard.documents for shard in self.shards)])
        self._seen: set[bytes] = set()  # also over sources: a pair that two of them hold counts once
        tables = [self._table(number, shard) for number, shard in enumerate(self.shards)]
        self._seen.clear()
        self.counts = [counts for _, _, counts in tables]
        self.training = _joined([training for training, _, _ in tables])
        self.held_out = _joined([held_out for _, held_out, _ in tables])

    def ids(self, sequence: int, domain: str) -> np.ndarray:
        """[length] int64: what the model reads for an answer, under a domain's condition."""
        source = int(np.searchsorted(self.first_sequence, sequence, side="right")) - 1
        tokens = self._tokens(self.shards[source], sequence - int(self.first_sequence[source]))
        condition = np.array(self.conditions.get(domain, []), np.int64)
        return np.concatenate([tokens[:1], condition, tokens[1:], [self.reward_id]])

    def lengths(self, sequences: np.ndarray, domains: np.ndarray) -> np.ndarray:
        """[S] int64: tokens of sequences under the conditions of `domains` (indices)."""
        stored = np.concatenate([shard.lengths for shard in self.shards])[sequences]
        added = np.array([len(self.conditions.get(domain, [])) + 1 for domain in self.domains], np.int64)
        return np.minimum(stored, self.room) + added[domains]

    def answer_length(self, sequence: int) -> int:
        """Tokens of the answer alone: what follows the last turn's header, without its end."""
        source = int(np.searchsorted(self.first_sequence, sequence, side="right")) - 1
        tokens = self._tokens(self.shards[source], sequence - int(self.first_sequence[source]))
        start = int(np.flatnonzero(tokens == self.start_id)[-1])
        return int(np.flatnonzero(tokens == self.end_id)[-1]) - start - 1

    def _tokens(self, shard: Shard, document: int) -> np.ndarray:
        tokens = np.asarray(shard.document(document), np.int64)
        if len(tokens) <= self.room:
            return tokens
        end = int(np.flatnonzero(tokens == self.end_id)[-1])
        tail = tokens[end:]
        return np.concatenate([tokens[: self.room - len(tail)], tail])

    def _table(self, source: int, shard: Shard) -> tuple[PairTable, PairTable, SourcePairs]:
        """The pairs of one source on both sides of the hold-out."""
        records, scores, domain_index = np.asarray(shard.records), np.asarray(shard.scores), shard.domain_index
        starts = np.flatnonzero(np.diff(records, prepend=-1))
        held = shard.held_out(self.corpus.validation_fraction)
        counts = SourcePairs(shard.name, domains=", ".join(shard.domains))
        counts.cut_answers = int((shard.lengths > self.room).sum())
        rows: list[tuple[int, int, float, int, int, int]] = []
        base = int(self.first_sequence[source])
        for start, stop in itertools.pairwise([*starts.tolist(), len(records)]):
            domain = self.domains.index(shard.domains[int(domain_index[start])])
            hashes = [self._hash(shard, document) for document in range(start, stop)]
            for a, b in itertools.combinations(range(start, stop), 2):
                if scores[a] == scores[b]:
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

    def _hash(self, shard: Shard, document: int) -> bytes:
        return hashlib.blake2b(self._tokens(shard, document).tobytes(), digest_size=12).digest()


def _table_of(rows: list[tuple[int, int, float, int, int, int]]) -> PairTable:
    columns: list[Any] = list(zip(*rows)) if rows else [[]] * 6
    kinds = (np.int64, np.int64, np.float64, np.int64, np.int64, np.int64)
    return PairTable(*(np.array(column, kind) for column, kind in zip(columns, kinds)))


def _joined(tables: list[PairTable]) -> PairTable:
    names = list(PairTable.__dataclass_fields__)
    return PairTable(*(np.concatenate([getattr(table, name) for table in tables]) for name in names))
