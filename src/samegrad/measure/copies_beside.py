"""Copies of pinned memory that travel beside the computation of a predicted step, and when it waits for them.

What a forward keeps leaves for the host and comes back in backward (the lever ``offload_saved``). Each direction has a
stream of its own, on which copies go one after the other. So forward and backward take the longer of what they compute
and of their bytes over the link's bandwidth, and more where the few copies that may be ahead do not keep it busy.
"""

from __future__ import annotations

import collections

from samegrad.measure.events import Operation
from samegrad.records import Phase

# Copies to the host that may be on their way while the computation goes on.
MOST_LEAVING = 2
# Storages that may have begun to come back before backward asks for them; of bytes, those of the two largest.
MOST_AHEAD = 8


class CopiesBeside:
    """The copies of a step in order. Times are seconds on the clock of the device that computes."""

    def __init__(self) -> None:
        self._leaving: collections.deque[float] = collections.deque([0.0] * MOST_LEAVING, maxlen=MOST_LEAVING)
        self._largest_bytes = [0, 0]
        # When each that is ahead arrives, and its bytes.
        self._ahead: collections.deque[tuple[float, int]] = collections.deque()
        self._arrived: float | None = None

    @staticmethod
    def takes(operation: Operation) -> bool:
        """Whether it is such a copy: all others over the link are made where the step computes."""
        if operation.phase is Phase.FORWARD:
            return operation.bus_bytes < 0
        return operation.phase is Phase.BACKWARD and operation.bus_bytes > 0

    def reach(self, phase: Phase, device: float) -> float:
        """When the computation, which had come to ``device``, goes on in ``phase``."""
        if phase is not Phase.FORWARD:
            device = max(device, self._leaving[-1])
        if phase is not Phase.BACKWARD and self._arrived is not None:
            device = max(device, self._arrived)
            self._ahead.clear()
            self._arrived = None
        return device

    def begin(self, operation: Operation, device: float, launched: float, copying: float) -> float:
        """When the computation goes on after it launched a copy at ``launched`` that takes ``copying`` seconds."""
        if operation.bus_bytes < 0:
            return self._leave(-operation.bus_bytes, device, launched, copying)
        return self._come(operation.bus_bytes, device, launched, copying)

    def _leave(self, size_bytes: int, device: float, launched: float, copying: float) -> float:
        self._largest_bytes = sorted([*self._largest_bytes, size_bytes])[1:]
        device = max(device, self._leaving[0])
        self._leaving.append(max(device, launched, self._leaving[-1]) + copying)
        return device

    def _come(self, size_bytes: int, device: float, launched: float, copying: float) -> float:
        """It begins when there is room for it: when backward has been given those before it."""
        is_first = self._arrived is None
        while self._ahead and not self._has_room(size_bytes):
            device = max(device, self._ahead.popleft()[0])
        self._arrived = max(device, launched, self._arrived or 0.0) + copying
        if is_first:
            # Backward asks for it, and nothing came ahead.
            return self._arrived
        self._ahead.append((self._arrived, size_bytes))
        return device

    def _has_room(self, size_bytes: int) -> bool:
        held = sum(size for _, size in self._ahead)
        return len(self._ahead) < MOST_AHEAD and held + size_bytes <= sum(self._largest_bytes)
