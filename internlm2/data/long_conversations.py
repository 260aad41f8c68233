"""What happens to conversations that are longer than a row: nothing of an answer is left out without being counted.

`split`  as with any long document, every token is used; later pieces hold answers without what was asked
`cut`    keep the turns up to the last answer that fits; where not even the first answer fits, its beginning
`drop`   leave the conversation out

A conversation is a document in which some tokens carry no loss. Plain documents are always split: a long text loses
nothing by it, and long documents belong in the mix (report 4.3).
"""

from dataclasses import dataclass

import numpy as np

from internlm2.data.shards import Shard

POLICIES = ("split", "cut", "drop")


@dataclass(frozen=True)
class Shortened:
    """What the policy did to the conversations of one source."""

    conversations: int = 0  # longer than a row
    dropped: int = 0  # of these, left out altogether
    cut_answers: int = 0  # of these, ending inside an answer
    tokens: int = 0  # left out
    targets: int = 0  # of these, tokens with loss

    def __add__(self, other: "Shortened") -> "Shortened":
        return Shortened(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def sentence(self, source: str, seq_len: int, policy: str) -> str:
        """One line for the log."""
        return (
            f"{source}: {self.conversations:,} conversations exceed train.seq_len={seq_len} "
            f"(data.long_conversations={policy}): {self.dropped:,} left out, {self.cut_answers:,} end inside an "
            f"answer; {self.tokens:,} tokens are not used, {self.targets:,} of them targets"
        )


def shorten(
    shard: Shard, documents: np.ndarray, lengths: np.ndarray, seq_len: int, policy: str
) -> tuple[np.ndarray, np.ndarray, Shortened]:
    """Documents [N] and how many tokens of each to use [N], of `documents` [M] with `lengths` [M]; what was left
    out.
    """
    if policy == "split" or shard.mask is None:
        return documents, lengths, Shortened()
    kept, done = lengths.copy(), Shortened()
    for place in np.flatnonzero(lengths > seq_len):
        begin = int(shard.offsets[documents[place]])
        mask = np.asarray(shard.mask[begin : begin + int(lengths[place])])
        if not mask.any():
            continue
        length = 0 if policy == "drop" else last_answer_end(mask, seq_len)
        kept[place] = length
        done += Shortened(
            conversations=1,
            dropped=int(length == 0),
            cut_answers=int(0 < length < len(mask) and not mask[length - 1] and not mask[length]),
            tokens=len(mask) - length,
            targets=int((mask[length:] == 0).sum()),
        )
    used = kept > 0
    return documents[used], kept[used], done


def last_answer_end(mask: np.ndarray, seq_len: int) -> int:
    """Tokens of a conversation up to its last answer that ends within `seq_len`; `mask` [T] is 1 where a token has no
    loss.

    Where no answer ends there: `seq_len` if one has begun, else 0.
    """
    trained = mask == 0
    ends = np.flatnonzero(trained & np.append(~trained[1:], True)) + 1
    ends = ends[ends <= seq_len]
    if len(ends):
        return int(ends[-1])
    return seq_len if trained[:seq_len].any() else 0
