"""Collectives inside the user's functions: seen before they run, so that looking never waits for another rank.

A function that runs once a chunk must not call one: ranks may have other chunk counts, and what it would reduce is a
chunk's value and not the batch's. A loss that runs once a step may.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from samegrad.exact.looking_on import LookingOn

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
# Functional collectives wait in an operation of their own, which is none itself.
_WAITS = ("wait_tensor", "_wrap_tensor_autograd")
# With which fully_shard gathers parameters in forward.
GATHER_INTO_TENSOR = "_allgather_base_"


class CollectiveSeen(Exception):
    """A collective was about to run; the text is its name. It did not run."""


class _Watch(LookingOn):
    def __init__(self, allowed: tuple[str, ...]) -> None:
        super().__init__()
        self._allowed = (*allowed, *_WAITS)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in _NAMESPACES:
            name = func._schema.name.partition("::")[2]
            if name not in self._allowed:
                raise CollectiveSeen(f"{func.namespace}::{name}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched(*allowed: str) -> Iterator[None]:
    """Raises CollectiveSeen in place of the first collective that the block calls. ``allowed``: names let through."""
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    with _Watch(allowed):
        yield
