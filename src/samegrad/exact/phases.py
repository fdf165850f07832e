"""Where in a step we are and which rows have arrived: the engine announces, whoever measures listens.

Announcing costs a write and a read of a context variable when nobody listens.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from samegrad.records import Phase


class Listener(Protocol):
    """Told of every phase a step enters, of every chunk that has arrived on the device, and of what only repeats."""

    def announce(self, phase: Phase) -> None: ...

    def arrived(self, chunk: Any) -> None: ...

    def repeating(self) -> AbstractContextManager[None]:
        """A chunk between the first and the last of its map, inside the block: it does what those do."""
        ...

    def stands_in(self, times: int) -> bool:
        """Whether what was ``repeating`` last is taken for so many more chunks of its size, which then do not run."""
        ...

    def running_again(self) -> AbstractContextManager[None]:
        """Blocks run again inside, and may end in the middle of a module: after it is again what was before."""
        ...


_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("samegrad_listener", default=None)
_phase: contextvars.ContextVar[Phase | None] = contextvars.ContextVar("samegrad_phase", default=None)


def announce(phase: Phase | None) -> None:
    """Tells who listens that the step enters ``phase``; None before the first one, and told to nobody."""
    _phase.set(phase)
    if phase is None:
        return
    listener = _listener.get()
    if listener is not None:
        listener.announce(phase)


def phase_now() -> Phase | None:
    """The phase that was announced last in this thread."""
    return _phase.get()


def arriving_chunks(chunks: Iterable[Any]) -> Iterator[Any]:
    """``chunks`` as they are, each announced when it arrives."""
    listener = _listener.get()
    if listener is None:
        yield from chunks
        return
    for chunk in chunks:
        listener.arrived(chunk)
        yield chunk


def each_part(sizes: Sequence[int], listener: Listener | None) -> Iterator[slice]:
    """Where each of ``sizes`` rows lie, one after the other; ``listener`` is told of those that only repeat."""
    index, start, last = 0, 0, len(sizes) - 1
    while index <= last:
        size = sizes[index]
        part = slice(start, start + size)
        index, start = index + 1, start + size
        if listener is None or not 0 < index - 1 < last:
            yield part
            continue
        with listener.repeating():
            yield part
        alike = sum(1 for _ in itertools.takewhile(functools.partial(operator.eq, size), sizes[index:last]))
        if alike and listener.stands_in(alike):
            index, start = index + alike, start + alike * size


def listener_now() -> Listener | None:
    """Who listens; for what may run in another thread later, where the variable is not set."""
    return _listener.get()


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tells ``listener`` what the engine does inside the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
