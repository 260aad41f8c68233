"""Where an epoch is cut into batches of a bounded size that do not end in a remainder.

Filling each batch in turn leaves the last one with what is left over, perhaps a single pair, whose gradient is noise at
the full learning rate. Here the last batches share what there is.
"""

import numpy as np

# The batches at the end that share: enough that each gives up little, and few enough to be settled at once.
SHARING = 64


def batch_bounds(sizes: np.ndarray, limit: int) -> np.ndarray:
    """Sizes [U] int64, each at most `limit`, U >= 1 -> bounds [N + 1] int64 from 0 to U of the batches, in order.

    All but the last SHARING batches hold what fits. In these the squared distances of the sizes from their mean are the
    least that contiguous batches within the limit can have.
    """
    filled = _fill(sizes, limit)
    kept, sharing = filled[:-SHARING], filled[-SHARING:]
    start = sharing[0]
    return np.array([*kept, *(start + _even(sizes[start:], limit, len(sharing))), len(sizes)])


def _fill(sizes: np.ndarray, limit: int) -> list[int]:
    """Where each batch begins if every one takes as much as fits."""
    starts, used = [0], 0
    for place, size in enumerate(sizes.tolist()):
        if used and used + size > limit:
            starts.append(place)
            used = 0
        used += size
    return starts


def _even(sizes: np.ndarray, limit: int, count: int) -> np.ndarray:
    """Where each batch begins if their sizes are as close to total / `count` as they can be."""
    sums = np.concatenate([[0], sizes.cumsum()])
    target = sums[-1] / count
    first = np.searchsorted(sums, sums - limit)  # the earliest beginning of a batch that ends at a place
    costs, begins = np.zeros(len(sums)), np.zeros(len(sums), np.int64)
    for end in range(1, len(sums)):
        options = costs[first[end] : end] + (sums[end] - sums[first[end] : end] - target) ** 2
        best = int(options.argmin())
        begins[end], costs[end] = first[end] + best, options[best]
    starts = [int(begins[-1])]
    while starts[-1]:
        starts.append(int(begins[starts[-1]]))
    return np.array(starts[::-1])
