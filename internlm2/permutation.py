"""Keyed random numbers and permutations that are pure functions: no state, no tables, the same on every machine."""

import hashlib

import numpy as np

_MASK = (1 << 64) - 1


def derive_key(*parts: object) -> int:
    """64-bit key from a seed and names, for instance `derive_key(seed, "rows", source, epoch)`."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(value: int) -> int:
    """SplitMix64 finaliser (Steele, Lea, Flood 2014): 64 bits to 64 well-stirred bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permute(index: int, size: int, key: int) -> int:
    """Where `index` goes under a random permutation of range(size): a Feistel network, walked until it falls inside the
    range.

    O(1): the network permutes the next power of two, so that fewer than two rounds of it are expected.
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} outside of {size}")
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        high, low = index >> low_bits, index & low_mask
        for step in range(4):
            high ^= mix(key + 2 * step + (low << 8) & _MASK) & high_mask
            low ^= mix(key + 2 * step + 1 + (high << 8) & _MASK) & low_mask
        index = high << low_bits | low
        if index < size:
            return index


def shuffled(count: int, key: int) -> np.ndarray:
    """[count] int64: range(count) in a random order."""
    with np.errstate(over="ignore"):
        value = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value ^= value >> np.uint64(31)
    return np.argsort(value, kind="stable")
