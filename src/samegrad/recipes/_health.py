"""Checks on a run by its own recipe: answers for ``doctor --run``, and advice for the report. No torch.

A recipe that has some brings ``health.py`` with ``examine(folder)`` and ``advise(folder)``.
"""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Protocol


class Answer(enum.Enum):
    OK = "ok"
    FAILS = "fails"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: its answer, the numbers behind it, and what to do when it fails."""

    name: str
    answer: Answer
    detail: str
    do: str = ""

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "answer": self.answer.value, "detail": self.detail, "do": self.do}


class Health(Protocol):
    """A recipe's ``health.py``."""

    def examine(self, folder: Path) -> tuple[Finding, ...]:
        """The findings of the recipe's own document on the run in ``folder``."""
        ...

    def advise(self, folder: Path) -> tuple[str, ...]:
        """What the run's measurements give reason to change, each with the figure that does."""
        ...
