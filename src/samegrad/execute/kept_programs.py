"""What a step keeps from batch to batch of its compiled and captured chunks: one set, for the plan in force."""

from __future__ import annotations

from typing import Any

from samegrad.exact.pass_programs import Programs
from samegrad.execute.apply import programs_of
from samegrad.levers import Execution
from samegrad.records import Plan


class KeptPrograms:
    """The programs of the plan that runs. Those of another plan go when that one comes."""

    def __init__(self) -> None:
        self._levers: dict[str, dict[str, Any]] = {}
        self._programs: Programs | None = None

    def of(self, plan: Plan, execution: Execution) -> Programs | None:
        """The kept programs of ``plan``; None where its chunks are Python's calls."""
        if self._programs is not None and plan.levers != self._levers:
            self.close()
        if self._programs is None and execution.programmed:
            self._levers, self._programs = plan.levers, programs_of(execution)
        return self._programs

    def notes(self) -> list[str]:
        """What was compiled and captured, in words."""
        return [] if self._programs is None else self._programs.notes()

    def close(self) -> None:
        """Gives back graphs and their memory."""
        if self._programs is not None:
            self._programs.close()
        self._levers, self._programs = {}, None
