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
    """The same held-out pairs at every validation: up to `settings.validation_pairs` of each domain."""

    def __init__(self, stream: PreferenceStream, settings: RewardConfig, micro_batch: int) -> None:
        self.stream, self.settings, self.micro_batch = stream, settings, micro_batch
        self.table = stream.pairs.held_out
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
        text = self.stream.pairs.digest
        sides = [(text(int(self.table.chosen[pair])), text(int(self.table.rejected[pair]))) for pair in pairs]
        domains = [self.stream.pairs.domains[int(self.table.domains[pair])] for pair in pairs]
        return blind_accuracy([frozenset(side) for side in sides], [chosen for chosen, _ in sides], domains)

    def scores(self, engine: Engine, pairs: Sequence[int] | np.ndarray, domain: str | None = None) -> Scores:
        """Scores of some pairs under their own condition, or under that of `domain`; the same on every rank."""
        found = {int(pair): (0.0, 0.0) for pair in pairs}

        def judge(model: torch.nn.Module, batch: PairBatch) -> LossSum:
            scores = sequence_scores(model, batch)
            sides = zip(batch.pairs, scores[batch.chosen].tolist(), scores[batch.rejected].tolist())
            found.update({pair: (chosen, rejected) for pair, chosen, rejected in sides})
            return LossSum(scores.sum(), batch.loss_tokens)

        units = [[int(pair)] for pair in pairs]
        batches = self.stream.divide(self.table, units, self.micro_batch, engine.data_rank, engine.data_ranks, domain)
        engine.evaluate(batches, judge)
        # Each pair was judged on one rank; the others hold zeros.
        sums = engine.sum_over_data([score for pair in pairs for score in found[int(pair)]])
        both = np.array(sums, np.float64).reshape(-1, 2)
        return both[:, 0], both[:, 1]

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
