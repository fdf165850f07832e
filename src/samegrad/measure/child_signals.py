"""Children that end while a step is examined are heard of afterwards.

torch raises the death of a data worker out of a signal handler, in whatever code runs just then. Inside an examination
that would be taken for what the step does on a few rows, and another plan would come of it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def children_heard_later() -> Iterator[None]:
    """A block inside which the handler of SIGCHLD waits; it is called once at the end, where the block came to it.

    Where the block raises, that is what is told; who waits for the child's work finds it gone.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = False

    def hear(number: int, frame: object) -> None:
        nonlocal heard
        heard = True

    signal.signal(signal.SIGCHLD, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
    if heard:
        handler(signal.SIGCHLD, None)
