"""Sequences in passes of about equal size."""

from collections.abc import Sequence


def batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Indices of sequences in groups of at most `most_tokens` tokens (a longer one stands alone), alike lengths
    together.
    """
    groups: list[list[int]] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or total + lengths[index] > most_tokens:
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += lengths[index]
    return groups
