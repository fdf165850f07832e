"""The CUDA allocator makes segments that grow page by page, for as long as the plan is in force.

Saves: the gaps in segments of fixed sizes: what is reserved comes near to what is in use.
Costs: pages are mapped in the first steps; nothing afterwards.
Why the gradient is the same: nothing that is computed knows where its memory lies.
Refuses: models off CUDA, other allocators, platforms without such segments. Memory in them cannot be shared with
another process by CUDA's IPC: leave it out of the plan where tensors are.
Source: PyTorch documentation, "CUDA semantics", "Optimizing memory usage with PYTORCH_ALLOC_CONF".
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from samegrad.declared import Around, DeclaredStep
from samegrad.exact.growing_segments import growing_segments, why_not
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._variants import predicted_without
from samegrad.records import Exactness, Footprint


@dataclasses.dataclass(frozen=True)
class ExpandableSegments:
    """No knobs: every segment that is new while the plan is in force."""

    name: ClassVar[str] = "expandable_segments"
    slot: ClassVar[Slot] = Slot.ALLOCATOR
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    @classmethod
    def unsuited(cls, declared: DeclaredStep) -> str | None:
        if declared.device.type != "cuda":
            return f"segments are the CUDA allocator's, and the model is on {declared.device}"
        return why_not() or None

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        yield cls()

    def predict(self, footprint: Footprint) -> Footprint:
        """As without it: what is in use is the same, and what is reserved is measured or replayed."""
        return predicted_without(footprint)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        yield execution

    @contextlib.contextmanager
    def standing(self, declared: DeclaredStep) -> Iterator[Around]:
        """Segments that are new inside the block grow."""
        with growing_segments():
            yield contextlib.nullcontext

    def knobs(self) -> dict[str, Any]:
        return {}
