"""What torch's reduction kernel takes for a sum over many rows and gives back: partial sums of all blocks of threads.

A bias's gradient is such a sum; of 8192 rows by 4096 columns it takes 132 MiB on a card of 132 multiprocessors.
Source: ``setReduceConfig`` of aten/src/ATen/native/cuda/Reduce.cuh, the same in torch 2.11 to 2.13.
"""

from __future__ import annotations

from samegrad.measure.library_calibration import LibraryCalibration

_MOST_THREADS, _WARP = 512, 32
_FEWEST_VALUES, _MOST_VALUES = 16, 256
_VECTOR = 4
# Sums of 16-bit numbers are kept in float32.
_PARTIAL_BYTES = 4


def rows_sum_bytes(rows: int, columns: int, card: LibraryCalibration) -> int:
    """The scratch of summing (``rows``, ``columns``), columns innermost, over rows; 0 where blocks need not meet."""
    vector = next(size for size in (_VECTOR, 2, 1) if columns % size == 0)
    most_threads = _MOST_THREADS // vector
    across, down = (min(_power_of_two(size), most_threads) for size in (columns // vector, rows))
    width = min(across, _WARP)
    height = min(down, most_threads // width)
    width = min(across, most_threads // height)
    if rows < min(height * _FEWEST_VALUES, _MOST_VALUES):
        # Each thread sums all of its column.
        return 0
    values = -(-rows // height)
    grid = -(-(columns // vector) // width)
    wanted_blocks = card.multiprocessors * (card.threads_per_multiprocessor // (width * height))
    if values < _MOST_VALUES or grid > wanted_blocks:
        return 0
    blocks = max(min(-(-wanted_blocks // grid), -(-values // _FEWEST_VALUES)), -(-values // _MOST_VALUES))
    return _PARTIAL_BYTES * columns * blocks * width * vector if blocks > 1 else 0


def _power_of_two(size: int) -> int:
    """The largest power of two that is not larger, at least 1."""
    return 1 << max(0, size.bit_length() - 1)
