"""Random numbers without state: the number for (seed, row, sample, position) can be had at any time, in any order.

So what a row draws cannot depend on its neighbours, on the size of the batch or on when the row was admitted, and a
resumed run needs no generator state. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011), which is also what torch uses on GPUs.
"""

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words for a counter of four and a key of two 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        a, b = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK, (a >> 32) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def uniform(seed: int, row: int, sample: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2 ** -53. seed and row are 64-bit, sample and position 32-bit."""
    high, low, _, _ = philox((position, sample, row & MASK, row >> 32), (seed & MASK, seed >> 32))
    return ((high >> 5) * 67108864 + (low >> 6)) * 2.0**-53
