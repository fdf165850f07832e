"""Children that end while a step is examined or runs are heard of afterwards.

torch raises the death of a data worker out of a signal handler, in whatever code runs just then. Inside an examination
that would be taken for what the step does on a few rows, and another plan would come of it; inside the optimizer's turn
it would leave some weights moved and others not.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class Later:
    """What was heard of children since; ``handler`` is who wanted to be told, None where nobody does."""

    def __init__(self, handler: Handler | None) -> None:
        self._handler, self._heard = handler, False

    def hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True

    def tell(self) -> None:
        """Calls the handler where there was something to hear; it may raise."""
        if self._handler is not None and self._heard:
            self._heard = False
            self._handler(signal.SIGCHLD, None)

    @contextlib.contextmanager
    def now(self) -> Iterator[None]:
        """A block inside ``children_heard_later`` in which the handler is called at once, also for what was heard."""
        if self._handler is None:
            yield
            return
        signal.signal(signal.SIGCHLD, self._handler)
        try:
            self.tell()
            yield
        finally:
            signal.signal(signal.SIGCHLD, self.hear)


@contextlib.contextmanager
def children_heard_later() -> Iterator[Later]:
    """A block inside which the handler of SIGCHLD waits; it is called once at the end, where the block came to it.

    Where the block raises, that is what is told; who waits for the child's work finds it gone.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield Later(None)
        return
    later = Later(handler)
    signal.signal(signal.SIGCHLD, later.hear)
    try:
        yield later
    finally:
        signal.signal(signal.SIGCHLD, handler)
    later.tell()
