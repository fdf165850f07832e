"""The nouns between stages: frozen records that go to JSON and come back equal. No torch here.

    DeclaredStep + Budget → Footprint → Plans (a ladder) → Plan → StepResult → Verdict → report

Amounts are bytes, seconds and rows, and every field's name says which. A field that could not be measured is
None, never filled with something similar. A number that was not measured belongs to a record whose ``origin`` is
``Origin.PREDICTED``; both kinds are kept and shown side by side.
"""

from samegrad.kinds import Category, Counting, Exactness, KnobOrigin, Origin, Phase, Same
from samegrad.records.footprint import (
    Footprint,
    HeadLaws,
    LiveTensors,
    PhaseLaw,
    ProbedWay,
    TimelinePoint,
    Variant,
)
from samegrad.records.plan import Budget, Front, FrontPoint, Plan
from samegrad.records.result import Recovery, StepResult, timed
from samegrad.records.verdict import Check, Departure, Verdict

__all__ = [
    "Budget", "Category", "Check", "Counting", "Departure", "Exactness", "Footprint", "Front", "FrontPoint", "HeadLaws",
    "KnobOrigin", "LiveTensors", "Origin", "Phase", "PhaseLaw", "Plan", "ProbedWay", "Recovery", "Same", "StepResult",
    "TimelinePoint", "Variant", "Verdict", "timed",
]  # fmt: skip
