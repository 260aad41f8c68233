"""Loss on held-out documents, by source."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from internlm2.data.batch import PackedBatch, collate
from internlm2.data.corpus import Corpus
from internlm2.data.validation import validation_rows
from internlm2.engine.base import Engine, LossFunction
from internlm2.text.tokenizer import Tokenizer


class HeldOut:
    """Fixed rows of documents that are never trained on, for the sources that a stage trains on."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, sources: Sequence[str], seq_len: int, rows: int) -> None:
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes)
        self.batches: dict[str, list[PackedBatch]] = {
            source: [collate([row]) for row in part]
            for source, part in validation_rows(corpus, seq_len, rows, sources).items()
        }

    def measure(self, engine: Engine, loss: LossFunction) -> dict[str, Any]:
        """By source: `loss` (nats a token), `bits_per_byte` (of the text that the targets spell) and `tokens`."""
        found = {}
        for source, batches in self.batches.items():
            mine = batches[engine.data_rank :: engine.data_ranks]
            result = engine.evaluate(mine, loss)
            spelled = sum(self._bytes(batch) for batch in batches)
            bits = result.loss * result.tokens / math.log(2)
            found[source] = {"loss": result.loss, "bits_per_byte": bits / spelled, "tokens": result.tokens}
        return found

    def _bytes(self, batch: PackedBatch) -> int:
        """UTF-8 bytes of the tokens that have a loss."""
        return int(self.token_bytes[batch.labels[batch.labels >= 0]].sum())
