"""Where in a step we are: the engine announces each phase, whoever measures listens.

Announcing costs one context-variable read when nobody listens.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from samegrad.records import Phase

_listener: contextvars.ContextVar[Callable[[Phase], None] | None] = contextvars.ContextVar(
    "samegrad_phase_listener", default=None
)


def announce(phase: Phase) -> None:
    listener = _listener.get()
    if listener is not None:
        listener(phase)


@contextlib.contextmanager
def listening(listener: Callable[[Phase], None]) -> Iterator[None]:
    """Calls ``listener(phase)`` at each phase inside the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
