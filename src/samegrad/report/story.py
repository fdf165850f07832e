"""Story: everything a report may show. What is absent is left out of the report, never shown empty."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from samegrad.errors import BadInput
from samegrad.records import Budget, Footprint, Plan, StepResult, Verdict

SVG_NAMESPACE = "http://www.w3.org/2000/svg"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture with its caption: ``image`` is the text of an SVG document or the bytes of a PNG file.

    Raises BadInput, naming the caption, when ``image`` is neither.
    """

    caption: str
    image: str | bytes

    def __post_init__(self) -> None:
        if isinstance(self.image, bytes):
            found = "" if self.image.startswith(_PNG_SIGNATURE) else "bytes without a PNG signature"
        elif "<svg" not in self.image:
            found = "text without an <svg> element"
        else:
            # A browser draws nothing at all for an SVG image that does not declare its namespace.
            found = "" if SVG_NAMESPACE in self.image else f"an <svg> without xmlns={SVG_NAMESPACE!r}"
        if found:
            raise BadInput(
                asked=f"picture {self.caption!r} in a report",
                found=found,
                do="give the bytes of a PNG file or the text of an SVG document",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """What one report tells; everything but the title may be absent.

    ``budget`` defaults to the plan's. ``predicted`` and ``measured`` are footprints of the *planned* step; their own
    ``origin`` and ``counting`` label every number taken from them. ``validation`` holds (step, loss) pairs,
    ``metrics`` the field's numbers by name (``_bytes`` and ``_seconds`` at a name's end say the unit).
    """

    title: str
    command: str = ""
    machine: Mapping[str, str] = dataclasses.field(default_factory=dict)
    budget: Budget | None = None
    plan: Plan | None = None
    predicted: Footprint | None = None
    measured: Footprint | None = None
    results: tuple[StepResult, ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    metrics: Mapping[str, float | int | str | None] = dataclasses.field(default_factory=dict)
    verdict: Verdict | None = None
    pictures: tuple[Picture, ...] = ()
    explanation: str = ""
    troubleshooting: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def limit(self) -> Budget | None:
        """The budget the step was planned for: the story's own, else the plan's."""
        if self.budget is None and self.plan is not None:
            return self.plan.budget
        return self.budget
