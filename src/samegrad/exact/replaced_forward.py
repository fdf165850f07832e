"""Another ``forward`` on a module instance for a while: keys of state_dict, hooks and the class stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_NOT_THERE = object()


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls of ``module`` go to ``forward``, after and before its hooks as ever; undone on every way out."""
    attributes = vars(module)
    before = attributes.get("forward", _NOT_THERE)
    attributes["forward"] = forward
    try:
        yield
    finally:
        if before is _NOT_THERE:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = before


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody replaced ``forward`` on this instance: its class no longer says what it computes."""
    return "forward" in vars(module)
