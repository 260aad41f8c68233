"""The loss of the reward model over a batch of pairs, for an engine: ranking part, barrier, and what is logged."""

from typing import Any

import torch

from internlm2.config import RewardConfig
from internlm2.data.pair_batch import PairBatch
from internlm2.engine.base import LossFunction, LossSum, StepResult
from internlm2.model.scalar import last_positions
from internlm2.rlhf.ranking import focal_ranking_losses, pair_barriers, ranking_losses


def sequence_scores(model: torch.nn.Module, batch: PairBatch) -> torch.Tensor:
    """The score of each sequence, [m] float32: the value at its reward token, which is its last."""
    return model(batch.ids, batch.cu_seqlens, batch.max_seqlen, last_positions(batch.cu_seqlens))


def reward_loss(settings: RewardConfig) -> LossFunction:
    """Sum over pairs of the ranking loss and `barrier.coefficient` times the barrier."""
    barrier = settings.barrier

    def loss(model: torch.nn.Module, batch: PairBatch) -> LossSum:
        scores = sequence_scores(model, batch)
        chosen, rejected = scores[batch.chosen], scores[batch.rejected]
        margin = settings.margin * batch.gaps
        if settings.loss == "focal":
            ranking = focal_ranking_losses(
                chosen, rejected, gamma=settings.focal_gamma, detach=settings.focal_detach, margin=margin
            ).sum()
        else:
            ranking = ranking_losses(chosen, rejected, margin=margin).sum()
        penalty = pair_barriers(chosen, rejected, bound=barrier.bound, eps=barrier.eps).sum()
        with torch.no_grad():
            right = (chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()
            parts = {
                "ranking": ranking.detach(),
                "barrier": penalty.detach(),
                "right": right,
                "margin": (chosen - rejected).sum(),
                "score": ((chosen + rejected) / 2).sum(),
            }
        return LossSum(ranking + barrier.coefficient * penalty, batch.loss_tokens, parts)

    return loss


def describe_result(result: StepResult) -> dict[str, Any]:
    """What a step records: means over its pairs. `loss` = `ranking_loss` + reward.barrier.coefficient * `barrier`."""
    pairs = result.loss_tokens
    names = {"ranking": "ranking_loss", "right": "accuracy", "score": "score_mean"}
    return {"pairs": pairs, **{names.get(key, key): value / pairs for key, value in result.parts.items()}}
