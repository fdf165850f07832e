"""What a recipe finds when it judges its own runs, for ``doctor --run``."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Protocol

_SLOWER_FRACTION = 0.5
# Below this a step is launches and clocks, which no prediction is about.
_SLOWER_SECONDS = 0.02


def is_slow(step_seconds: float, predicted_seconds: float) -> bool:
    """Whether a step that takes so long is too slow: the same for whoever judges steps, epochs or a run."""
    return step_seconds > max((1 + _SLOWER_FRACTION) * predicted_seconds, predicted_seconds + _SLOWER_SECONDS)


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
    """The module ``health.py`` of a recipe that can judge its own runs; without torch, for ``doctor --run``."""

    def examine(self, folder: Path) -> tuple[Finding, ...]:
        """The findings of the recipe's own document on the run in ``folder``."""
        ...

    def advise(self, folder: Path) -> tuple[str, ...]:
        """What the run's measurements give reason to change, each with the figure that does."""
        ...
