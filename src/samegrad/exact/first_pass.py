"""The first of two passes: rows computed once, with the kernels of the second pass, and nothing kept.

Whatever makes a kernel choose by whether there is a graph is switched off for it.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from typing import Any

import torch

from samegrad import trees


class FirstPass(enum.Enum):
    """How rows are computed the first time: some kernels (recurrent ones on the CPU) exist without a graph only."""

    WITHOUT_GRAPH = "without graph"
    WITH_GRAPH = "with graph"


@contextlib.contextmanager
def as_in_first_pass(device_type: str, first_pass: FirstPass) -> Iterator[None]:
    """Both passes must take the same kernels, and the first is to keep nothing.

    The transformer fast path exists only without a graph, and casts cached without one would cut the weights off from
    the second pass.
    """
    with (
        torch.set_grad_enabled(first_pass is FirstPass.WITH_GRAPH),
        _attention_fastpath_off(),
        _autocast_uncached(device_type),
    ):
        yield


@contextlib.contextmanager
def _attention_fastpath_off() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _autocast_uncached(device_type: str) -> Iterator[None]:
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
        yield


def lasting(chunk: Any) -> Any:
    """``chunk`` in memory of its own where the next one would be read into its place."""
    return trees.map_tensors(chunk, lambda leaf: leaf.clone() if leaf.device.type == "cuda" else leaf)
