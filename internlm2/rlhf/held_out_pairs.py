"""A reward model's verdicts on held-out pairs: by domain, and under the conditions of the other domains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from internlm2.config import RewardConfig
from internlm2.data.pair_batch import PairBatch
from internlm2.data.preference_stream import PreferenceStream
from internlm2.engine.base import Engine, LossSum
from internlm2.permutation import derive_key, shuffled
from internlm2.rlhf.ranking import focal_ranking_losses, ranking_losses
from internlm2.rlhf.reward_loss import sequence_scores
from internlm2.rlhf.reward_metrics import accuracy, blind_accuracy, pair_metrics

Scores = tuple[np.ndarray, np.ndarray]  # of the chosen and of the rejected answers, [n] each
Key = tuple[tuple[int, ...], bytes]  # tokens of a condition, hash of a conversation


@dataclass(frozen=True)
class Verdicts:
    """domains  by domain, under its own condition: `loss` (the ranking part, mean over pairs) and `pair_metrics`
    swap     accuracy by domain of the labels and, inside that, by the domain that the model was told
    scores   by domain, under its own condition
    """

    domains: dict[str, dict[str, Any]]
    swap: dict[str, dict[str, float]]
    scores: dict[str, Scores]

    def statistics(self) -> dict[str, Any]:
        """Mean and standard deviation of all scores: what PPO may normalise rewards with."""
        together = np.concatenate([np.concatenate(scores) for scores in self.scores.values()])
        return {"mean": float(together.mean()), "std": float(together.std()), "scores": len(together)}


class HeldOutPairs:
    """The same held-out pairs at every validation: up to `settings.validation_pairs` of each domain.

    What a model gives to an answer under a condition is computed once a step, however many pairs, domains or
    validations ask for it.
    """

    def __init__(self, stream: PreferenceStream, settings: RewardConfig, micro_batch: int) -> None:
        self.stream, self.settings, self.micro_batch = stream, settings, micro_batch
        self.table = stream.pairs.held_out
        self._texts = {int(number): stream.pairs.digest(int(number)) for number in np.unique(self._both(slice(None)))}
        self._scored: tuple[Engine | None, int, dict[Key, float]] = (None, -1, {})  # engine, its step, scores
        self.chosen: dict[str, np.ndarray] = {}  # domain -> numbers of its pairs
        for number, domain in enumerate(stream.pairs.domains):
            pairs = np.flatnonzero(self.table.domains == number)
            if len(pairs):
                order = shuffled(len(pairs), derive_key("held-out pairs", domain))
                self.chosen[domain] = np.sort(pairs[order[: settings.validation_pairs]])

    def judge(self, engine: Engine, *, wrong_conditions: bool = False) -> "Verdicts":
        """Judge every pair under its own condition and, if asked, under those of the other domains."""
        own = {domain: self.scores(engine, pairs) for domain, pairs in self.chosen.items()}
        domains = {
            domain: {"loss": self._loss(*scores, self.chosen[domain]), **self._metrics(self.chosen[domain], *scores)}
            for domain, scores in own.items()
        }
        swap: dict[str, dict[str, float]] = {}
        if wrong_conditions:
            known = [domain for domain in own if domain in self.stream.pairs.sequences.conditions]
            for domain, pairs in self.chosen.items():
                told = {other: self.scores(engine, pairs, other) for other in known if other != domain}
                swap[domain] = {other: accuracy(*told.get(other, own[domain])) for other in known}
        return Verdicts(domains, swap, own)

    def blind_bound(self) -> dict[str, float]:
        """Accuracy of the best reader that cannot see the domain, on the same pairs (`blind_accuracy`)."""
        pairs = np.concatenate(list(self.chosen.values()))
        sides = [tuple(self._texts[number] for number in self._both(int(pair)).tolist()) for pair in pairs]
        domains = [self.stream.pairs.domains[int(self.table.domains[pair])] for pair in pairs]
        return blind_accuracy([frozenset(side) for side in sides], [chosen for chosen, _ in sides], domains)

    def scores(self, engine: Engine, pairs: Sequence[int] | np.ndarray, domain: str | None = None) -> Scores:
        """Scores of some pairs under their own condition, or under that of `domain`; the same on every rank."""
        known = self._known(engine)
        wanted = [self._keys(int(pair), domain) for pair in pairs]
        asked = set(known)
        missing = []  # pairs that hold every unknown answer at least once
        for pair, keys in zip(pairs, wanted):
            if not asked.issuperset(keys):
                asked.update(keys)
                missing.append(int(pair))
        for pair, found in self._judged(engine, missing, domain).items():
            known.update(zip(self._keys(pair, domain), found))
        both = np.array([[known[key] for key in keys] for keys in wanted], np.float64).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def _judged(self, engine: Engine, pairs: Sequence[int], domain: str | None) -> dict[int, tuple[float, float]]:
        """Scores of the chosen and the rejected answer of each pair, by forward passes."""
        found = dict.fromkeys(pairs, (0.0, 0.0))

        def judge(model: torch.nn.Module, batch: PairBatch) -> LossSum:
            scores = sequence_scores(model, batch)
            sides = zip(batch.pairs, scores[batch.chosen].tolist(), scores[batch.rejected].tolist())
            found.update({pair: (chosen, rejected) for pair, chosen, rejected in sides})
            return LossSum(scores.sum(), batch.loss_tokens)

        units = [[pair] for pair in pairs]
        if not units:
            return {}
        batches = self.stream.divide(self.table, units, self.micro_batch, engine.data_rank, engine.data_ranks, domain)
        engine.evaluate(batches, judge)
        # Each pair was judged on one rank; the others hold zeros.
        sums = engine.sum_over_data([score for pair in pairs for score in found[pair]])
        return dict(zip(pairs, zip(sums[::2], sums[1::2])))

    def _known(self, engine: Engine) -> dict[Key, float]:
        """Scores that the weights of this step have given so far."""
        if self._scored[:2] != (engine, engine.step):
            self._scored = (engine, engine.step, {})
        return self._scored[2]

    def _keys(self, pair: int, domain: str | None) -> tuple[Key, Key]:
        """What the scores of a pair depend on: the condition and the text of the chosen and of the rejected answer."""
        told = self.stream.pairs.domains[int(self.table.domains[pair])] if domain is None else domain
        condition = tuple(self.stream.pairs.sequences.conditions.get(told, ()))
        chosen, rejected = self._both(pair).tolist()
        return (condition, self._texts[chosen]), (condition, self._texts[rejected])

    def _both(self, pairs: slice | int) -> np.ndarray:
        """Sequences of the chosen and of the rejected answers, [2] or [2, n]."""
        return np.stack([self.table.chosen[pairs], self.table.rejected[pairs]])

    def _metrics(self, pairs: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
        lengths = [
            [self.stream.pairs.answer_length(int(side[pair])) for pair in pairs]
            for side in (self.table.chosen, self.table.rejected)
        ]
        return pair_metrics(chosen.tolist(), rejected.tolist(), *lengths)

    def _loss(self, chosen: np.ndarray, rejected: np.ndarray, pairs: np.ndarray) -> float:
        settings, margin = self.settings, torch.from_numpy(self.settings.margin * self.table.gaps[pairs])
        sides = torch.from_numpy(chosen), torch.from_numpy(rejected)
        if settings.loss == "focal":
            return float(focal_ranking_losses(*sides, gamma=settings.focal_gamma, margin=margin).mean())
        return float(ranking_losses(*sides, margin=margin).mean())
