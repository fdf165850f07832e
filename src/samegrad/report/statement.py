"""An answer to a question that a report asks, and how it is to be read."""

from __future__ import annotations

import dataclasses
import enum


class Tone(enum.Enum):
    """How a statement is to be read."""

    GOOD = "good"
    BAD = "bad"
    OPEN = "open"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
    """An answer of a few words, and the sentence with its numbers (lower case, no full stop)."""

    tone: Tone
    answer: str
    sentence: str

    @property
    def text(self) -> str:
        return f"{self.answer}: {self.sentence}."
