"""Calls that stop in the middle: each runs in a thread of its own, one at a time, and waits where it has a question.

Python code that knows nothing of chunks can so be run for several chunks together, from one question to the next, as
ranks of a process group would meet in a collective. There is no waiting with a time limit and nothing to deadlock:
a thread runs only while the caller waits for it, and it always hands back, with a question, a result or an error.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from samegrad.errors import CannotTrace
from samegrad.exact.dataless import computing


@dataclasses.dataclass(frozen=True)
class Question:
    """What a call wants to know before it goes on."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Result:
    value: Any


class Abandoned(BaseException):
    """Ends a call nobody waits for any more. No Exception, so that the code it passes through does not keep it."""


class VirtualRank:
    """``work`` in a thread. ``advance`` belongs to the caller, ``ask`` to the work; ``close`` must always be called."""

    def __init__(self, work: Callable[[VirtualRank], Any]) -> None:
        self._work = work
        self._continue, self._hand_back = threading.Semaphore(0), threading.Semaphore(0)
        self._answer: Any = None
        self._said: Question | Result | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        # The caller's context variables hold in the thread too.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._live,), daemon=True)

    def advance(self, answer: Any = None) -> Question | Result:
        """Runs on with ``answer`` until the next question, or the result. Raises what the work raises."""
        self._answer = answer
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._continue.release()
        self._hand_back.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error
        said, self._said = self._said, None
        assert said is not None
        return said

    def ask(self, question: Any) -> Any:
        """Hands ``question`` to the caller and waits for the answer, within the work."""
        if self._abandoned:
            raise Abandoned
        self._said = Question(question)
        del question
        self._hand_back.release()
        self._continue.acquire()
        if self._abandoned:
            raise Abandoned
        answer, self._answer = self._answer, None
        return answer

    def close(self) -> None:
        """Ends the thread, wherever it is: at its next question at the latest."""
        if self._thread.ident is None:
            return
        self._abandoned = True
        self._continue.release()
        self._thread.join()
        self._said = self._answer = self._error = None

    def _live(self) -> None:
        try:
            self._said = Result(self._work(self))
        except Abandoned:
            self._said = None
        except BaseException as error:  # noqa: BLE001  # handed to the caller, who raises it
            self._error = error
        finally:
            self._hand_back.release()


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What torch keeps for each thread and a chunk's thread must share with its caller."""

    default_device: torch.device
    stream: Any

    @classmethod
    def now(cls, device: torch.device) -> Surroundings:
        """Raises CannotTrace in a trace: it follows the thread that it began in."""
        if not computing():
            raise CannotTrace(
                asked="follow a step whose chunks meet at each BatchNorm",
                found="they run in threads of their own, into which a trace does not see",
                do="measure the step by probes on its device, or take the lockstep scheme",
            )
        return cls(torch.get_default_device(), torch.cuda.current_stream(device) if device.type == "cuda" else None)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.stream is not None:
                stack.enter_context(torch.cuda.device(self.stream.device))
                stack.enter_context(torch.cuda.stream(self.stream))
            if self.default_device != torch.device("cpu"):
                stack.enter_context(self.default_device)
            yield
