"""What the scores of held-out pairs say about a reward model. Plain numbers in, plain numbers out."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_BINS = 10


def accuracy(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Share of the pairs whose chosen answer scores higher; a tie counts half, as a coin would decide it."""
    difference = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean()) if difference.size else math.nan


def calibration_error(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Expected calibration error (Guo et al. 2017): how far the share of right verdicts lies from the probability that
    the Bradley-Terry model gives to them, sigmoid(|difference|), in ten equal bins from 0.5 to 1; mean over the pairs.
    """
    difference = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(difference)))
    right = (difference > 0) + 0.5 * (difference == 0)
    bins = np.minimum(((confidence - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    error = sum(abs(float((right - confidence)[bins == number].sum())) for number in range(_BINS))
    return error / difference.size if difference.size else math.nan


def length_correlation(difference: ArrayLike, length_difference: ArrayLike) -> float:
    """Correlation, over pairs, of the difference in score with the difference in length (tokens).

    Which side of a pair comes first means nothing, so that neither mean is taken off: pairs in both orders have the
    means 0. nan where all differences of either kind are 0.
    """
    x, y = np.asarray(difference, np.float64), np.asarray(length_difference, np.float64)
    scale = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / scale if scale else math.nan


def pair_metrics(
    chosen: Sequence[float], rejected: Sequence[float], chosen_lengths: Sequence[int], rejected_lengths: Sequence[int]
) -> dict[str, Any]:
    """Of n pairs: accuracy, mean margin (chosen minus rejected), mean and standard deviation of all scores,
    calibration, and how both the scores and the labels go with the answer's length.
    """
    good, bad = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    longer = np.asarray(chosen_lengths, np.float64) - np.asarray(rejected_lengths, np.float64)
    both = np.concatenate([good, bad])
    return {
        "pairs": len(good),
        "accuracy": accuracy(good, bad),
        "margin": float((good - bad).mean()),
        "score_mean": float(both.mean()),
        "score_std": float(both.std()),
        "calibration_error": calibration_error(good, bad),
        "length_correlation": length_correlation(good - bad, longer),
        "label_length_correlation": length_correlation(np.ones_like(longer), longer),
    }


def student_interval(deviation: float, count: int) -> float:
    """Half the width of the 95% confidence interval of a mean of `count` values with this standard deviation
    (Student's t).
    """
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of 1 to 9 degrees of freedom
    return (quantiles[count - 2] if count - 2 < len(quantiles) else 1.96) * deviation / math.sqrt(count)


def blind_accuracy(
    answers: Sequence[frozenset[bytes]], chosen: Sequence[bytes], domains: Sequence[str]
) -> dict[str, float]:
    """What the best reader that cannot see the domain reaches on n pairs: by domain, and under `all` over all of them.

    `answers[i]`: the two answers of pair i, in no order; `chosen[i]`: the preferred one. Such a reader has one verdict
    for two answers: the one that is right in most of their domains. Where it is right in half of them, each verdict is
    right half the time. Nothing that gives one verdict to equal answers can do better over all pairs.
    """
    votes: dict[frozenset[bytes], Counter[bytes]] = {}
    for pair, preferred in zip(answers, chosen):
        votes.setdefault(pair, Counter())[preferred] += 1
    right: dict[str, list[float]] = {}
    for pair, preferred, domain in zip(answers, chosen, domains):
        most = max(votes[pair].values())
        winners = [answer for answer, count in votes[pair].items() if count == most]
        right.setdefault(domain, []).append((preferred in winners) / len(winners))
    every = [hit for hits in right.values() for hit in hits]
    return {domain: sum(hits) / len(hits) for domain, hits in right.items()} | {"all": sum(every) / len(every)}


def interval(share: float, count: int) -> tuple[float, float]:
    """95% confidence interval of a share of `count` independent cases (Wilson 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half
