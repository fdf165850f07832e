"""SIGTERM and Ctrl-C become a flag that the loop reads between steps.

1. Outside the loop nothing is at stake that is not saved yet: the signal ends the command where it stands.
2. In the loop the first signal only sets the flag; the loop saves and then raises ``Stopped``.
3. A child that was forked (a worker that reads data) hears what is sent to the whole group, and leaves it to its
   parent. torch's own workers end on SIGTERM all the same: the loop then saves what was done before (``run_session``).
4. A second signal ends the process at once, as if nobody had listened; the last periodic checkpoint stands.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class Stopped(BaseException):
    """The command was asked to stop. Not an Exception, so that nothing on the way mistakes it for a failure."""

    def __init__(self, number: signal.Signals, *, saved: str | None) -> None:
        self.number, self.saved = number, saved
        super().__init__(f"stopped by {number.name}")

    @property
    def exit_code(self) -> int:
        return _EXIT_CODES[self.number]


class StopFlag:
    """What the signal handlers have seen. ``hold`` marks the stretch in which signals wait for the loop.

    ``saved`` is where the work done so far stands; whoever saves says so here.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.saved: str | None = None
        self._held = False
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return self.asked is not None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, a first signal only sets the flag; the caller reads it at every boundary (rule 2)."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def obey(self) -> None:
        """Raises Stopped if somebody asked to stop; called once the work is saved."""
        if self.asked is not None:
            raise Stopped(self.asked, saved=self.saved)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = signal.Signals(number)
        if not self._held and os.getpid() == self._process:
            self.obey()


@contextmanager
def listening() -> Iterator[StopFlag]:
    """A StopFlag fed by SIGTERM and SIGINT; the handlers that were there before return at the end."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag._hear) for number in _EXIT_CODES}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
