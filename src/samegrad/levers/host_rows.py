"""The batch stays on the host or on disk; chunks travel to the device ahead of use.

Saves: the batch's bytes on the device but for two chunks. Rows in an order of their own are never copied whole.
Costs: the transfers, hidden behind the computation as long as a chunk computes longer than it travels.
Why the gradient is the same: the same rows reach the same kernels.
Refuses: batches that are on the device already.
Source: recipe ``autoencoder``; CUDA C++ Programming Guide, section on overlapping data transfers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from samegrad.levers._lever import Execution, Slot
from samegrad.records import Exactness, Footprint


@dataclasses.dataclass(frozen=True)
class HostRows:
    """No knobs: two chunks are on their way or in use at a time."""

    name: ClassVar[str] = "host_rows"
    slot: ClassVar[Slot] = Slot.DATA
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        yield cls()

    def predict(self, footprint: Footprint) -> Footprint:
        # The probes already ran with rows arriving chunk by chunk.
        return footprint

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        yield dataclasses.replace(execution, rows_on_host=True)

    def knobs(self) -> dict[str, Any]:
        return {}
