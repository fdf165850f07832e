"""What torch offers, replaced for the time of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.random


@contextlib.contextmanager
def replaced(holder: Any, replacements: dict[str, Any]) -> Iterator[None]:
    """Attributes of ``holder`` replaced, and put back or taken away on every way out."""
    own = {name: vars(holder)[name] for name in replacements if name in vars(holder)}
    try:
        for name, value in replacements.items():
            setattr(holder, name, value)
        yield
    finally:
        for name in replacements:
            if name in own:
                setattr(holder, name, own[name])
            else:
                delattr(holder, name)


@contextlib.contextmanager
def generators_at_rest() -> Iterator[None]:
    """A block in which nobody sets a generator of torch's: states that code copies in a trace have no data.

    Nothing draws there, so there is nothing to be set. Checkpoints and ``fork_rng`` would do so.
    """
    at_rest = {"set_rng_state": lambda *_, **__: None}
    on_cuda = {**at_rest, "get_rng_state": lambda *_, **__: torch.get_rng_state()}
    with replaced(torch, at_rest), replaced(torch.random, at_rest), replaced(torch.cuda, on_cuda):
        yield
