"""The words of keyed draws: the published generator, in the published order, and statistically what they should be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from samegrad.exact import elementary, philox
from samegrad.exact import keyed_ops as keyed_ops  # registers torch.ops.samegrad

ops = torch.ops.samegrad
KEY = 0x0123456789ABCDEF


def one(values: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    lanes = [np.array([value], np.uint64) for value in values]
    words = philox.philox((lanes[0], lanes[1], lanes[2], lanes[3]), key[1] << 32 | key[0])
    return [int(word[0]) for word in words]


# The known answers that come with the authors' own implementation (Random123, kat_vectors, philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_philox_is_the_published_generator(counter: tuple[int, ...], key: tuple[int, int], expected: list[int]) -> None:
    assert one(counter, key) == expected


def test_a_word_is_a_function_of_where_it_is_used() -> None:
    ids = np.array([5, 2**40 + 7, philox.WHOLE_BATCH], np.int64)
    words = philox.keyed_words(KEY, ids, stream=3, call=9, plane=2, elements=11)
    for row, sample in enumerate(ids.tolist()):
        for element in range(11):
            low, high = sample & 0xFFFFFFFF, (sample >> 32) & 0xFFFF
            counter = (element // 4, low, 9, 2 + 256 * 3 + 65536 * high)
            assert words[row, element] == one(counter, (KEY & 0xFFFFFFFF, KEY >> 32))[element % 4]


@pytest.mark.parametrize("rows, elements", [(1, 1), (3, 5), (700, 131), (2, 100_003)])
def test_tiles_do_not_show(rows: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(rows, dtype=np.int64)
    words = philox.keyed_words(KEY, ids, 0, 1, 0, elements)
    monkeypatch.setattr(philox, "_TILE_COUNTERS", 64)
    assert np.array_equal(words[-3:, -500:], philox.keyed_words(KEY, ids[-3:], 0, 1, 0, elements)[:, -500:])
    threshold = philox.keep_threshold(0.3)
    assert np.array_equal(philox.keyed_keep(KEY, ids, 0, 1, elements, threshold), words >= threshold)


def normalised(words: np.ndarray) -> np.ndarray:
    uniform = words.astype(np.float64).ravel() / 2**32
    return (uniform - 0.5) * math.sqrt(12)


def test_words_are_uniform_and_their_neighbours_independent() -> None:
    rows, elements = 512, 512
    ids = np.arange(rows, dtype=np.int64)
    words = philox.keyed_words(KEY, ids, 0, 0, 0, elements)
    count = words.size
    # Bytes, chi-square with 255 degrees of freedom: mean 255, standard deviation 22.6.
    counts = np.bincount(words.view(np.uint8).ravel(), minlength=256)
    assert abs(((counts - 4 * count / 256) ** 2 / (4 * count / 256)).sum() - 255) < 5 * math.sqrt(2 * 255)
    z = normalised(words)
    assert abs(z.mean()) < 5 / math.sqrt(count)
    assert abs((z**2).mean() - 1) < 5 / math.sqrt(count)
    others = {
        "row": philox.keyed_words(KEY, ids + 1, 0, 0, 0, elements),
        "call": philox.keyed_words(KEY, ids, 0, 1, 0, elements),
        "stream": philox.keyed_words(KEY, ids, 1, 0, 0, elements),
        "plane": philox.keyed_words(KEY, ids, 0, 0, 1, elements),
        "key": philox.keyed_words(KEY + 1, ids, 0, 0, 0, elements),
        "element": np.roll(words, 1, axis=1),
    }
    for name, other in others.items():
        assert abs((z * normalised(other)).mean()) < 5 / math.sqrt(count), name
    # The twin with the fault: rows that share an id.
    shared = philox.keyed_words(KEY, ids // 2, 0, 0, 0, elements)
    assert abs((normalised(shared)[:-elements] * normalised(shared)[elements:]).mean()) > 0.1


MOMENTS = {
    # distribution: mean and variance of its standard form
    "uniform": (0.5, 1 / 12),
    "normal": (0.0, 1.0),
    "exponential": (1.0, 1.0),
    "log_normal": (math.exp(0.5), (math.e - 1) * math.e),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_numbers_have_the_moments_of_their_distribution(name: str) -> None:
    ids, count = torch.arange(400), 400 * 500
    numbers = ops.keyed_numbers(torch.tensor(KEY), ids, 0, 0, 1, 500, name, 1.0, 0.0, torch.float64)
    mean, variance = MOMENTS[name]
    fourth = (numbers - mean).pow(4).mean()
    assert abs(float(numbers.mean()) - mean) < 5 * math.sqrt(variance / count)
    assert abs(float(numbers.var()) - variance) < 5 * math.sqrt(float(fourth) / count)
    if name == "normal":
        inside = float((numbers.abs() < 1.959964).double().mean())
        assert abs(inside - 0.95) < 5 * math.sqrt(0.95 * 0.05 / count)


def test_half_of_cauchys_numbers_are_within_one() -> None:
    numbers = ops.keyed_numbers(torch.tensor(KEY), torch.arange(400), 0, 0, 1, 500, "cauchy", 1.0, 0.0, torch.float64)
    assert abs(float((numbers.abs() < 1).double().mean()) - 0.5) < 5 * math.sqrt(0.25 / numbers.numel())


def test_elementary_functions_are_good_to_a_few_units() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(100_000, generator=generator, dtype=torch.float64).clamp_min(2.0**-53)
    eps = torch.finfo(torch.float64).eps
    for values in (u, u * 1e-15, u * 50):
        assert torch.equal(elementary.log(values), torch.from_numpy(elementary.log(values.numpy())))
        torch.testing.assert_close(elementary.log(values), values.log(), rtol=4 * eps, atol=4 * eps)
    x = (u - 0.5) * 200
    assert torch.equal(elementary.exp(x), torch.from_numpy(elementary.exp(x.numpy())))
    for mine, numpys in zip(elementary.sine_and_cosine(u), elementary.sine_and_cosine(u.numpy())):
        assert torch.equal(mine, torch.from_numpy(numpys))
    torch.testing.assert_close(elementary.exp(x), x.exp(), rtol=4 * eps, atol=0)
    sine, cosine = elementary.sine_and_cosine(u)
    torch.testing.assert_close(sine, (2 * math.pi * u).sin(), rtol=0, atol=8 * eps)
    torch.testing.assert_close(cosine, (2 * math.pi * u).cos(), rtol=0, atol=8 * eps)
    corners = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    sine, cosine = elementary.sine_and_cosine(corners)
    torch.testing.assert_close(sine, torch.tensor([0.0, 1, 0, -1, 0], dtype=torch.float64), rtol=0, atol=eps)
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0, -1, 0, 1], dtype=torch.float64), rtol=0, atol=eps)


def test_operations_are_what_torch_asks_of_them() -> None:
    where = torch.tensor(KEY), torch.arange(3), 0, 0, 2, 5
    values = torch.randn(2, 3, 5, requires_grad=True)
    calls = [
        (ops.keyed_words.default, (*where, 0)),
        (ops.keyed_keep.default, (*where, 0.3)),
        (ops.keyed_dropout.default, (values, *where, 0.3)),
        (ops.keyed_numbers.default, (*where, "normal", 1.0, 0.0, torch.float32)),
    ]
    for operation, arguments in calls:
        torch.library.opcheck(operation, arguments)
