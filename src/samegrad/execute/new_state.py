"""Room for the state that an optimizer's first turn makes: memory of its own, not gaps of what the step gave back.

It stays as long as the training. Between the pieces of what every step takes anew it would part what is free, and
within a budget the largest of those pieces then has no place, though there are bytes enough.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from samegrad.declared import DeclaredStep


@contextlib.contextmanager
def room_for_new_state(declared: DeclaredStep) -> Iterator[None]:
    """A block in which the first turn of an optimizer without state begins with nothing in the allocator's cache.

    Nothing is done on devices other than CUDA, and where there is state already.
    """
    optimizer = declared.optimizer
    if optimizer is None or declared.device.type != "cuda" or any(optimizer.state.values()):
        yield
        return

    turns = itertools.count()

    def before_each_turn(*_: Any) -> None:
        # It stays until the block ends: while hooks run torch lets none be removed.
        if not next(turns):
            torch.cuda.empty_cache()

    hook = optimizer.register_step_pre_hook(before_each_turn)
    try:
        yield
    finally:
        hook.remove()
