"""Loss on held-out documents, by source."""

import math
from collections.abc import Sequence
from typing import Any

from internlm2.data.batch import PackedBatch, collate
from internlm2.data.corpus import Corpus
from internlm2.data.validation import validation_rows
from internlm2.engine.base import Engine, LossFunction


class HeldOut:
    """Fixed rows of documents that are never trained on, for the sources that a stage trains on."""

    def __init__(self, corpus: Corpus, sources: Sequence[str], seq_len: int, rows: int) -> None:
        self.corpus = corpus
        self.batches: dict[str, list[PackedBatch]] = {
            source: [collate([row]) for row in part]
            for source, part in validation_rows(corpus, seq_len, rows, sources).items()
        }

    def measure(self, engine: Engine, loss: LossFunction) -> dict[str, Any]:
        """For each source `loss` (nats a token), `bits_per_byte` (None where the text's bytes are unknown) and `tokens`."""
        found = {}
        for source, batches in self.batches.items():
            mine = batches[engine.rank :: engine.world_size]
            result = engine.evaluate(mine, loss)
            bytes_per_token = self.corpus.bytes_per_token(source)
            found[source] = {
                "loss": result.loss,
                "bits_per_byte": result.loss / math.log(2) / bytes_per_token if bytes_per_token else None,
                "tokens": result.tokens,
            }
        return found
