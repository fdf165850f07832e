"""A part of a measurement that may run out of memory: the error ends there, with everything that it holds.

Laws of a few rows may be a little low, and a card may have other tenants. So whatever runs rows of the user's step to
measure it runs them inside ``WithinMemory``, and tries fewer rows then, or says what did not fit.
"""

from __future__ import annotations

import sys
import traceback
from types import TracebackType
from typing import Any, Self

from samegrad.declared import DeclaredStep
from samegrad.exact.out_of_memory import OutOfMemory, is_out_of_memory
from samegrad.exact.phases import announce, phase_now
from samegrad.measure import counters
from samegrad.measure.failures import first_line, line_of


class WithinMemory:
    """A block that ends where memory runs out, with what its frames hold let go of and the cache given back.

    ``found``: where that was and what was raised; "" where the block came to its end. Other errors are left alone, and
    so is an OutOfMemory, which says already what there is to do.
    """

    def __init__(self, declared: DeclaredStep) -> None:
        self._declared = declared
        self.found = ""

    def __enter__(self) -> Self:
        # An error that is being handled around the block is not the block's.
        self._around = sys.exception()
        announce(None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        if error is None or isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            return False
        self.found = f"out of memory in {place_of(error, self._declared)}: {first_line(error)}"
        let_go(error, self._around)
        counters.release_cached(self._declared.device)
        return True

    def refusal(self, *, asked: str, do: str) -> OutOfMemory:
        """The error for a block that has no smaller one to try."""
        return OutOfMemory(asked=asked, found=self.found, do=do)


def let_go(error: BaseException, around: BaseException | None = None) -> None:
    """Frees what the frames of ``error``, and of the errors that led to it, hold; those are over.

    ``around``: an error that was being handled before.
    """
    seen: set[int] = {id(around), id(None)}
    left: list[Any] = [error]
    while left:
        one = left.pop()
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        # A compiler's error has what it met beside it.
        left += [one.__cause__, one.__context__, getattr(one, "inner_exception", None)]
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = one.__cause__ = one.__context__ = None


def place_of(error: BaseException, declared: DeclaredStep) -> str:
    """Phase, innermost module and the user's line, in words: ``backward of encoder.layers.3 (model.py:12)``."""
    names = {id(part): name for module in declared.modules for name, part in module.named_modules() if name}
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = names.get(id(frame.f_locals.get("self")), module)
    phase = phase_now()
    return f"{'the step' if phase is None else phase.value}{f' of {module}' if module else ''}{line_of(error)}"
