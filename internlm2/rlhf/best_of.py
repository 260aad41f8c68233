"""Best of n: the policy that needs no training. Of n answers of a fixed policy it gives the one that a reward model
scores highest, and so shows what that reward model can do at a given KL (Stiennon et al. 2009.01325, Gao et al.
2210.10760).
"""

import math
from collections.abc import Sequence


def best_of_kl(n: int) -> float:
    """KL of best-of-n to the policy that it draws from, in nats an answer: log n - (n - 1) / n. Exact where no two
    answers score the same, an upper bound otherwise (Beirami et al. 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def expected_best_of(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """Expected value of the answer with the highest score among n of N answers to one prompt, drawn without
    replacement: the mean over all subsets, in closed form. Answers of equal score share their chance.

    Raises ValueError where n is not within 1..N or the two differ in length.
    """
    total = len(scores)
    if len(values) != total or not 1 <= n <= total:
        raise ValueError(f"best of {n} of {total} scores and {len(values)} values")
    expected, start = 0.0, 0
    order = sorted(range(total), key=lambda place: scores[place])
    while start < total:
        end = start
        while end < total and scores[order[end]] == scores[order[start]]:
            end += 1
        # The best is among these where all n are among the first `end`, but not all among the first `start`.
        chance = (math.comb(end, n) - math.comb(start, n)) / math.comb(total, n)
        expected += chance * sum(values[place] for place in order[start:end]) / (end - start)
        start = end
    return expected


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... up to `largest`."""
    return [1 << exponent for exponent in range(largest.bit_length())]
