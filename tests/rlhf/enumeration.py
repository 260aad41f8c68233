"""A policy small enough to enumerate: 3 tokens, answers of up to 3, a table of logits for each prefix, float64."""

import itertools

import torch
from torch import Tensor

VOCABULARY, LONGEST, END = 3, 3, 0

Answer = tuple[int, ...]


def answers() -> list[Answer]:
    """Every answer: it ends with END, or at LONGEST tokens."""
    return [
        answer
        for length in range(1, LONGEST + 1)
        for answer in itertools.product(range(VOCABULARY), repeat=length)
        if END not in answer[:-1] and (answer[-1] == END or length == LONGEST)
    ]


def prefixes() -> list[Answer]:
    """Every state in which a token is chosen."""
    return sorted({answer[:at] for answer in answers() for at in range(len(answer))}, key=lambda p: (len(p), p))


class TablePolicy:
    """logits [states, V]; the state of a prefix is its place in `prefixes()`."""

    def __init__(self, seed: int) -> None:
        self.states = {prefix: number for number, prefix in enumerate(prefixes())}
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.states), VOCABULARY)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def logprobs(self, answer: Answer) -> Tensor:
        """Of each token of an answer, [L]."""
        at = [self.states[answer[:t]] for t in range(len(answer))]
        return self.logits[at].log_softmax(-1)[range(len(answer)), list(answer)]

    def kl(self, other: "TablePolicy") -> Tensor:
        """Exact KL(self || other) of whole answers."""
        parts = [
            self.logprobs(answer).sum().exp() * (self.logprobs(answer).sum() - other.logprobs(answer).sum())
            for answer in answers()
        ]
        return torch.stack(parts).sum()

    def expected(self, of_answer: dict[Answer, Tensor]) -> Tensor:
        """sum over answers of p(answer) * of_answer[answer], with gradient through p."""
        return torch.stack([self.logprobs(a).sum().exp() * of_answer[a] for a in answers()]).sum()

    def weighted(self) -> list[tuple[Answer, float]]:
        """Each answer and its probability, without gradient."""
        return [(answer, self.logprobs(answer).sum().exp().item()) for answer in answers()]

    def gradient(self, total: Tensor) -> Tensor:
        return torch.autograd.grad(total, self.logits, retain_graph=True)[0]


def scores(seed: int) -> dict[Answer, Tensor]:
    """A score for each answer, without structure."""
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn = torch.randn(len(answers()), generator=generator, dtype=torch.float64)
    return dict(zip(answers(), drawn))
