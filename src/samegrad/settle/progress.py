"""What planning does just now, for whoever waits: lines at INFO on the logger "samegrad".

Examining takes seconds, compiling a candidate tens of them. Nothing is said where nobody listens.
"""

from __future__ import annotations

import logging
import time

from samegrad.measure.rungs import Rung
from samegrad.records import Plan
from samegrad.report.front import describe_levers
from samegrad.units import format_bytes, format_seconds

_log = logging.getLogger("samegrad")


def working_on(what: str) -> None:
    """``what`` begins."""
    _log.info("samegrad: %s", what)


def trying(plan: Plan) -> Outcome:
    """A run of ``plan`` begins; tell what came of it by ``found``."""
    return Outcome(plan)


class Outcome:
    """A plan that is tried."""

    def __init__(self, plan: Plan) -> None:
        self._told = describe_levers(plan.levers)
        self._start = time.perf_counter()
        working_on(f"trying {self._told}")

    def found(self, rung: Rung | None, most_bytes: int) -> None:
        """``rung``: None where memory ran out. ``most_bytes``: what the budget allows."""
        took = f" (tried in {format_seconds(time.perf_counter() - self._start)})"
        if rung is None or rung.peak_bytes > most_bytes:
            needs = "more" if rung is None else format_bytes(rung.peak_bytes)
            working_on(f"{self._told} needs {needs}, the budget allows {format_bytes(most_bytes)}{took}")
        else:
            working_on(f"{self._told}: {format_seconds(rung.seconds)} a step, {format_bytes(rung.peak_bytes)}{took}")

    def refused(self, why: str) -> None:
        """It cannot run, and ``why``."""
        working_on(f"{self._told} cannot run: {why}")
