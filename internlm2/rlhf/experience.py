"""What one iteration learns from: every answer's log-probabilities, values, rewards and advantages, on packed rows.

n answers of A action tokens in all; bounds [n + 1] as in `estimators`. A packed row holds whole sequences, prompt and
answer, one after another. The last token of an answer is predicted but never read: nothing follows it. So an answer of
L tokens behind a prompt of P takes P + L - 1 tokens, and its token t is predicted, and its state valued, at position
P - 1 + t of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from internlm2.permutation import derive_key, shuffled
from internlm2.rlhf.rollout import Rollout


@dataclass(frozen=True)
class Packed:
    """Sequences of one packed row and where their actions are predicted."""

    ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [r + 1] int32
    max_seqlen: int
    at: Tensor  # [a] int64: the position before each action
    labels: Tensor  # [a] int64: the actions

    def to(self, device: torch.device | str) -> "Packed":
        return move(self, device)


@dataclass(frozen=True)
class Experience:
    """One iteration's answers of this rank; tensors [A] float32 on the host but for bounds [n + 1] and shaped [n]."""

    rollouts: list[Rollout]
    bounds: Tensor
    old_logprobs: Tensor  # of the policy that is about to be updated, at the rollout's temperature
    reference: Tensor
    values: Tensor  # 0 without a critic
    advantages: Tensor
    returns: Tensor
    weights: Tensor  # truncated importance weights; 1 where none are used

    def rows(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """The token tensors of some answers, one after another."""
        at = token_places(self.bounds, chosen)
        names = ("old_logprobs", "reference", "values", "advantages", "returns", "weights")
        return {name: getattr(self, name)[at] for name in names}


@dataclass(frozen=True)
class PolicyBatch:
    """A micro-batch of answers for the actor or the critic. `loss_tokens` counts its actions."""

    packed: Packed
    old_logprobs: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor

    @property
    def loss_tokens(self) -> int:
        return len(self.old_logprobs)

    def to(self, device: torch.device | str) -> "PolicyBatch":
        return replace(move(self, device), packed=self.packed.to(device))


def move(batch: Any, device: torch.device | str) -> Any:
    """A dataclass with its tensors on `device`."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})


def bounds_of(rollouts: Sequence[Rollout]) -> Tensor:
    """[n + 1] int64."""
    return torch.tensor([0, *(len(rollout.tokens) for rollout in rollouts)]).cumsum(0)


def token_places(bounds: Tensor, chosen: Sequence[int]) -> Tensor:
    """Places in [A] of the tokens of some answers, in the order of `chosen`."""
    parts = [torch.arange(int(bounds[row]), int(bounds[row + 1])) for row in chosen]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


def pack(rollouts: Sequence[Rollout]) -> Packed:
    """Prompt and answer of each, without the answer's last token."""
    ids: list[int] = []
    at: list[int] = []
    labels: list[int] = []
    lengths = []
    for rollout in rollouts:
        prompt = rollout.question.ids
        first = len(ids) + len(prompt) - 1
        at.extend(range(first, first + len(rollout.tokens)))
        labels.extend(rollout.tokens)
        row = prompt + rollout.tokens[:-1]
        ids.extend(row)
        lengths.append(len(row))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Packed(torch.tensor(ids), cu_seqlens, max(lengths, default=0), torch.tensor(at), torch.tensor(labels))


def plan(sizes: Sequence[int], budget: int, parts: int = 1) -> list[list[int]]:
    """Rows of `sizes` tokens into at least `parts` packs of at most `budget` tokens; a longer row is alone in one.

    Longest first, each into the first pack that has room: few packs, and rows of like lengths together. `parts` lets
    every rank make equally many passes, which sharded weights need.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        place = next((number for number, left in enumerate(room) if sizes[row] <= left), None)
        if place is None:
            packs.append([])
            room.append(budget)
            place = len(packs) - 1
        packs[place].append(row)
        room[place] -= sizes[row]
    while len(packs) < parts and any(len(rows) > 1 for rows in packs):
        largest = max(range(len(packs)), key=lambda number: len(packs[number]))
        half = len(packs[largest]) // 2
        packs.append(packs[largest][half:])
        packs[largest] = packs[largest][:half]
    return packs


def sequence_tokens(rollout: Rollout) -> int:
    """Tokens that a forward pass over the answer reads."""
    return len(rollout.question.ids) + len(rollout.tokens) - 1


@torch.no_grad()
def each_token(
    forward: Callable[[Packed], Sequence[Tensor]],
    rollouts: Sequence[Rollout],
    packs: Sequence[Sequence[int]],
    device: torch.device | str,
) -> list[Tensor]:
    """Run `forward` over the packs; its results, [a] each, come back as [A] float32 on the host, in the answers' order.

    No logits are kept: `forward` gives numbers a token.
    """
    bounds = bounds_of(rollouts)
    outputs: list[Tensor] = []
    for chosen in packs:
        found = forward(pack([rollouts[row] for row in chosen]).to(device))
        if not outputs:
            outputs = [torch.empty(int(bounds[-1])) for _ in found]
        places = token_places(bounds, chosen)
        for output, part in zip(outputs, found, strict=True):
            output[places] = part.float().cpu()
    return outputs


def minibatches(rows: int, count: int, seed: int, iteration: int, epoch: int) -> Iterator[list[int]]:
    """`count` parts of range(rows), in an order that each epoch draws anew."""
    order = shuffled(rows, derive_key(seed, "minibatches", iteration, epoch)).tolist()
    for number in range(count):
        yield sorted(order[number::count])


def policy_batches(experience: Experience, rows: Sequence[int], budget: int, parts: int = 1) -> list[PolicyBatch]:
    """The micro-batches of one optimizer step over the answers `rows`."""
    sizes = [sequence_tokens(experience.rollouts[row]) for row in rows]
    batches = []
    for chosen in plan(sizes, budget, parts):
        answers = [rows[place] for place in chosen]
        packed = pack([experience.rollouts[row] for row in answers])
        batches.append(PolicyBatch(packed, **experience.rows(answers)))
    return batches
