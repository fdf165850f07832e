"""Whole numbers on a line through two others, such as bytes at a number of rows from those at two."""

from __future__ import annotations


def value_at(rows: int, low: tuple[int, int], high: tuple[int, int]) -> int:
    """The value at ``rows`` on the line through two points (rows, value), rounded up; exact where it is whole."""
    (low_rows, low_value), (high_rows, high_value) = sorted([low, high])
    return low_value - (low_value - high_value) * (rows - low_rows) // (high_rows - low_rows)
