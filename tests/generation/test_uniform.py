"""Random numbers that are a function of (seed, row, sample, position)."""

import statistics

import pytest

from internlm2.generation.uniform import philox, uniform


# Known answers that the authors of the generator publish (Random123, kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert philox(counter, key) == expected


def test_every_coordinate_counts():
    base = (3, 5, 7, 11)
    numbers = {uniform(*base)}
    for place in range(4):
        for value in (0, 1, 2, 1000):
            numbers.add(uniform(*base[:place], value, *base[place + 1 :]))
    numbers.add(uniform(3, 5 + (1 << 40), 7, 11))
    numbers.add(uniform(3 + (1 << 40), 5, 7, 11))
    assert len(numbers) == 19


def test_uniform_in_both_directions():
    for numbers in (
        [uniform(0, row, 0, 0) for row in range(4000)],
        [uniform(0, 0, 0, position) for position in range(4000)],
    ):
        assert all(0.0 <= number < 1.0 for number in numbers)
        assert abs(statistics.fmean(numbers) - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
        counts = [sum(int(number * 20) == cell for number in numbers) for cell in range(20)]
        assert sum((count - 200) ** 2 / 200 for count in counts) < 43.8  # chi-square, 19 degrees, 99.9 %
