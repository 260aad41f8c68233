"""What a reward model reads: a conversation behind its condition, and the reward token last (report 4.2.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from internlm2.config import ConfigError
from internlm2.text.tokenizer import Tokenizer

REWARD_TOKEN = "<|reward|>"


@dataclass
class RewardSequences:
    """`<s>`, the condition of the domain, the conversation in the chat format, and the reward token.

    conditions  domain -> tokens that stand behind `<s>`; a domain that is absent has none
    seq_len     most tokens of a sequence, condition and reward token included. Too long an answer loses tokens before
                its `<|im_end|>`, never that or the reward token
    Raises ConfigError where the vocabulary has no reward token, or the conditions leave no room for a conversation.
    """

    tokenizer: Tokenizer
    conditions: Mapping[str, Sequence[int]]
    seq_len: int
    reward_id: int = field(init=False)
    room: int = field(init=False)  # tokens of a conversation

    def __post_init__(self) -> None:
        self.reward_id = self.tokenizer.special_id(REWARD_TOKEN)
        self._end_id = self.tokenizer.special_id("<|im_end|>")
        longest = max((len(ids) for ids in self.conditions.values()), default=0)
        # The same for every domain, so that a conversation under another's condition is the same text.
        self.room = self.seq_len - longest - 1
        if self.room < 8:
            raise ConfigError(
                f"train.seq_len={self.seq_len} leaves no room for a conversation: the longest condition has {longest} "
                "tokens."
            )

    def shorten(self, conversation: np.ndarray) -> np.ndarray:
        """The rendered conversation [length] int64, cut to `room` tokens."""
        if len(conversation) <= self.room:
            return conversation
        end = int(np.flatnonzero(conversation == self._end_id)[-1])
        tail = conversation[end:]
        return np.concatenate([conversation[: self.room - len(tail)], tail])

    def ids(self, conversation: np.ndarray, domain: str) -> np.ndarray:
        """[length] int64: what the model reads of a rendered conversation, under a domain's condition."""
        kept = self.shorten(conversation)
        condition = np.array(self.conditions.get(domain, ()), np.int64)
        return np.concatenate([kept[:1], condition, kept[1:], [self.reward_id]])
