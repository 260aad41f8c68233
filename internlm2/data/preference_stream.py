"""Batches of preference pairs as a pure function of (seed, position), which counts batches, that is optimizer steps.

A batch holds whole records, as many as fit into a fixed number of tokens, without padding (16,384 in report 4.2.1);
the last batches of an epoch share its remainder. Each epoch has an order of its own; a source is passed through as
often as its weight says, a fraction of a pass being a part that changes from epoch to epoch.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from internlm2.config import ConfigError, TrainConfig
from internlm2.data.batch_bounds import batch_bounds
from internlm2.data.pair_batch import PairBatch, collate_pairs
from internlm2.data.preference_pairs import PairTable, PreferencePairs
from internlm2.data.stream import refuse_changed
from internlm2.permutation import derive_key, shuffled

FORMAT = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Units:
    """What a batch takes whole: the pairs first..stop of one record, or one pair of a record too large for a batch."""

    first: np.ndarray  # [U] int64
    stop: np.ndarray  # [U] int64
    tokens: np.ndarray  # [U] int64
    sources: np.ndarray  # [U] int64


class PreferenceStream:
    """`micro_batches(position, ...)` are the pairs of the optimizer step at a position; the state is the position.

    `passes`: source -> passes over its pairs in one epoch. `batch_tokens`: most tokens of a batch over all ranks.
    Raises ConfigError where two sequences of the greatest length would not fit, or there is nothing to train on.
    """

    def __init__(self, pairs: PreferencePairs, passes: Mapping[str, float], batch_tokens: int, seed: int) -> None:
        self.pairs, self.batch_tokens, self.seed = pairs, batch_tokens, seed
        self.passes = [float(passes[source]) for source in pairs.sources]
        if batch_tokens < 2 * pairs.sequences.seq_len:
            raise ConfigError(
                f"train.batch_tokens={batch_tokens} must hold a pair of the greatest length: use at least 2 x "
                f"train.seq_len = {2 * pairs.sequences.seq_len}."
            )
        if not len(pairs.training):
            raise ConfigError(
                f"data.sources: {', '.join(pairs.sources)} hold no pair to train on "
                f"(data.validation_fraction={pairs.corpus.validation_fraction} holds {len(pairs.held_out)} out)."
            )
        self.source_names = pairs.corpus.source_names
        self._index = np.array([self.source_names.index(source) for source in pairs.sources])
        self._units = self._make_units()
        self._epochs: list[tuple[np.ndarray, np.ndarray]] = []  # (order of units, batch bounds in it)
        self.parts = self._fingerprint_parts()
        self.fingerprint = hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:32]

    def steps(self, epochs: float) -> int:
        """Batches in so many epochs; the last epoch may be cut short."""
        whole, part = int(epochs), epochs - int(epochs)
        count = sum(self._batches(epoch) for epoch in range(whole))
        return max(1, count + (round(part * self._batches(whole)) if part else 0))

    def next_position(self, position: int, train: TrainConfig) -> int:
        """Where the step after the one at `position` begins."""
        return position + 1

    def micro_batches(self, position: int, train: TrainConfig, rank: int, world_size: int) -> list[PairBatch]:
        """This rank's part of the batch at `position`, in forward passes of at most `train.micro_batch` pairs of the
        greatest length, that is 2 x seq_len tokens each.

        Every rank has as many of them as the others; one without pairs of its own gets batches of no pair.
        """
        units = self._batch(position)
        ranges = [range(int(self._units.first[unit]), int(self._units.stop[unit])) for unit in units]
        return self.divide(self.pairs.training, ranges, train.micro_batch, rank, world_size)

    def divide(
        self,
        table: PairTable,
        units: Sequence[Iterable[int]],
        micro_batch: int,
        rank: int,
        world_size: int,
        domain: str | None = None,
    ) -> list[PairBatch]:
        """Units (pairs that stay together) of `table`, dealt to the ranks and cut into forward passes; `domain` as in
        `collate`.
        """
        limit = 2 * self.pairs.sequences.seq_len * micro_batch
        dealt = [list(self._cut(table, units[number::world_size], limit)) for number in range(world_size)]
        longest = max(len(parts) for parts in dealt)
        mine: list[list[int]] = dealt[rank] + [[] for _ in range(longest - len(dealt[rank]))]
        return [self.collate(table, part, domain) for part in mine]

    def collate(self, table: PairTable, numbers: Sequence[int], domain: str | None = None) -> PairBatch:
        """The pairs `numbers` of `table` as one batch; `domain` puts all under that domain's condition."""
        sequences: dict[int, tuple[np.ndarray, int]] = {}
        rows = []
        for pair in numbers:
            chosen, rejected = int(table.chosen[pair]), int(table.rejected[pair])
            told = self.pairs.domains[int(table.domains[pair])] if domain is None else domain
            source = int(self._index[table.sources[pair]])
            for sequence in (chosen, rejected):
                if sequence not in sequences:
                    sequences[sequence] = (self.pairs.ids(sequence, told), source)
            rows.append((pair, chosen, rejected, float(table.gaps[pair])))
        return collate_pairs(sequences, rows, self.pairs.sequences.tokenizer.bos_id)

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps so that a resumed run goes on with the same pairs."""
        return {"position": position, "fingerprint": self.fingerprint, "parts": self.parts}

    def check_fingerprint(self, saved: Mapping[str, Any], on_change: str = "refuse") -> list[str]:
        """As `TokenStream.check_fingerprint`."""
        return refuse_changed(saved, self.fingerprint, self.parts, on_change)

    def _cut(self, table: PairTable, units: Sequence[Iterable[int]], limit: int) -> Iterator[list[int]]:
        """Pairs of the units in order, in parts whose sequences have at most `limit` tokens together."""
        part: list[int] = []
        used = 0
        for unit in units:
            numbers = np.fromiter(unit, np.int64)
            size = self._size(table, numbers)
            # A record that is too large for one pass, though not for the batch, goes pair by pair.
            pieces = [numbers] if size <= limit else [numbers[i : i + 1] for i in range(len(numbers))]
            for piece in pieces:
                size = self._size(table, piece)
                if part and used + size > limit:
                    yield part
                    part, used = [], 0
                part, used = part + piece.tolist(), used + size
        if part:
            yield part

    def _size(self, table: PairTable, numbers: np.ndarray) -> int:
        """Tokens of the different sequences of some pairs."""
        both = np.concatenate([table.chosen[numbers], table.rejected[numbers]])
        sequences, places = np.unique(both, return_index=True)
        return int(self.pairs.lengths(sequences, np.tile(table.domains[numbers], 2)[places]).sum())

    def _make_units(self) -> _Units:
        table = self.pairs.training
        new = (np.diff(table.records, prepend=-1) != 0) | (np.diff(table.sources, prepend=-1) != 0)
        first = np.flatnonzero(new)
        stop = np.append(first[1:], len(table))
        # A sequence belongs to one record, so counting each once in the whole table counts it once in its unit.
        both = np.stack([table.chosen, table.rejected], axis=1).reshape(-1)
        domains = np.repeat(table.domains, 2)
        lengths = self.pairs.lengths(both, domains)
        _, places = np.unique(both, return_index=True)
        once = np.zeros(len(both), np.int64)
        once[places] = lengths[places]
        tokens = np.add.reduceat(once.reshape(-1, 2).sum(axis=1), first)
        large = tokens > self.batch_tokens
        if large.any():
            pieces = np.concatenate([np.arange(a, b) for a, b in zip(first[large], stop[large])])
            first, stop = np.concatenate([first[~large], pieces]), np.concatenate([stop[~large], pieces + 1])
            tokens = np.concatenate([tokens[~large], lengths.reshape(-1, 2).sum(axis=1)[pieces]])
        return _Units(first, stop, tokens, table.sources[first])

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        while len(self._epochs) <= number:
            self._epochs.append(self._plan(len(self._epochs)))
        return self._epochs[number]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Units in the order of an epoch, and where its batches begin and end in that order."""
        taken = []
        for source, passes in enumerate(self.passes):
            units = np.flatnonzero(self._units.sources == source)
            key = derive_key(self.seed, "preferences", self.pairs.sources[source], epoch)
            taken += [units] * int(passes)
            taken.append(units[shuffled(len(units), key)[: round((passes - int(passes)) * len(units))]])
        units = np.concatenate(taken)
        order = units[shuffled(len(units), derive_key(self.seed, "preferences", epoch))]
        return order, batch_bounds(self._units.tokens[order], self.batch_tokens)

    def _batches(self, epoch: int) -> int:
        return len(self._epoch(epoch)[1]) - 1

    def _batch(self, position: int) -> np.ndarray:
        """The units of the batch at a position from 0; epochs follow each other without end."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        epoch = 0
        while position >= self._batches(epoch):
            position -= self._batches(epoch)
            epoch += 1
        order, bounds = self._epoch(epoch)
        return order[bounds[position] : bounds[position + 1]]

    def _fingerprint_parts(self) -> dict[str, Any]:
        conditions = json.dumps(
            {domain: list(ids) for domain, ids in self.pairs.sequences.conditions.items()}, sort_keys=True
        )
        parts: dict[str, Any] = {
            "format": FORMAT,
            "tokenizer": self.pairs.corpus.tokenizer_fingerprint,
            "seq_len": self.pairs.sequences.seq_len,
            "batch_tokens": self.batch_tokens,
            "seed": self.seed,
            "validation_fraction": self.pairs.corpus.validation_fraction,
            "drop_long": self.pairs.drop_long,
            "conditions": hashlib.sha256(conditions.encode()).hexdigest()[:16],
            "passes": dict(zip(self.pairs.sources, self.passes)),
        }
        for source, shard in zip(self.pairs.sources, self.pairs.shards):
            parts[f"source {source}"] = shard.content
        return parts
