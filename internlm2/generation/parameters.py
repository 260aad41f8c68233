"""How to choose the next token, and when to stop."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from internlm2.config import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """One prompt's wishes. The defaults sample from the model's own distribution, which is what rollouts want.

    temperature         divides the logits; 0 takes the most likely token (greedy)
    top_k               keep the k most likely tokens; 0 keeps all
    top_p               keep the smallest set of most likely tokens whose probabilities sum to at least top_p
    min_p               keep tokens at least min_p times as likely as the most likely one
    repetition_penalty  logits of tokens that occur in the prompt or the answer: divided by it where positive,
                        multiplied where negative; 1 changes nothing
    max_new_tokens      at most so many new tokens
    stop_ids            tokens that end an answer; the token itself belongs to the answer
    seed                with the row's id and the token's position it fixes every draw
    n                   answers for each prompt

    Applied in the order penalty, temperature, top_k, top_p, min_p, each on what the one before left, as transformers
    does.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    stop_ids: Sequence[int] = field(default=())
    seed: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        self._within("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or above")
        self._within("top_k", self.top_k >= 0, "0 (off) or above")
        self._within("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1 (off)")
        self._within("min_p", 0.0 <= self.min_p <= 1.0, "between 0 (off) and 1")
        self._within("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "above 0 (1 is off)")
        self._within("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        self._within("seed", 0 <= self.seed < 1 << 64, "a 64-bit number, 0 or above")
        self._within("n", self.n >= 1, "at least 1")

    def _within(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """True where some tokens cannot be drawn at all."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0
