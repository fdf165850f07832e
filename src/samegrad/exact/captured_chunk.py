"""One captured chunk: the places that it reads, and what it was captured for.

``capture_stream`` is where chunks are captured, ``place_of`` the line of the user's that an error came from.
"""

from __future__ import annotations

import enum
import functools
import traceback
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from samegrad.errors import CannotSplit

ASKED = "capture a chunk as a graph of CUDA kernels"
_PLAIN = (int, float, str, bool, bytes, type(None), enum.Enum, torch.Size, torch.dtype, torch.device)


def capture_stream(device: torch.device) -> Any:
    """The one on which chunks are captured: libraries keep a workspace for every stream that they ran on.

    They take it here, so that it does not lie in a large segment, which could not be given back then.
    """
    stream = _one_stream(device)
    with torch.cuda.stream(stream), torch.enable_grad():
        ones = torch.ones(8, 8, device=device, requires_grad=True)
        torch.autograd.grad((ones @ ones).sum(), ones)
    return stream


@functools.cache
def _one_stream(device: torch.device) -> Any:
    # torch has no types here.
    return cast(Any, torch.cuda).Stream(device)


class CapturedChunk:
    """A captured chunk and the places that it reads."""

    def __init__(self, graph: torch.cuda.CUDAGraph, places: list[Any]) -> None:
        self._graph = graph
        self._places = places

    def replay(self, leaves: Sequence[Any]) -> None:
        for place, leaf in zip(self._places, leaves):
            if isinstance(place, Tensor):
                place.copy_(leaf)
        self._graph.replay()


def shape_of(leaf: Any) -> Hashable:
    """What a graph was captured for. Raises CannotSplit for what a replay would not read again."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    if isinstance(leaf, _PLAIN):
        return type(leaf), leaf
    raise CannotSplit(
        asked=ASKED,
        found=f"the batch holds a {type(leaf).__name__}, and whether it says the same in the next step cannot be seen",
        do="make it a tensor or a plain value, or leave the lever graphs out of the plan",
    )


def is_alone(tensor: Tensor) -> bool:
    """Whether no other tensor shares the memory of ``tensor``."""
    # The tensor, and the name that is asked here.
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= 2


def place_of(error: BaseException) -> str:
    """File and line of the innermost code that is no library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/samegrad/exact/" not in f.filename]
    place = (own or frames)[-1]
    return f"{place.filename}:{place.lineno}"
