"""What the model draws in a step: one key a step, and every draw a function of key, call, row and element.

The key is one int64 from torch's default generator, taken when the first draw happens; nothing else advances. The
loss runs once on all rows in every plan, so what it draws is the plain step's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import AbstractContextManager

from torch import Tensor

from samegrad.exact.randomness import DrawSites, StepKey, keyed


@dataclasses.dataclass(frozen=True)
class StepDraws:
    """The draws of one step, the same for every split. ``sites`` None: the model draws nothing."""

    sites: DrawSites | None = None
    key: StepKey = dataclasses.field(default_factory=StepKey)

    def rows(self, ids: Tensor | None, *, stream: int = 0) -> AbstractContextManager[object]:
        """A forward of the rows ``ids``, (rows,) int64 on the device: their places in the batch."""
        if self.sites is None or ids is None:
            return contextlib.nullcontext()
        return keyed(self.key, ids, sites=self.sites, stream=stream)
