"""Cases of a test along several axes: some at every commit, all of them where there is time (``-m slow``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def crossed(*axes: Iterable[Any], every: int = 2, where: Callable[..., bool] = lambda *_: True) -> list[Any]:
    """All combinations, of which those whose places along the axes add up to a multiple of ``every`` are not slow.

    So each value of an axis meets every ``every``-th value of another at every commit, and none is left out.
    ``where``: which combinations there are.
    """
    places = itertools.product(*(list(enumerate(axis)) for axis in axes))
    return [
        pytest.param(
            *(value for _, value in case),
            marks=[pytest.mark.slow] * (sum(place for place, _ in case) % every != 0),
            id="-".join(_named(value) for _, value in case),
        )
        for case in places
        if where(*(value for _, value in case))
    ]


def _named(value: Any) -> str:
    return value.__name__ if callable(value) else str(value)
