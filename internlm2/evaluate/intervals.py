"""How sure is a mean? Bootstrap intervals, and the unbiased pass@k."""

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap(values: Sequence[float], seed: int, *, confidence: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of the mean over resamples of the items; None for fewer than two."""
    if len(values) < 2:
        return None
    numbers = np.asarray(values, dtype=np.float64)
    draw = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):  # one resample at a time: RESAMPLES x items would not fit for large sets
        means[number] = numbers[draw.integers(0, len(numbers), len(numbers))].mean()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, drawn without replacement, hold a correct one.

    The unbiased estimator of Chen et al. 2021. ValueError where k exceeds the samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples and 0 <= correct <= samples, got {samples}, {correct}.")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
