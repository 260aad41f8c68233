"""The tokenized sources of a run, divided into training and held-out documents."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from internlm2.config import ConfigError
from internlm2.data.shards import Shard


@dataclass
class Corpus:
    """Shards by source name. A document is held out by the hash of its content, so adding other documents never moves
    it, and exact copies, in whatever source, lie on the same side.
    """

    shards: dict[str, Shard]
    tokenizer_fingerprint: str
    validation_fraction: float
    cache_dir: Path
    _held_out: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def source_names(self) -> list[str]:
        """Names in a fixed order; their places are the source numbers in rows and batches."""
        return list(self.shards)

    def shard(self, source: str) -> Shard:
        """Shard of a source; ConfigError for an unknown name."""
        if source not in self.shards:
            raise ConfigError(f"there is no source {source!r}; the corpus has {', '.join(self.shards)}")
        return self.shards[source]

    def training_documents(self, source: str) -> np.ndarray:
        """[N] int64 numbers of the documents that are trained on."""
        return np.flatnonzero(~self._held(source))

    def held_out_documents(self, source: str) -> np.ndarray:
        """[N] int64 numbers of the documents that are never trained on."""
        return np.flatnonzero(self._held(source))

    def bytes_per_token(self, source: str) -> float | None:
        """UTF-8 bytes of text for each token, over the whole source; None where only tokens are known.

        For the loss of particular rows in bits per byte, sum `Tokenizer.token_bytes` over their labels instead.
        """
        shard = self.shard(source)
        return shard.text_bytes / shard.total_tokens if shard.text_bytes else None

    def _held(self, source: str) -> np.ndarray:
        if source not in self._held_out:
            self._held_out[source] = self.shard(source).held_out(self.validation_fraction)
        return self._held_out[source]
