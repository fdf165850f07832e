"""The random words of a keyed draw: Philox 4x32-10, a function of where a word is used and of nothing else.

Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", SC11. Whole numbers only, so
that every device gives the same bits. The specification, which ``philox_triton`` follows as well:

key      the step's int64 key: low 32 bits, high 32 bits
counter  (element // 4, low 32 bits of the sample id, call, plane + 256 * stream + 65536 * bits 32 to 47 of the id)
word     number ``element % 4`` of the four that come out

A sample is a row of the batch, an element a position in that row's part of the draw, counted in row-major order. A
plane holds one word for each element; a draw that needs more bits takes more planes. Here numpy computes them, a tile
that stays in the cache at a time: about as fast as torch's own generator on one core.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD_BITS = 32
LARGEST_STREAM = 255
# Sample ids keep 48 bits. All ones is not a row: what is drawn for the batch as a whole is keyed by it.
WHOLE_BATCH = -1

Words = npt.NDArray[np.uint32]
_Lanes = npt.NDArray[np.uint64]

_FACTORS = tuple(np.uint64(multiplier) for multiplier in MULTIPLIERS)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(WORD_BITS)
# Counters worked on at a time: their lanes of 8 bytes, about eight of them, stay in a core's cache.
_TILE_COUNTERS = 8192


@dataclasses.dataclass(frozen=True)
class Tile:
    """``words`` (rows, elements) uint32 of a stretch of rows and elements. Reused by the next tile: copy to keep."""

    rows: slice
    elements: slice
    words: Words


def philox(counter: tuple[_Lanes, _Lanes, _Lanes, _Lanes], key: int) -> tuple[_Lanes, _Lanes, _Lanes, _Lanes]:
    """The four words of each counter; lanes are uint64 below 2**32 and broadcast against each other."""
    c0, c1, c2, c3 = counter
    first, second = _FACTORS
    for k0, k1 in _round_keys(key):
        # Products of 32 by 32 bits; lanes grow to the full shape in the third round only.
        p0, p1 = c0 * first, c2 * second
        c0, c1 = (p1 >> _SHIFT) ^ (c1 ^ k0), p1 & _LOW
        c2, c3 = (p0 >> _SHIFT) ^ (c3 ^ k1), p0 & _LOW
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=16)
def _round_keys(key: int) -> tuple[tuple[np.uint64, np.uint64], ...]:
    """The two halves of the key in each round. Kept, since one key makes all draws of a step."""
    low, high = key & 0xFFFFFFFF, key >> WORD_BITS
    return tuple(
        (np.uint64((low + turn * KEY_STEPS[0]) & 0xFFFFFFFF), np.uint64((high + turn * KEY_STEPS[1]) & 0xFFFFFFFF))
        for turn in range(ROUNDS)
    )


def tiles(
    key: int, ids: npt.NDArray[np.int64], stream: int, call: int, plane: int, elements: int
) -> Iterator[Tile]:
    """All words of samples ``ids`` (n,) int64 with ``elements`` words each, a tile at a time."""
    counters = -(-elements // 4)
    width = max(1, min(counters, _TILE_COUNTERS))
    height = max(1, _TILE_COUNTERS // width)
    unsigned = ids.view(np.uint64)
    low, high = unsigned & _LOW, (unsigned >> _SHIFT) & np.uint64(0xFFFF)
    calls = np.full((1, 1), call, np.uint64)
    place = np.uint64(plane + 256 * stream)
    for start in range(0, len(ids), height):
        rows = slice(start, min(start + height, len(ids)))
        ends = (high[rows, None] << np.uint64(16)) | place
        for first in range(0, counters, width):
            blocks = np.arange(first, min(first + width, counters), dtype=np.uint64)[None]
            words = np.empty((rows.stop - rows.start, blocks.size, 4), np.uint32)
            for number, lanes in enumerate(philox((blocks, low[rows, None], calls, ends), key)):
                words[:, :, number] = lanes
            stretch = slice(4 * first, min(4 * (first + blocks.size), elements))
            yield Tile(rows, stretch, words.reshape(len(words), -1)[:, : stretch.stop - stretch.start])


def keyed_words(key: int, ids: npt.NDArray[np.int64], stream: int, call: int, plane: int, elements: int) -> Words:
    """The words (n, elements) uint32 of samples ``ids``."""
    words = np.empty((len(ids), elements), np.uint32)
    for tile in tiles(key, ids, stream, call, plane, elements):
        words[tile.rows, tile.elements] = tile.words
    return words


def keep_threshold(drop_probability: float) -> int:
    """A word at or above it keeps: a share of ``drop_probability`` of all words, to 2**-32, is below."""
    return min(round(drop_probability * float(2**WORD_BITS)), 0xFFFFFFFF)


def keyed_keep(
    key: int, ids: npt.NDArray[np.int64], stream: int, call: int, elements: int, threshold: int
) -> npt.NDArray[np.bool_]:
    """Where words reach ``threshold``, (n, elements) bool, without the words themselves ever being all there."""
    keep = np.empty((len(ids), elements), np.bool_)
    for tile in tiles(key, ids, stream, call, 0, elements):
        np.greater_equal(tile.words, np.uint32(threshold), out=keep[tile.rows, tile.elements])
    return keep
