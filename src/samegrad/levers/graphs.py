"""A chunk's kernels captured once as a CUDA graph and replayed for every chunk of every step.

Saves: time, where chunks are small and launches are what takes it; no memory.
Costs: sums of gradients that stay (a parameter size), the rows of a chunk once more, and a private pool.
Why the gradient is the same: the same kernels on the same numbers; rows, places, weights and the step's key are
written into the graph's memory before each replay. What Python could read is compared before every step, and a chunk
is captured again where it changed.
Refuses: anything but CUDA; steps that take two passes, and parts in chunks; a forward that changes state or waits for
the device; sparse gradients; sharded parameters.
Source: PyTorch documentation, "CUDA Graphs".
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from samegrad.declared import DeclaredStep
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._variants import predicted_without
from samegrad.records import Exactness, Footprint


@dataclasses.dataclass(frozen=True)
class Graphs:
    """No knobs: one graph for each size of chunk, all in one pool."""

    name: ClassVar[str] = "graphs"
    slot: ClassVar[Slot] = Slot.CAPTURE
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    @classmethod
    def unsuited(cls, declared: DeclaredStep) -> str | None:
        if declared.device.type == "cuda":
            return None
        return f"graphs of kernels are CUDA's, and the model is on {declared.device}"

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        yield cls()

    def predict(self, footprint: Footprint) -> Footprint:
        """As without it: what the pool takes is measured, when a chunk has been captured."""
        return predicted_without(footprint)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        sizes = (execution.batch_rows,) if execution.sizes is None else execution.sizes
        yield dataclasses.replace(execution, sizes=sizes, captures=True)

    def knobs(self) -> dict[str, Any]:
        return {}
